"""Computing prompts: in chunks, several short ones together, after prefixes that are kept."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from deployments.engine.batching.sequence import Sequence, drop_sequence
from deployments.engine.cache.cache import AnyCache, EncoderBatchCache, new_cache
from deployments.engine.cache.layers import column_room
from deployments.engine.inside.plan import Inspecting
from deployments.engine.model.forward import Chunk, Forward

LOGITS_BYTES = 256 << 20
_GROUP_CHUNKS = 2
_SHORT = 4
"""The chunks of a sequence that yields to more urgent ones are shorter by this factor."""


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """A cache sequence that begins like a prompt, which needs its last `cut` tokens cut off.

    Attributes:
        logits: [vocab], if the whole prompt is there and nothing has to be computed.
    """

    cache: AnyCache
    index: int
    cut: int
    logits: Tensor | None = None

    @property
    def length(self) -> int:
        return self.cache.lengths[self.index] - self.cut


@dataclass(slots=True, eq=False)
class Prefill:
    """Prompts being computed together.

    One forward computes several sequences: padded on the left if the cache is empty, else each with as many tokens to
    go as the others.
    """

    sequences: list[Sequence]
    cache: AnyCache
    logits: Tensor | None = None

    @property
    def remaining(self) -> int:
        """Tokens still to be computed, padding included."""
        if self.logits is not None:
            return 0
        done = self.cache.lengths or [0] * len(self.sequences)
        return len(self.sequences) * max(
            len(sequence.ids) - n for sequence, n in zip(self.sequences, done, strict=True)
        )

    def drop(self, sequence: Sequence, *, blank: bool = False) -> None:
        """Let a sequence leave; what is computed for the others stays. See `Batch.drop`."""
        if not self.cache.lengths:
            self.sequences.remove(sequence)
            return
        drop_sequence(self.cache, self.sequences, sequence, blank=blank)


def default_chunk(device: torch.device) -> int:
    """Prompt tokens of a forward: on an H200, 2,048 take as long as 512 with 1 B parameters, twice as long with 8 B."""
    return 2048 if device.type == "cuda" else 512


class Prefiller:
    """Runs prefill forwards.

    Args:
        forward: the model's forward passes.
        chunk: tokens of one prompt per forward at most, media prompts excepted; whole prompts together may be twice
            as many, which reads the weights half as often.
        vocab_size: width of the logits.
        chunks: a prompt may be computed in several forwards.
        pads: prompts of different lengths may be padded together.

    Attributes:
        inspecting: surrounds every forward.
        separates_inspected: see `Limits.separates_inspected`.
    """

    def __init__(
        self, forward: Forward, *, chunk: int, vocab_size: int, chunks: bool = True, pads: bool = True
    ) -> None:
        self.forward = forward
        self.inspecting = Inspecting()
        self.separates_inspected = False
        self.chunk = max(1, chunk)
        self.group = _GROUP_CHUNKS * self.chunk
        self.chunks = chunks
        self.pads = pads
        self._scored_chunk = max(1, min(self.chunk, LOGITS_BYTES // (4 * vocab_size)))

    def begin(self, sequences: abc.Sequence[Sequence], sources: abc.Sequence[PrefixMatch | None]) -> Prefill:
        """A prefill of sequences that `together` has found, each with the source of its beginning, if there is one."""
        longest = max(len(sequence.ids) for sequence in sequences)
        cache = new_cache(self.forward.model, capacity=column_room(longest))
        logits = None
        cache.expect(len(sequences), max(0 if source is None else source.length for source in sources))
        for sequence, source in zip(sequences, sources, strict=True):
            if source is not None:
                cache.append(source.cache, source.index, source.cut)
                sequence.output.cached_tokens = min(source.length, sequence.prompt_length)
                logits = None if source.logits is None else source.logits[None]
        return Prefill(list(sequences), cache, logits)

    def together(
        self, sequences: abc.Sequence[Sequence], sources: abc.Sequence[PrefixMatch | None]
    ) -> list[PrefixMatch | None]:
        """Beginnings for the longest run of the first sequences that one forward can compute.

        Sequences with sources are cut to have equally many tokens to go, which costs no more than padding them.
        """
        first, source = sequences[0], sources[0]
        if len(sequences) == 1 or not self._groupable(first) or (source is not None and source.logits is not None):
            return [source]
        limit = self._scored_chunk if first.scored else self.group
        taken: list[PrefixMatch | None] = [source]
        longest = self._to_go(first, source)
        for sequence, other in zip(sequences[1:], sources[1:], strict=False):
            to_go = self._to_go(sequence, other)
            longest_now = max(longest, to_go)
            if not (
                self._groupable(sequence)
                and sequence.scored == first.scored
                and sequence.group == first.group
                and (other is None) == (source is None)
                and (other is None or other.logits is None)
                and not (self.separates_inspected and (sequence.inspected is None) != (first.inspected is None))
                and (len(taken) + 1) * longest_now <= limit
                and 2 * min(to_go, longest) >= longest_now
            ):
                break
            aligned = self._aligned([*taken, other], sequences[: len(taken) + 1], longest_now)
            if aligned is None:
                break
            taken, longest = aligned, longest_now
        return taken

    def completes(self, prefill: Prefill) -> bool:
        """Whether the next forward is the last one of these prompts."""
        if len(prefill.sequences) > 1 or prefill.logits is not None:
            return True
        return prefill.remaining <= self._limit(prefill.sequences[0], prefill.cache.width)

    def advance(self, prefill: Prefill) -> Tensor | None:
        """Run one forward.

        Returns:
            Logits [sequences, vocab] of the next token once the prompts are computed, None before.
        """
        if prefill.logits is not None:
            return prefill.logits
        if len(prefill.sequences) > 1:
            return self._advance_group(prefill)
        sequence, cache = prefill.sequences[0], prefill.cache
        scored = sequence.scored
        if not cache.lengths and isinstance(cache, EncoderBatchCache):
            request = sequence.request
            prompt = sequence.ids[: sequence.prompt_length]
            with self.inspecting.forward([sequence], [0], len(prompt)):
                chunk = self.forward.encode(request.input_ids, request.model_inputs, prompt, cache, all_logits=scored)
        elif not cache.lengths and sequence.request.model_inputs:
            prompt = sequence.ids[: sequence.prompt_length]
            whole = self._whole(sequence)
            with self.inspecting.forward([sequence], [0], len(prompt)):
                chunk = self.forward.prefill_media(
                    prompt, sequence.request.model_inputs, cache, all_logits=scored, whole=whole
                )
        else:
            done = cache.width
            ids = sequence.ids[done : done + self._limit(sequence, done)]
            whole = self._whole(sequence)
            with self.inspecting.forward([sequence], [done], len(ids)):
                chunk = self.forward.prefill([ids], cache, offset=sequence.offset, all_logits=scored, wholes=[whole])
        sequence.offset = chunk.offset
        if sequence.scorer is not None:
            sequence.scorer.feed(chunk.logits[0], cache.width - chunk.logits.shape[1])
        return chunk.logits[:, -1] if cache.width == len(sequence.ids) else None

    def _advance_group(self, prefill: Prefill) -> Tensor:
        done = prefill.cache.lengths or [0] * len(prefill.sequences)
        ids = [sequence.ids[n:] for sequence, n in zip(prefill.sequences, done, strict=True)]
        scored = prefill.sequences[0].scored
        wholes = [self._whole(sequence) for sequence in prefill.sequences]
        with self.inspecting.forward(prefill.sequences, done, list(map(len, ids))):
            chunk: Chunk = self.forward.prefill(ids, prefill.cache, all_logits=scored, wholes=wholes)
        for sequence, new, logits in zip(prefill.sequences, ids, chunk.logits, strict=True):
            if sequence.scorer is not None:
                sequence.scorer.feed(logits[-len(new) :], 0)
        return chunk.logits[:, -1]

    def _whole(self, sequence: Sequence) -> int:
        """Tokens that count as a sequence's prompt: its text too, if `generate` would compute it anew as well."""
        return len(sequence.ids) if self.forward.recomputes else sequence.prompt_length

    def group_of(self, *, yields: bool) -> int:
        """Tokens of several prompts that one forward computes, at least."""
        return max(1, self.chunk // _SHORT) if yields else self.group

    def _limit(self, sequence: Sequence, done: int) -> int:
        """Tokens of the forward after the first `done`."""
        if not self.chunks:
            return len(sequence.ids)
        chunk = self._scored_chunk if sequence.scored else self.chunk
        chunk = max(1, chunk // _SHORT) if sequence.yields else chunk
        return min([chunk, *(stop - done for stop in sequence.stops if stop > done)])

    def _groupable(self, sequence: Sequence) -> bool:
        whole = bool(sequence.request.model_inputs or sequence.isolated or self.forward.is_encoder_decoder)
        plain = not (whole or sequence.stops)
        return plain and sequence.offset == (0,) and self.pads

    @staticmethod
    def _to_go(sequence: Sequence, source: PrefixMatch | None) -> int:
        return len(sequence.ids) - (0 if source is None else source.length)

    def _aligned(
        self, sources: abc.Sequence[PrefixMatch | None], sequences: abc.Sequence[Sequence], longest: int
    ) -> list[PrefixMatch | None] | None:
        """Beginnings cut so that every sequence has `longest` tokens to go; None if that cannot be."""
        aligned: list[PrefixMatch | None] = []
        for sequence, source in zip(sequences, sources, strict=True):
            if source is not None:
                cut = source.cut + longest - self._to_go(sequence, source)
                if cut >= source.cache.lengths[source.index] or not source.cache.holds(source.index, cut):
                    return None
                source = PrefixMatch(source.cache, source.index, cut)
            aligned.append(source)
        return aligned
