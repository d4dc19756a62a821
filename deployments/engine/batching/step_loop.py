"""Continuous batching: one step advances a prefill by a chunk and every running sequence by a token.

All of it runs in one thread and knows nothing of threads. A sequence is waiting, then being prefilled, then in a batch,
and leaves by finishing, failing or being cancelled, at any of these. The scheduler says whose turn it is, and recovery
what happens after a forward that failed.
"""

from __future__ import annotations

from collections import Counter, abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from deployments.engine.base.failures import as_error, raise_if_lost
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import EngineStats
from deployments.engine.batching.prefill import Prefill, Prefiller, PrefixMatch
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prefix_reuse import PrefixReuse
from deployments.engine.batching.prefix_stops import before_tail
from deployments.engine.batching.prompt_lookup import PromptLookup
from deployments.engine.batching.recovery import Recovery
from deployments.engine.batching.running_batches import Limits
from deployments.engine.batching.scheduler import Scheduler
from deployments.engine.batching.sequence import Batch, Sequence
from deployments.engine.cache.sequence_bytes import SequenceBytes
from deployments.engine.model.forward import Forward
from deployments.engine.sampling.sample import Sampled, sample_batch
from deployments.engine.speedups.replayed_decode import ReplayedDecode

Group = TypeVar("Group", Batch, Prefill)


@dataclass(frozen=True, slots=True)
class Leaving:
    """How a sequence leaves.

    Attributes:
        keep: its cache is put into the prefix store.
        blank: its cache may hold values that are not finite.
    """

    keep: bool = False
    blank: bool = False


_FINISHED = Leaving(keep=True)
_FAILED = Leaving(blank=True)
_CANCELED = Leaving()


class StepLoop:
    """The sequences of one model.

    Args:
        forward: the model's forward passes.
        prefiller: computes prompts.
        store: prefixes of finished sequences.
        sequence_bytes: what a sequence costs.
        limits: what the sequences may use.
        replayed: computes decode steps in the place of `forward`.
        lookup: drafts tokens.

    Attributes:
        recovery: what happens to sequences whose forward failed; `recovery.after_step` if `step` raises.
    """

    def __init__(
        self,
        forward: Forward,
        prefiller: Prefiller,
        store: PrefixStore,
        sequence_bytes: SequenceBytes,
        limits: Limits,
        replayed: ReplayedDecode | None = None,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.forward = forward
        self.replayed = replayed
        self.lookup = lookup
        self.prefiller = prefiller
        self.store = store
        self.limits = limits
        self.reuse = PrefixReuse(forward, store, sequence_bytes, limits.prefix_alignment)
        self.scheduler = Scheduler(prefiller, self.reuse, store, sequence_bytes, limits)
        self.batches = self.scheduler.batches
        self.recovery = Recovery(forward, self.scheduler, store)
        self._counts: Counter[str] = Counter()

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self.scheduler.add(sequence)

    def drop(self, live: LiveRequest) -> None:
        """Forget the sequence of a request that has ended, wherever it is."""
        for sequence in [s for s in self.scheduler.waiting if s.live is live]:
            self.scheduler.waiting.discard(sequence)
        for sequence in [s for s in self.scheduler.sequences if s.live is live]:
            self._leave(sequence)

    def clear(self) -> None:
        """Forget every sequence, every kept prefix and every step that could be replayed."""
        self.scheduler.waiting.clear()
        self.scheduler.prefills.clear()
        self.batches.clear()
        self.store.clear()
        if self.replayed is not None:
            self.replayed.forget()

    def step(self) -> None:
        """Advance one prefill by one forward, and every batch by one token."""
        for sequence, error in self.scheduler.begin_step():
            self.recovery.after_forward([sequence], error)
        while (group := self.scheduler.next_group()) is not None:
            self._begin(*group)
        self.scheduler.resume()
        if self.scheduler.prefills:
            self._advance(self.scheduler.next_prefill(self._counts["steps"]))
        if self.forward.recomputes:
            self._begin_anew()
        self._regroup()
        for batch in self.batches:
            self._decode(batch)
        self.recovery.end_step()
        self._counts["steps"] += 1

    def stats(self) -> EngineStats:
        """Counters of this moment."""
        prefills, batches = self.scheduler.prefills, self.batches.all
        caches = [*(prefill.cache for prefill in prefills), *(batch.cache for batch in batches)]
        return EngineStats(
            kind="continuous_batching",
            sequences=len(self.scheduler.sequences),
            waiting=len(self.scheduler.waiting) - len(self.batches.displaced),
            prefix_entries=len(self.store),
            cache_bytes=sum(cache.nbytes for cache in caches),
            prefix_bytes=self.store.nbytes,
            budget_bytes=self.limits.budget,
            **self._counts,
        )

    # Prefill.

    def _begin(self, sequences: list[Sequence], sources: list[PrefixMatch | None]) -> None:
        try:
            prefill = self.prefiller.begin(sequences, sources)
        except Exception as error:
            self.recovery.after_forward(sequences, error)
            return
        for sequence in sequences:
            sequence.live.running = True
        self.scheduler.prefills.append(prefill)
        if prefill.logits is not None:
            self._advance(prefill)

    def _advance(self, prefill: Prefill) -> None:
        try:
            with self._adapters(prefill.sequences):
                logits = self.prefiller.advance(prefill)
        except Exception as error:
            self.scheduler.prefills.remove(prefill)
            self.recovery.after_forward(prefill.sequences, error)
            return
        batch = Batch(prefill.cache, prefill.sequences)
        if logits is None:
            if prefill.cache.width in prefill.sequences[0].stops:
                self._keep(batch, 0)
            return
        self.scheduler.prefills.remove(prefill)
        self.batches.add(batch)
        for sequence in batch.sequences:
            self._count_prompt(sequence)
        self._keep_prompts(batch, logits)
        ended = [sequence for sequence in batch.sequences if not sequence.active]
        if ended:
            logits = self._without(ended, batch, logits)
        if len(logits):
            self._sample(batch, logits[:, None])

    def _count_prompt(self, sequence: Sequence) -> None:
        if len(sequence.ids) == sequence.prompt_length:
            self._counts["prompt_tokens"] += sequence.prompt_length
            self._counts["cached_tokens"] += sequence.output.cached_tokens
        if sequence.scorer is None:
            return
        try:
            sequence.give(sequence.scorer.scores())
        except Exception as error:
            raise_if_lost(error)
            sequence.fail(as_error(error))
        sequence.scorer = None

    def _without(self, ended: list[Sequence], batch: Batch, logits: Tensor) -> Tensor:
        """Let sequences leave that have ended already; the logits [sequences, vocab] of the others."""
        sequences = list(batch.sequences)
        for sequence in ended:
            self._leave(sequence)
        return logits[[sequences.index(sequence) for sequence in batch.sequences if sequence not in ended]]

    def _keep_prompts(self, batch: Batch, logits: Tensor) -> None:
        """Keep prompts that no crop of the finished sequences could bring back."""
        for index, sequence in enumerate(batch.sequences):
            known = sequence.output.cached_tokens == sequence.prompt_length or before_tail(sequence)
            if not batch.cache.holds(index, 1) and not known:
                self._keep(batch, index, logits[index])

    # Decode.

    def _decode(self, batch: Batch) -> None:
        draft_tokens = None if self.lookup is None else self.lookup.draft_tokens(batch)
        try:
            with self._adapters(batch.sequences):
                if self.lookup is None or draft_tokens is None:
                    logits = self._decoded(batch)
                else:
                    logits = self.lookup.forward(batch, draft_tokens)
        except Exception as error:
            self.recovery.after_decode(batch, error)
            return
        self.recovery.decoded(batch.sequences)
        self._sample(batch, logits, draft_tokens)

    def _decoded(self, batch: Batch) -> Tensor:
        """Logits [sequences, 1, vocab]. One that is captured or compiled has no adapters, and runs no hooks."""
        sequences = batch.sequences
        last, offsets = [s.ids[-1] for s in sequences], [s.offset for s in sequences]
        plain = not any(s.request.adapter or s.inspected is not None for s in sequences)
        decode = self.forward.decode if self.replayed is None or not plain else self.replayed.decode
        with self.prefiller.inspecting.forward(sequences, batch.cache.lengths, 1):
            return decode(last, offsets, batch.cache)[:, None]

    def _adapters(self, sequences: abc.Sequence[Sequence]) -> AbstractContextManager[None]:
        """What a forward of these sequences runs in: each with its adapter."""
        return self.forward.adapters.applied([sequence.request.adapter for sequence in sequences])

    def _sample(
        self, batch: Batch, logits: Tensor, draft_tokens: abc.Sequence[abc.Sequence[int]] | None = None
    ) -> None:
        """Choose every sequence's next token, and those after draft tokens that were right; finished sequences leave.

        Args:
            logits: [sequences, 1 + draft_tokens, vocab].
            draft_tokens: the tokens after each sequence's last one, if there were any in the forward.
        """
        sequences = list(batch.sequences)
        active, right, leaving = list(range(len(sequences))), [0] * len(sequences), {}
        for place in range(logits.shape[1]):
            here = logits[:, place] if len(active) == len(sequences) else logits[active, place]
            going_on = []
            for i, sampled in zip(active, self._sampled([sequences[i] for i in active], here), strict=True):
                if (leaves := self._take(sequences[i], sampled)) is not None:
                    leaving[i] = leaves
                elif draft_tokens is not None and draft_tokens[i][place : place + 1] == [sampled.token_id]:
                    going_on.append(i)
            active = going_on
            for i in active:
                right[i] += 1
            if not active:
                break
        if self.lookup is not None and draft_tokens is not None:
            self.lookup.settle(batch, draft_tokens, right)
        for i, leaves in leaving.items():
            self._leave(sequences[i], leaves)

    def _take(self, sequence: Sequence, sampled: Sampled) -> Leaving | None:
        """Give a token to the sequence; how it leaves, if it does."""
        sampled = sequence.judged(sampled)
        if sequence.request.sampling.max_tokens == 0 and sampled.error is None:
            sequence.finish("length")
            return _FINISHED
        if sampled.error is None:
            self._counts["generated_tokens"] += 1
            sequence.ids.append(sampled.token_id)
        sequence.take(sampled)
        if sequence.active:
            return None
        return _FINISHED if sampled.error is None else _FAILED

    def _sampled(self, sequences: abc.Sequence[Sequence], logits: Tensor) -> list[Sampled]:
        samplers = [sequence.sampler for sequence in sequences]
        one_by_one = (
            self.limits.prefix_alignment is not None and len(sequences) > 1 and not all(s.plain for s in samplers)
        )
        try:
            if not one_by_one:
                return sample_batch(logits, samplers)
        except Exception as error:
            raise_if_lost(error)
            if len(sequences) == 1:
                return [Sampled(-1, error=as_error(error))]
        return [self._sampled([sequence], logits[i : i + 1])[0] for i, sequence in enumerate(sequences)]

    def _regroup(self) -> None:
        """Join batches where that saves work."""
        while (pair := self.scheduler.joinable()) is not None:
            into, other = pair
            self.batches.remove(other)
            try:
                into.absorb(other)
            except Exception as error:
                self.batches.remove(into)
                self.recovery.after_forward([*into.sequences, *other.sequences], error)

    def _begin_anew(self) -> None:
        """Queue the sequences whose next token changes the frequencies of all their keys, to be computed anew."""
        sequences = self.batches.sequences
        frequencies = self.forward.rotary.frequencies
        for sequence in [s for s in sequences if s.frequencies != frequencies(len(s.ids))]:
            self._leave(sequence)
            self.recovery.compute_again([sequence])

    # Leaving.

    def _leave(self, sequence: Sequence, leaves: Leaving = _CANCELED) -> None:
        """Remove a sequence that runs."""
        for prefill in self.scheduler.prefills:
            if sequence in prefill.sequences:
                self._drop(sequence, prefill, self.scheduler.prefills.remove, blank=sequence.steered)
                return
        batch = self.batches.batch_of(sequence)
        if batch is None:
            return
        if leaves.keep:
            self._keep(batch, batch.sequences.index(sequence))
        self._drop(sequence, batch, self.batches.remove, blank=leaves.blank or sequence.steered)

    def _drop(self, sequence: Sequence, group: Group, remove: Callable[[Group], None], *, blank: bool = False) -> None:
        """Take a sequence out of a batch or a prefill.

        Args:
            remove: takes the whole of it away.
        """
        others = [other for other in group.sequences if other is not sequence]
        if not others:
            remove(group)
            return
        try:
            group.drop(sequence, blank=blank)
        except Exception as error:
            remove(group)
            self.recovery.isolate([other for other in others if other.active], error)

    def _keep(self, batch: Batch, index: int, logits: Tensor | None = None) -> None:
        self.reuse.keep(batch, index, self.scheduler.spare, logits)
