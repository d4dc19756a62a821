"""Where a prompt may begin: prefixes kept for it, and sequences that run and have the same beginning."""

from __future__ import annotations

import logging
from collections import abc
from collections.abc import Iterable

import torch
from torch import Tensor

from deployments.engine.base.failures import is_out_of_memory, raise_if_lost
from deployments.engine.batching.prefill import Prefill, PrefixMatch
from deployments.engine.batching.prefix_cache import Prefix, PrefixStore
from deployments.engine.batching.prefix_stops import PrefixStops
from deployments.engine.batching.sequence import Batch, Sequence, common_prefix
from deployments.engine.cache.cache import AnyCache, BatchCache, new_cache
from deployments.engine.cache.sequence_bytes import SequenceBytes
from deployments.engine.model.forward import Forward

logger = logging.getLogger(__name__)

_WORTH_REUSING = 16


class PrefixReuse:
    """Finds the beginnings of prompts, and keeps them.

    Args:
        forward: the model's forward passes.
        store: prefixes of finished sequences.
        sequence_bytes: what a sequence costs.
        prefix_alignment: see `Limits.prefix_alignment`.
    """

    def __init__(
        self, forward: Forward, store: PrefixStore, sequence_bytes: SequenceBytes, prefix_alignment: int | None
    ) -> None:
        self._forward = forward
        self._store = store
        self._sequence_bytes = sequence_bytes
        self._prefix_alignment = prefix_alignment
        self._stops = PrefixStops(new_cache(forward.model))

    def source(self, sequence: Sequence, batches: Iterable[Batch]) -> PrefixMatch | None:
        """The best beginning of a sequence among kept prefixes and running sequences; sets its offset and stops."""
        prefix_alignment = self._prefix_alignment
        sequence.stops = ()
        if not self._shares(sequence) or (prefix_alignment is not None and sequence.request.model_inputs):
            return None
        entry, saved = self._store.find(sequence.ids, sequence.content_key, prefix_alignment, sequence.reusable)
        source = None
        if entry is not None:
            logits = entry.logits if saved == len(sequence.ids) else None
            source = PrefixMatch(entry.cache, 0, len(entry.ids) - saved, logits)
            offset = entry.offset
        for batch in batches:
            for index, other in enumerate(batch.sequences):
                if other.ids[:_WORTH_REUSING] != sequence.ids[:_WORTH_REUSING]:
                    continue
                common = min(common_prefix(other.ids, sequence.ids), other.shared, sequence.reusable)
                usable = min(common, len(sequence.ids) - 1, batch.cache.lengths[index])
                if prefix_alignment is not None:
                    usable = min(usable, self._prefilled(other)) // prefix_alignment * prefix_alignment
                cut = batch.cache.lengths[index] - usable
                if other.content_key == sequence.content_key and usable > saved and batch.cache.holds(index, cut):
                    source, saved, offset = PrefixMatch(batch.cache, index, cut), usable, other.offset
        if prefix_alignment is None:
            kept = (entry.ids for entry in self._store if entry.content_key == sequence.content_key)
            sequence.stops = self._stops.find(sequence, saved, kept)
        if source is None or saved < max(_WORTH_REUSING, sequence.media_end):
            return None
        sequence.offset = offset
        return source

    def soon_served(
        self,
        sequence: Sequence,
        source: PrefixMatch | None,
        prefills: abc.Sequence[Prefill],
        begun: abc.Sequence[Sequence],
    ) -> Sequence | None:
        """A sequence computed before this one that has most of what it lacks, so that waiting saves work."""
        if not self._shares(sequence):
            return None
        have = 0 if source is None else source.length
        enough = have + max(_WORTH_REUSING, (len(sequence.ids) - have) // 2)
        computed = [(other, _computed(prefill)) for prefill in prefills for other in prefill.sequences]
        for other, done in [*computed, *((other, 0) for other in begun)]:
            begins_alike = (
                other.content_key == sequence.content_key
                and other.ids[:_WORTH_REUSING] == sequence.ids[:_WORTH_REUSING]
            )
            if not begins_alike:
                continue
            common = min(common_prefix(other.ids, sequence.ids), other.shared, sequence.reusable)
            if common < enough:
                continue
            if self._prefix_alignment is not None or self._stops.serves(other, common, done):
                return other
        return None

    def keep(self, batch: Batch, index: int, room: int, logits: Tensor | None = None) -> None:
        """Put a copy of a sequence's cache into the store, unless it is too short to be worth it or cannot be copied.

        Args:
            room: bytes that the store may have at most, beside its own limit.
            logits: [vocab], of the sequence's next token; a copy of them is kept.
        """
        sequence = batch.sequences[index]
        length = min(batch.cache.lengths[index], sequence.shared)
        cut = batch.cache.lengths[index] - length
        lacks_mark = bool(sequence.request.model_inputs) and sequence.media_end == 0
        if not self._store.limit or length < _WORTH_REUSING or lacks_mark or self._forward.is_encoder_decoder:
            return
        if self._sequence_bytes.of_sequence(length) > min(room, self._store.limit):
            return
        try:
            if not batch.cache.holds(index, cut):
                return
            copy = batch.cache.copy_sequence(index, cut)
            if sequence.steered and not _is_finite(copy):
                return
            logits = None if logits is None else logits.clone()
        except Exception as error:
            raise_if_lost(error)
            # Nobody waits for a prefix.
            if not is_out_of_memory(error):
                logger.warning("The prefix of a finished request cannot be kept.", exc_info=True)
            self._store.clear()
            return
        prefix = Prefix(
            ids=sequence.ids[:length],
            cache=copy,
            offset=sequence.offset,
            content_key=sequence.content_key,
            logits=logits,
            prefilled=min(length, self._prefilled(sequence)),
            adapter=sequence.request.adapter,
        )
        self._store.add(prefix)
        self._store.shrink(min(self._store.limit, room))

    def _shares(self, sequence: Sequence) -> bool:
        """Whether its tokens determine what a sequence's cache holds, so that it may begin with another's."""
        whole = sequence.scorer is not None or self._forward.is_encoder_decoder
        return self._store.limit > 0 and not whole and (sequence.media_end > 0 or not sequence.request.model_inputs)

    def _prefilled(self, sequence: Sequence) -> int:
        """Tokens of a sequence that were computed as those of any prompt are; 0 outside of deterministic mode."""
        scored = sequence.request.sampling.prompt_logprobs is not None
        return 0 if scored or self._prefix_alignment is None else sequence.prompt_length


def _computed(prefill: Prefill) -> int:
    """Tokens after which a sequence can no longer stop: those in its cache, or all of them if it is not alone."""
    return prefill.cache.width if len(prefill.sequences) == 1 else max(len(s.ids) for s in prefill.sequences)


def _is_finite(cache: AnyCache) -> bool:
    """Whether no key, value or state is NaN or infinite."""
    assert isinstance(cache, BatchCache)
    tensors = (tensor for layer in cache.held for value in vars(layer).values() for tensor in _tensors(value))
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _tensors(value: object) -> list[Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, Tensor)]
