"""Choosing the next token of every row of a step, each row by its own parameters.

`sample_rows` takes the logits of all rows at once. A row's token depends on its own logits, parameters and random
numbers only: the random numbers come from a host-side generator per row (one uniform number per token), so that
a seed gives the same text whatever the neighbours and the device.

The order is transformers': repetition, presence and frequency penalties and biases; the loader's LogitsProcessors;
bans (bad words, terminators before min_tokens, tokens not allowed, the grammar); temperature, top_k, top_p, min_p,
typical_p.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deployments.engine.logprobs import TokenScore, token_scores
from deployments.engine.penalties import Edits, Penalties
from deployments.engine.truncation import Kept, Truncation, draw_untruncated, truncate
from deployments.errors import BadRequest, ModelError, TroupeError
from deployments.messages import FinishReason, SamplingParams


class TokenMask(Protocol):
    """A constraint on a row's tokens, such as a grammar. One object per row; only `sample_rows` calls it."""

    def mask(self, scores: torch.Tensor) -> None:
        """Set the logits of tokens that may not come next to -inf, in place; `scores` is float32 [vocab]."""

    def advance(self, token_id: int) -> int:
        """Take the token that was chosen, or another one in its place; returns the one taken."""

    @property
    def ends(self) -> FinishReason | None:
        """Why nothing may follow: `stop` if the text is complete, `length` if it had to be cut short; else None."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a row.

    Attributes:
        token_id: the token; -1 with an error.
        score: its log-probabilities, where the row asks for them.
        error: why this row alone has failed.
        ends: why the row's TokenMask admits nothing after this token.
    """

    token_id: int
    score: TokenScore | None = None
    error: TroupeError | None = None
    ends: FinishReason | None = None


class RowSampler:
    """One row's parameters and what it has generated so far.

    Args:
        params: the request's sampling parameters.
        prompt_ids: the tokens before the first generated one (of an encoder-decoder, the decoder's).
        eos_ids: the model's terminators.
        vocab_size: width of the logits.
        device: of the logits.
        processors: transformers LogitsProcessors, called with int64 [1, length] and float32 [1, vocab].
        mask: a constraint on the tokens.
        bad_words: token sequences never generated (`Vocabulary.bad_words`).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        eos_ids: frozenset[int],
        vocab_size: int,
        device: torch.device,
        processors: Sequence[Any] = (),
        mask: TokenMask | None = None,
        bad_words: Sequence[Sequence[int]] = (),
    ) -> None:
        self.params = params
        self.generated: list[int] = []
        self.greedy = params.temperature <= 0
        self.mask = mask
        self._processors = tuple(processors)
        self._ids = _Ids(prompt_ids, device) if self._processors else None
        self._random = random.Random(params.seed)
        self._terminators = eos_ids.union(params.stop_token_ids)
        self._penalties = Penalties(
            prompt_ids,
            vocab_size=vocab_size,
            repetition=params.repetition_penalty,
            presence=params.presence_penalty,
            frequency=params.frequency_penalty,
            bias=params.logit_bias,
            bad_words=bad_words,
        )
        self._disallowed = _disallowed(params.allowed_token_ids, vocab_size, device)
        self._adjusted = bool(
            self._penalties.any or self._processors or mask is not None or self._disallowed is not None
        )
        self.truncated = params.top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.typical_p < 1

    @property
    def adjusts(self) -> bool:
        """Whether the logits are changed before the temperature."""
        return self._adjusted or len(self.generated) < self.params.min_tokens

    @property
    def plain(self) -> bool:
        """Whether the next token is the argmax of the raw logits and nothing else is asked."""
        return self.greedy and self.params.logprobs is None and not self.adjusts

    def uniform(self) -> float:
        """The row's next random number in [0, 1)."""
        return self._random.random()

    def edit(self, row: int, edits: Edits) -> None:
        """Contribute this row's sparse edits."""
        seen = self._penalties.seen()
        if seen is not None:
            edits.repeat(row, seen, self._penalties.repetition)
        for ids, shifts in self._penalties.shifts():
            edits.shift(row, ids, shifts)
        edits.ban(row, self._penalties.banned(self.generated))
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
        if self._disallowed is not None:
            scores.masked_fill_(self._disallowed, float("-inf"))
        if self.mask is not None:
            self.mask.mask(scores)

    @property
    def dense(self) -> bool:
        """Whether `process` or `forbid` does anything."""
        return self._ids is not None or self._disallowed is not None or self.mask is not None

    def advance(self, token_id: int) -> None:
        """Take note of the chosen token."""
        self.generated.append(token_id)
        if self._penalties.any:
            self._penalties.add(token_id)
        if self._ids is not None:
            self._ids.append(token_id)


class _Ids:
    """A row's token ids as a tensor that grows without being copied at every token."""

    def __init__(self, ids: Sequence[int], device: torch.device) -> None:
        self._buffer = torch.empty(1, len(ids) + 256, dtype=torch.long, device=device)
        self._buffer[0, : len(ids)] = torch.tensor(list(ids), dtype=torch.long)
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


def sample_rows(logits: torch.Tensor, rows: Sequence[RowSampler]) -> list[Sampled]:
    """Choose the next token of every row and advance the rows.

    Args:
        logits: [rows, vocab], any float dtype; not changed.
        rows: the state of each row.

    Returns:
        One `Sampled` per row. A row whose logits are NaN or infinite, or whose processor or mask raises, has an
        `error` and is not advanced; the others are not affected.
    """
    tops, best = logits.max(dim=-1)
    tokens, peaks = best.tolist(), tops.tolist()
    errors: dict[int, TroupeError] = {
        i: ModelError("The model's logits are not finite numbers (NaN or infinity) for this input.")
        for i, peak in enumerate(peaks)
        if not float("-inf") < peak < float("inf")
    }
    others = [i for i, row in enumerate(rows) if not row.plain and i not in errors]
    scores: dict[int, TokenScore] = {}
    if others:
        step = _Step(logits, others, [rows[i] for i in others])
        step.adjust()
        step.choose()
        step.settle()
        step.score()
        for place, i in enumerate(others):
            tokens[i] = step.tokens[place]
        errors.update({others[place]: error for place, error in step.errors.items()})
        scores.update({others[place]: score for place, score in step.scores.items()})
    sampled = []
    for i, row in enumerate(rows):
        if i in errors:
            sampled.append(Sampled(-1, error=errors[i]))
            continue
        row.advance(tokens[i])
        sampled.append(Sampled(tokens[i], scores.get(i), ends=row.mask.ends if row.mask is not None else None))
    return sampled


class _Step:
    """One step of the rows that are more than an argmax.

    Attributes:
        raw: float32 [rows, vocab], the model's logits.
        adjusted: the same after penalties, processors and bans; `raw` itself where no row changes anything.
        tokens, errors, scores: the outcome, by place among these rows.
    """

    def __init__(self, logits: torch.Tensor, index: Sequence[int], rows: Sequence[RowSampler]) -> None:
        self.rows = rows
        self.raw = (logits if len(index) == len(logits) else logits[list(index)]).float()
        self.adjusted = self.raw
        self.tokens: list[int] = []
        self.errors: dict[int, TroupeError] = {}
        self.scores: dict[int, TokenScore] = {}
        self._kept: list[tuple[list[int], Kept]] = []

    def adjust(self) -> None:
        """Penalties, processors, bans."""
        changing = [i for i, row in enumerate(self.rows) if row.adjusts]
        if not changing:
            return
        self.adjusted = self.raw.clone(memory_format=torch.contiguous_format)
        edits = Edits(self.raw.shape[1])
        for i in changing:
            self.rows[i].edit(i, edits)
        edits.weigh(self.adjusted)
        for i in changing:
            self._guarded(i, self.rows[i].process)
        edits.forbid(self.adjusted)
        for i in changing:
            self._guarded(i, self.rows[i].forbid)
        peaks = self.adjusted.amax(-1).tolist()
        for i in changing:
            if i not in self.errors and not float("-inf") < peaks[i] < float("inf"):
                self.errors[i] = _dead_end(peaks[i])
        for i in self.errors:
            self.adjusted[i] = 0.0

    def _guarded(self, i: int, change: Any) -> None:
        if not self.rows[i].dense or i in self.errors:
            return
        try:
            change(self.adjusted[i])
        except Exception as error:
            self.errors[i] = _as_error(error)

    def choose(self) -> None:
        """Draw or take the likeliest."""
        greedy = [i for i, row in enumerate(self.rows) if row.greedy]
        self.tokens = [0] * len(self.rows)
        if greedy:
            self._place(greedy, self._subset(greedy).argmax(-1))
        drawing = [i for i, row in enumerate(self.rows) if not row.greedy and i not in self.errors]
        free = [i for i in drawing if not self.rows[i].truncated]
        cut = [i for i in drawing if self.rows[i].truncated]
        if free:
            temperature = self._column([self.rows[i].params.temperature for i in free])
            drawn = draw_untruncated(self._subset(free), temperature, self._uniform(free))
            self._place(free, drawn)
        if cut:
            for group, kept in truncate(self._subset(cut), self._truncation(cut)):
                places = [cut[g] for g in group]
                self._place(places, kept.draw(self._uniform(places)))
                self._kept.append((places, kept))

    def settle(self) -> None:
        """Let the masks take the tokens, or replace them."""
        for i, row in enumerate(self.rows):
            if row.mask is None or i in self.errors:
                continue
            try:
                self.tokens[i] = row.mask.advance(self.tokens[i])
            except Exception as error:
                self.errors[i] = _as_error(error)

    def score(self) -> None:
        """Log-probabilities for the rows that report them."""
        asking = [i for i, row in enumerate(self.rows) if row.params.logprobs is not None and i not in self.errors]
        raw = [i for i in asking if not self.rows[i].params.processed_logprobs]
        processed = [i for i in asking if self.rows[i].params.processed_logprobs]
        if raw:
            self._score(raw, self.raw if len(raw) == len(self.raw) else self.raw[raw])
        if processed:
            self._score(processed, self._processed(processed))

    def _score(self, places: Sequence[int], logits: torch.Tensor) -> None:
        tokens = torch.tensor([self.tokens[i] for i in places], device=logits.device)
        tops = [self.rows[i].params.logprobs or 0 for i in places]
        self.scores.update(zip(places, token_scores(logits, tokens, tops), strict=True))

    def _processed(self, places: Sequence[int]) -> torch.Tensor:
        """Logits of the distribution sampled from: after the temperature (1 where greedy) and the truncations."""
        scores = self.adjusted[list(places)]
        scores = scores / self._column([self.rows[i].params.temperature or 1.0 for i in places])[:, None]
        row_of = {place: row for row, place in enumerate(places)}
        for group, kept in self._kept:
            for g, place in enumerate(group):
                if place in row_of:
                    row = scores[row_of[place]]
                    allowed = torch.zeros_like(row, dtype=torch.bool)
                    allowed[kept.ids[g]] = kept.weights[g] > 0
                    row.masked_fill_(~allowed, float("-inf"))
        return scores

    def _subset(self, places: Sequence[int]) -> torch.Tensor:
        return self.adjusted if len(places) == len(self.adjusted) else self.adjusted[list(places)]

    def _uniform(self, places: Sequence[int]) -> torch.Tensor:
        return self._column([self.rows[i].uniform() for i in places], torch.float64)

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.raw.device, non_blocking=True)

    def _truncation(self, places: Sequence[int]) -> Truncation:
        params = [self.rows[i].params for i in places]
        return Truncation.of(params, self.raw.device)

    def _place(self, places: Sequence[int], drawn: torch.Tensor) -> None:
        for i, token_id in zip(places, drawn.tolist(), strict=True):
            self.tokens[i] = token_id


def _disallowed(allowed: Sequence[int] | None, vocab_size: int, device: torch.device) -> torch.Tensor | None:
    if allowed is None:
        return None
    mask = torch.ones(vocab_size, dtype=torch.bool)
    mask[[i for i in allowed if 0 <= i < vocab_size]] = False
    return mask.to(device)


def _dead_end(peak: float) -> TroupeError:
    if peak == float("-inf"):
        return BadRequest(
            "No token is left to choose: bad_words, allowed_token_ids, min_tokens and the grammar exclude all of them."
        )
    return ModelError("A logits processor or bias made the logits NaN or infinite.")


def _as_error(error: Exception) -> TroupeError:
    if isinstance(error, TroupeError):
        return error
    return ModelError(f"A logits processor failed: {type(error).__name__}: {error}")
