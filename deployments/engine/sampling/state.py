"""One sequence's sampling state: its parameters, what it has generated, its random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from deployments.core.calls import SamplingParams
from deployments.core.errors import ModelError
from deployments.core.events import FinishReason
from deployments.engine.sampling.bad_words import BadWords
from deployments.engine.sampling.format_rules import FormatRules
from deployments.engine.sampling.penalties import Edits, Penalties


class TokenMask(Protocol):
    """A constraint on a sequence's tokens, such as a grammar. One object per sequence; only `sample_batch` calls it."""

    def mask(self, scores: torch.Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place; `scores` is float32 [vocab]."""

    def advance(self, token_id: int) -> int:
        """Take the token that was chosen, or another one in its place; returns the one taken."""

    @property
    def ends(self) -> FinishReason | None:
        """Why the text ends: `stop` if it is complete, `length` if it was cut short; None if it continues."""


class SequenceSampler:
    """One sequence's parameters and what it has generated so far.

    Args:
        params: the request's sampling parameters.
        prompt_ids: the tokens before the first generated one (of an encoder-decoder, the decoder's).
        eos_ids: the model's terminators.
        vocab_size: width of the logits.
        device: of the logits.
        rules: what the model's format bans or forces.
        processors: transformers LogitsProcessors, called with int64 [1, length] and float32 [1, vocab].
        mask: a constraint on the tokens.
        bad_words: texts never generated.

    Attributes:
        generated: the tokens chosen so far.
        greedy: the likeliest token is taken.
        truncated: some truncation of the distribution is on.
        mask: the constraint; it may be set until the first token is sampled.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        eos_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
        rules: FormatRules | None = None,
        processors: Sequence[Any] = (),
        mask: TokenMask | None = None,
        bad_words: BadWords | None = None,
    ) -> None:
        self.params = params
        self.generated: list[int] = []
        self.greedy = params.temperature <= 0
        self.mask = mask
        self._processors = tuple(processors)
        self._ids = _Ids(prompt_ids, device) if self._processors else None
        self._random = random.Random(params.seed)
        self._drawn = (-1, 0.0, 0)
        self._terminators = np.array(sorted(eos_ids.union(params.stop_token_ids)), dtype=np.int64)
        self._penalties = Penalties(
            prompt_ids,
            vocab_size=vocab_size,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias=params.logit_bias,
        )
        self._bad_words = bad_words
        self._rules = (rules or FormatRules()).after(prompt_ids)
        self._prompt = prompt_ids
        self._disallowed = _disallowed(params.allowed_token_ids, vocab_size, device)
        self._adjusted = bool(
            self._penalties.any
            or self._processors
            or self._disallowed is not None
            or bad_words is not None
            or self._rules.always
        )
        self.truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before the temperature."""
        begun = len(self.generated)
        return (
            self._adjusted or self.mask is not None or begun < self.params.min_tokens or begun < self._rules.beginning
        )

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the raw logits and nothing else is asked."""
        return self.greedy and self.params.logprobs is None and not self.adjusts

    def chance(self) -> tuple[float, int]:
        """The random numbers of the next token, one in [0, 1) and one of 63 bits; the same if asked again."""
        place, uniform, key = self._drawn
        if place != len(self.generated):
            uniform, key = self._random.random(), self._random.getrandbits(63)
            self._drawn = (len(self.generated), uniform, key)
        return uniform, key

    def edit(self, row: int, edits: Edits) -> None:
        """Contribute this sequence's sparse edits."""
        seen = self._penalties.seen()
        if seen is not None:
            edits.repeat(row, seen, self._penalties.repetition)
        for ids, shifts in self._penalties.shifts():
            edits.shift(row, ids, shifts)
        if self._bad_words is not None:
            edits.ban(row, self._bad_words.banned())
        edits.ban(row, self._rules.banned(self._prompt, self.generated))
        if len(self.generated) < self.params.min_tokens:
            edits.ban(row, self._terminators)

    def process(self, scores: torch.Tensor) -> None:
        """Apply the loader's processors in place; `scores` is float32 [vocab]."""
        if self._ids is None:
            return
        processed = scores[None]
        for processor in self._processors:
            processed = processor(self._ids.all, processed)
        if processed.shape != (1, len(scores)):
            raise ModelError(
                f"A logits processor returned shape {tuple(processed.shape)}; expected (1, {len(scores)})."
            )
        scores.copy_(processed[0])

    def forbid(self, scores: torch.Tensor) -> None:
        """Apply the masks in place; `scores` is float32 [vocab]."""
        forced = self._rules.forced(len(self.generated))
        if forced is not None:
            kept = scores[forced].clone()
            scores.fill_(float("-inf"))
            scores[forced] = kept
        if self._disallowed is not None:
            scores.masked_fill_(self._disallowed, float("-inf"))
        if self.mask is not None:
            self.mask.mask(scores)

    @property
    def dense(self) -> bool:
        """Whether `process` or `forbid` does anything."""
        return (
            self._ids is not None
            or self._disallowed is not None
            or self.mask is not None
            or self._rules.forced(len(self.generated)) is not None
        )

    def advance(self, token_id: int) -> None:
        """Add the chosen token."""
        self.generated.append(token_id)
        if self._penalties.any:
            self._penalties.add(token_id)
        if self._bad_words is not None:
            self._bad_words.add(token_id)
        if self._ids is not None:
            self._ids.append(token_id)


class _Ids:
    """A sequence's token ids as a tensor that grows without being copied at every token."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self._buffer = torch.empty(1, len(ids) + 256, dtype=torch.long, device=device)
        self._buffer[0, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        self._length = len(ids)

    @property
    def all(self) -> torch.Tensor:
        """int64 [1, length]."""
        return self._buffer[:, : self._length]

    def append(self, token_id: int) -> None:
        if self._length == self._buffer.shape[1]:
            self._buffer = torch.cat((self._buffer, torch.empty_like(self._buffer)), dim=1)
        self._buffer[0, self._length] = token_id
        self._length += 1


def _disallowed(allowed: Sequence[int] | None, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    if allowed is None:
        return None
    ids = np.fromiter(allowed, dtype=np.int64)
    mask = np.ones(vocab_size, dtype=np.bool_)
    mask[ids[(ids >= 0) & (ids < vocab_size)]] = False
    return torch.from_numpy(mask).to(device)
