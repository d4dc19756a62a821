"""What one batch of CTranslate2 is decoded with: the same for all of its rows, so requests that differ wait apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, UnsupportedParameter

_EXTRA: Mapping[str, type] = {
    "no_repeat_ngram_size": int,
    "length_penalty": float,
    "patience": float,
    "disable_unk": bool,
}
_DEFAULTS = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Decoding options of a batch.

    Attributes:
        end_ids: terminators; empty, a row runs to its `max_tokens`.
        max_tokens: of a beam search, which knows no single rows; else None.
        logits: those of every step are wanted.
        lengths: rows whose prompts fall into one class may be computed together.
        extra: further options of the library, by name.
    """

    beam_size: int
    topk: int
    topp: float
    temperature: float
    repetition_penalty: float
    min_tokens: int
    end_ids: tuple[int, ...]
    max_tokens: int | None
    logits: bool
    lengths: int
    extra: tuple[tuple[str, Any], ...]

    @classmethod
    def from_params(cls, params: SamplingParams, eos_ids: frozenset[int], vocab: int, lengths: int) -> Settings:
        """The settings a request asks for.

        Args:
            params: of the request.
            eos_ids: the model's terminators.
            vocab: how many tokens it chooses from.
            lengths: the class of the prompt's length.

        Raises:
            BadRequest: an option of the library that it does not have, or of the wrong type.
            UnsupportedParameter: parameters that cannot be had together.
        """
        _refuse_combinations(params)
        greedy = params.temperature <= 0 or params.top_p <= 0
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        return cls(
            beam_size=params.num_beams,
            topk=1 if greedy else min(params.top_k, vocab),
            topp=1.0 if greedy else params.top_p,
            temperature=1.0 if greedy else params.temperature,
            repetition_penalty=params.repetition_penalty,
            min_tokens=params.min_tokens,
            end_ids=tuple(sorted(ends)),
            max_tokens=params.max_tokens if params.num_beams > 1 else None,
            logits=params.logprobs is not None,
            lengths=lengths,
            extra=_extra(params.extra),
        )

    def options(self) -> dict[str, Any]:
        """Arguments that `generate_batch` and `translate_batch` have in common."""
        return {
            "beam_size": self.beam_size,
            "sampling_topk": self.topk,
            "sampling_topp": self.topp,
            "sampling_temperature": self.temperature,
            "repetition_penalty": self.repetition_penalty,
            "end_token": list(self.end_ids),
            "return_end_token": True,
            "return_logits_vocab": self.logits,
            "max_batch_size": 0,
            **dict(self.extra),
        }


def _refuse_combinations(params: SamplingParams) -> None:
    if params.seed is not None and params.temperature > 0:
        raise UnsupportedParameter(
            "CTranslate2 draws random numbers without a seed per request; leave seed out, or set temperature to 0.",
            param="seed",
        )
    if params.logprobs is None:
        return
    names = ("repetition_penalty", "min_tokens", "num_beams", "extra")
    changed = [name for name in names if getattr(params, name) != getattr(_DEFAULTS, name)]
    if changed:
        raise UnsupportedParameter(
            f"CTranslate2 gives no log-probabilities of the model itself beside {changed[0]!r}; leave one of them out.",
            param="logprobs",
        )


def _extra(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    for name, value in given.items():
        kind = _EXTRA.get(name)
        if kind is None:
            raise BadRequest(
                f"Invalid 'generate_kwargs': CTranslate2 has no {name!r} here; it has {', '.join(_EXTRA)}.",
                param="generate_kwargs",
            )
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (kind is not bool and isinstance(value, bool)):
            raise BadRequest(
                f"Invalid 'generate_kwargs': {name} is {value!r}; expected a value of type {kind.__name__}.",
                param="generate_kwargs",
            )
    return tuple(sorted(given.items()))
