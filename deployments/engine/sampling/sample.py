"""Choosing the next token of every sequence of a step, each sequence by its own parameters.

`sample_batch` takes the logits of all sequences at once. A sequence's token depends on its own logits, parameters and
random numbers only: the random numbers come from a host-side generator per sequence (two numbers per token), so that a
seed gives the same text whatever the other sequences and the device.

The order is transformers': repetition, presence and frequency penalties and biases; the loader's LogitsProcessors;
bans (bad words, terminators before min_tokens, tokens not allowed, the grammar); temperature, top_k, top_p, min_p,
typical_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ModelError, NotFinite, TroupeError
from deployments.core.events import FinishReason
from deployments.engine.base.failures import as_error
from deployments.engine.sampling.logprobs import TokenScore, token_scores
from deployments.engine.sampling.penalties import Edits
from deployments.engine.sampling.state import SequenceSampler
from deployments.engine.sampling.truncation import Kept, Truncation, draw_untruncated, truncate


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of a sequence.

    Attributes:
        token_id: the token; -1 with an error.
        score: its log-probabilities, where the sequence asks for them.
        error: why this sequence alone has failed.
        ends: why the sequence's TokenMask admits nothing after this token.
    """

    token_id: int
    score: TokenScore | None = None
    error: TroupeError | None = None
    ends: FinishReason | None = None


def sample_batch(logits: torch.Tensor, samplers: Sequence[SequenceSampler]) -> list[Sampled]:
    """Choose the next token of every sequence and advance the sequences.

    Args:
        logits: [rows, vocab], any float dtype; not changed.
        samplers: the state of each sequence.

    Returns:
        One `Sampled` per sequence. A sequence whose logits are NaN or infinite, or whose processor or mask raises, has
        an `error` and is not advanced; the others are not affected.
    """
    tops, best = logits.max(dim=-1)
    # In one piece: the host waits for the device each time. A token id is exact as a float64.
    peaks, found = torch.stack((tops.double(), best.double())).tolist()
    tokens = [int(token_id) for token_id in found]
    errors: dict[int, TroupeError] = {
        i: NotFinite("The model's logits are not finite numbers (NaN or infinity) for this input.")
        for i, peak in enumerate(peaks)
        if not float("-inf") < peak < float("inf")
    }
    others = [i for i, sampler in enumerate(samplers) if not sampler.plain and i not in errors]
    scores: dict[int, TokenScore] = {}
    if others:
        step = _Step(logits, others, [samplers[i] for i in others])
        step.adjust()
        step.choose()
        step.settle()
        step.score()
        for place, i in enumerate(others):
            tokens[i] = step.tokens[place]
        errors.update({others[place]: error for place, error in step.errors.items()})
        scores.update({others[place]: score for place, score in step.scores.items()})
    sampled = []
    for i, sampler in enumerate(samplers):
        if i in errors:
            sampled.append(Sampled(-1, error=errors[i]))
            continue
        sampler.advance(tokens[i])
        sampled.append(Sampled(tokens[i], scores.get(i), ends=sampler.mask.ends if sampler.mask is not None else None))
    return sampled


class _Step:
    """One step of the sequences that are more than an argmax.

    Attributes:
        raw: float32 [rows, vocab], the model's logits.
        adjusted: the same after penalties, processors and bans; `raw` itself where no sequence changes anything.
        tokens, errors, scores: the outcome, by place among these sequences.
    """

    def __init__(self, logits: torch.Tensor, index: Sequence[int], samplers: Sequence[SequenceSampler]) -> None:
        self.samplers = samplers
        self.raw = (logits if len(index) == len(logits) else logits[list(index)]).float()
        self.adjusted = self.raw
        self.tokens: list[int] = []
        self.errors: dict[int, TroupeError] = {}
        self.scores: dict[int, TokenScore] = {}
        self._kept: list[tuple[list[int], Kept]] = []
        self._cut: list[tuple[list[int], torch.Tensor]] = []

    def adjust(self) -> None:
        """Penalties, processors, bans."""
        changing = [i for i, sampler in enumerate(self.samplers) if sampler.adjusts]
        if not changing:
            return
        self.adjusted = self.raw.clone(memory_format=torch.contiguous_format)
        edits = Edits(self.raw.shape[1])
        for i in changing:
            self.samplers[i].edit(i, edits)
        edits.weigh(self.adjusted)
        for i in changing:
            self._guarded(i, self.samplers[i].process)
        edits.forbid(self.adjusted)
        for i in changing:
            self._guarded(i, self.samplers[i].forbid)
        peaks = self.adjusted.amax(-1).tolist()
        for i in changing:
            if i not in self.errors and not float("-inf") < peaks[i] < float("inf"):
                self.errors[i] = _dead_end(peaks[i], self.samplers[i].params)
        for i in self.errors:
            self.adjusted[i] = 0.0

    def _guarded(self, i: int, change: Any) -> None:
        if not self.samplers[i].dense or i in self.errors:
            return
        try:
            change(self.adjusted[i])
        except Exception as error:
            self.errors[i] = as_error(error, failed="A logits processor failed")

    def choose(self) -> None:
        """Draw a token, or take the most likely one."""
        greedy = [i for i, sampler in enumerate(self.samplers) if sampler.greedy]
        drawn: list[tuple[Sequence[int], torch.Tensor]] = []
        if greedy:
            drawn.append((greedy, self._subset(greedy).argmax(-1)))
        drawing = [i for i, sampler in enumerate(self.samplers) if not sampler.greedy and i not in self.errors]
        free = [i for i in drawing if not self.samplers[i].truncated]
        cut = [i for i in drawing if self.samplers[i].truncated]
        if free:
            temperature = self._column([self.samplers[i].params.temperature for i in free])
            drawn.append((free, draw_untruncated(self._subset(free), temperature, *self._chance(free))))
        if cut:
            drawn += self._draw_truncated(cut)
        self.tokens = [0] * len(self.samplers)
        if drawn:
            places = [place for group, _ in drawn for place in group]
            for place, token_id in zip(places, torch.cat([ids for _, ids in drawn]).tolist(), strict=True):
                self.tokens[place] = token_id

    def _draw_truncated(self, places: Sequence[int]) -> list[tuple[Sequence[int], torch.Tensor]]:
        """Tokens of the sequences whose distributions are truncated, in groups of places."""
        drawn: list[tuple[Sequence[int], torch.Tensor]] = []
        truncation = Truncation.from_params([self.samplers[i].params for i in places], self.raw.device)
        settled, kept, unsettled, masked = truncate(self._subset(places), truncation)
        if settled:
            group = [places[i] for i in settled]
            drawn.append((group, kept.draw(self._chance(group)[1])))
            self._kept.append((group, kept))
        if unsettled:
            group = [places[i] for i in unsettled]
            drawn.append((group, draw_untruncated(masked, truncation.temperature[unsettled], *self._chance(group))))
            self._cut.append((group, masked))
        return drawn

    def settle(self) -> None:
        """Let the masks take the tokens, or replace them."""
        for i, sampler in enumerate(self.samplers):
            if sampler.mask is None or i in self.errors:
                continue
            try:
                self.tokens[i] = sampler.mask.advance(self.tokens[i])
            except Exception as error:
                self.errors[i] = as_error(error, failed="A logits processor failed")

    def score(self) -> None:
        """Log-probabilities for the sequences that report them."""
        asking = [i for i, s in enumerate(self.samplers) if s.params.logprobs is not None and i not in self.errors]
        raw = [i for i in asking if not self.samplers[i].params.processed_logprobs]
        processed = [i for i in asking if self.samplers[i].params.processed_logprobs]
        if raw:
            self._score(raw, self.raw if len(raw) == len(self.raw) else self.raw[raw])
        if processed:
            self._score(processed, self._processed(processed))

    def _score(self, places: Sequence[int], logits: torch.Tensor) -> None:
        tokens = torch.tensor([self.tokens[i] for i in places], device=logits.device)
        tops = [self.samplers[i].params.logprobs or 0 for i in places]
        named = {
            row: self.samplers[i].params.logprob_token_ids
            for row, i in enumerate(places)
            if self.samplers[i].params.logprob_token_ids
        }
        self.scores.update(zip(places, token_scores(logits, tokens, tops, named), strict=True))

    def _processed(self, places: Sequence[int]) -> torch.Tensor:
        """Logits of the distribution sampled from: after the temperature (1 where greedy) and the truncations."""
        scores = self.adjusted[list(places)]
        row_of = {place: row for row, place in enumerate(places)}
        for group, kept in self._kept:
            for g, place in enumerate(group):
                if place in row_of:
                    allowed = torch.zeros_like(scores[0], dtype=torch.bool)
                    allowed[kept.ids[g]] = kept.weights[g] > 0
                    scores[row_of[place]].masked_fill_(~allowed, float("-inf"))
        for group, masked in self._cut:
            for g, place in enumerate(group):
                if place in row_of:
                    scores[row_of[place]] = masked[g]
        return scores / self._column([self.samplers[i].params.temperature or 1.0 for i in places])[:, None]

    def _subset(self, places: Sequence[int]) -> torch.Tensor:
        return self.adjusted if len(places) == len(self.adjusted) else self.adjusted[list(places)]

    def _chance(self, places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = [self.samplers[i].chance() for i in places]
        keys = torch.tensor([key for _, key in numbers]).to(self.raw.device, non_blocking=True)
        return self._column([uniform for uniform, _ in numbers], torch.float64), keys

    def _column(self, values: Sequence[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(self.raw.device, non_blocking=True)


def _dead_end(peak: float, params: SamplingParams) -> TroupeError:
    if peak == float("-inf"):
        asked = {
            "allowed_token_ids": params.allowed_token_ids,
            "bad_words": params.bad_words,
            "min_tokens": params.min_tokens,
            params.grammar.param if params.grammar is not None else "response_format": params.grammar,
        }
        names = [name for name, value in asked.items() if value]
        return BadRequest(
            f"No token is left to choose: {' and '.join(names) or 'the model'} excludes all of them.",
            param=names[0] if names else None,
        )
    if params.repetition_penalty != 1:
        return BadRequest(
            f"Invalid 'repetition_penalty': {params.repetition_penalty:g} makes logits infinite; take one nearer to 1.",
            param="repetition_penalty",
        )
    return ModelError("A logits processor or bias made the logits NaN or infinite.")
