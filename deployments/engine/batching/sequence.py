"""A request while it is being computed, and the batches that requests decode in."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from deployments.core.errors import BadRequest, NotFinite
from deployments.core.events import Delta, EngineEvent, Recorded
from deployments.engine.cache.cache import AnyCache
from deployments.engine.inside.inspected import Inspected, digest
from deployments.engine.model.forward import NO_OFFSET, Offset
from deployments.engine.sampling.sample import Sampled
from deployments.engine.sampling.state import SequenceSampler
from deployments.engine.speedups.draft import Drafter
from deployments.engine.text.prompt_logprobs import PromptScorer
from deployments.engine.text.text_request import TextRequest


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence(TextRequest):
    """A request that is batched.

    Attributes:
        ids: prompt and generated tokens (the decoder's, for an encoder-decoder model).
        prompt_length: of `ids`, how many are the prompt.
        frequencies: the rotary frequencies of its keys; see `SequenceRotary.frequencies`.
        media_end: tokens up to here mean nothing without the request's `model_inputs`.
        scorer: scores the prompt's tokens, if the request asks for it.
        encoded_length: tokens its encoder sees.
        offset: from a token's index to its position.
        isolated: it is computed by itself, after a forward that it may have broken.
        attempts: forwards of this sequence that failed since the last decode step that did not.
        order: its priority, and its number in the order of arrival; of those that run, the last one pauses first.
        yields: its prompt is computed in short chunks, so that more urgent ones begin soon.
        drafter: drafts its next tokens, once that was tried.
        to_go: tokens to be computed of it while it waits, and the version of the prefix store that this follows from.
        awaits: a sequence being prefilled that will have most of what it lacks.
        stops: lengths at which its cache is kept while its prompt is computed.
        group: only sequences of the same group are computed in one forward; see `AdapterTable.group`.
        inspected: what is captured or changed inside the model; None for most sequences.
    """

    sampler: SequenceSampler
    ids: list[int]
    prompt_length: int
    frequencies: tuple[int, ...] = ()
    media_end: int = 0
    encoded_length: int = 0
    scorer: PromptScorer | None = None
    offset: Offset = NO_OFFSET
    isolated: bool = False
    attempts: int = 0
    order: tuple[int, int] = (0, 0)
    yields: bool = False
    drafter: Drafter | None = None
    to_go: tuple[int, int] | None = None
    awaits: Sequence | None = None
    stops: tuple[int, ...] = ()
    group: str = ""
    inspected: Inspected | None = None

    @property
    def content_key(self) -> tuple[object, ...]:
        """What a sequence's cache follows from beside its tokens."""
        changed = () if self.inspected is None else self.inspected.key
        return (self.request.adapter, self.request.content_key, *self.frequencies, *changed)

    @property
    def steered(self) -> bool:
        """Whether its states are changed, so that its cache may hold values that are not finite."""
        return self.inspected is not None and self.inspected.steered

    @property
    def shared(self) -> int:
        """Of its tokens, how many may be in a cache that other sequences begin with."""
        if self.inspected is None:
            return len(self.ids)
        return 0 if not self.inspected.kept else min(len(self.ids), self.inspected.clean or len(self.ids))

    @property
    def reusable(self) -> int:
        """Of its tokens, how many may come from another cache: none of which is captured."""
        most = None if self.inspected is None else self.inspected.reusable
        return len(self.ids) if most is None else most

    @property
    def scored(self) -> bool:
        """Whether its prefill computes the logits of all tokens: to score its prompt, or to capture them once more."""
        if self.inspected is not None and self.inspected.captures_last and len(self.ids) > self.prompt_length:
            return True
        return self.scorer is not None

    def give(self, event: EngineEvent) -> None:
        """Give out an event; what was captured comes before the last one."""
        inspected = self.inspected
        if inspected is not None and isinstance(event, Delta) and event.finish_reason is not None:
            # The last token of a text is never an input.
            inputs = self.ids[: max(self.prompt_length, len(self.ids) - 1)]
            if (error := inspected.end(inputs, self._facts())) is not None:
                self.fail(error)
                return
            for recording in inspected.recordings:
                self.live.give(Recorded(recording=recording))
        self.live.give(event)

    def _facts(self) -> dict[str, object]:
        """What the file of a capture says of its request."""
        assert self.inspected is not None
        steered = self.inspected.interventions
        return {
            "prompt_tokens": self.prompt_length,
            "completion_tokens": len(self.ids) - self.prompt_length,
            "cached_tokens": self.output.cached_tokens,
            "interventions": digest(steered) if steered else None,
        }

    def judged(self, sampled: Sampled) -> Sampled:
        """The next token, or why an inspected sequence has none."""
        if self.inspected is None:
            return sampled
        if self.inspected.error is not None:
            return Sampled(-1, error=self.inspected.error)
        if self.steered and isinstance(sampled.error, NotFinite):
            return Sampled(-1, error=_not_finite())
        return sampled

    @property
    def final_length(self) -> int:
        """Tokens the sequence may have in the end, the last of which never enters the cache."""
        return self.prompt_length + (self.request.sampling.max_tokens or 1)


def _not_finite() -> BadRequest:
    return BadRequest(
        "The interventions of this request made the model's logits NaN or infinite; lower their scale.",
        param="interventions",
        code="intervention_not_finite",
    )


@dataclass(slots=True, eq=False)
class Batch:
    """Sequences that decode together, in the order of the cache's sequences.

    Every sequence's last token is not in the cache yet: it is the next forward's input.
    """

    cache: AnyCache
    sequences: list[Sequence] = field(default_factory=list)

    def drop(self, sequence: Sequence, *, blank: bool = False) -> None:
        """Let a sequence leave; the last one takes its place."""
        drop_sequence(self.cache, self.sequences, sequence, blank=blank)

    def absorb(self, other: Batch) -> None:
        """Let all sequences of another batch join."""
        self.cache.expect(len(self.sequences) + len(other.sequences), max(self.cache.width, other.cache.width))
        for index in range(len(other.sequences)):
            self.cache.append(other.cache, index)
        self.sequences.extend(other.sequences)


def common_prefix(a: abc.Sequence[int], b: abc.Sequence[int]) -> int:
    """How many tokens two lists begin with in common."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def drop_sequence(cache: AnyCache, sequences: list[Sequence], sequence: Sequence, *, blank: bool = False) -> None:
    """Remove a sequence from a list and from its cache; in both the last one takes its place."""
    index = sequences.index(sequence)
    cache.drop(index, blank=blank)
    last = sequences.pop()
    if last is not sequence:
        sequences[index] = last
