"""Beam search by the model's own `generate`. It knows its text only at the end, so nothing streams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ModelError, UnsupportedParameter
from deployments.engine.generate.call import NEVER, GenerateCall
from deployments.engine.generate.job import Job
from deployments.engine.sampling.sample import Sampled
from deployments.engine.text.vocabulary import Vocabulary

_HONORED = frozenset(
    {
        "max_tokens",
        "min_tokens",
        "temperature",
        "repetition_penalty",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "seed",
        "skip_special_tokens",
        "num_beams",
        "beam_rank",
        "length_penalty",
        "early_stopping",
        "prompt_logprobs",
    }
)
_MOST = 64


def check_beams(params: SamplingParams) -> None:
    """Refuse what beam search cannot honor; it is deterministic, so a seed changes nothing.

    Raises:
        BadRequest: more beams than the engine runs.
        UnsupportedParameter: a setting of sampling together with beams.
    """
    if not 1 <= params.num_beams <= _MOST:
        raise BadRequest(f"num_beams={params.num_beams} is out of range; give 1 to {_MOST}.", param="num_beams")
    if params.temperature not in (0.0, 1.0):
        raise UnsupportedParameter(
            f"Beam search does not sample: temperature={params.temperature} cannot be honored; leave it "
            "out, or search without beams.",
            param="temperature",
        )
    for name, value in params.given().items():
        if name not in _HONORED:
            raise UnsupportedParameter(
                f"Beam search cannot honor {name}={value!r}; leave it out, or search without beams.", param=name
            )


@dataclass(frozen=True, slots=True)
class _Search:
    """What the texts of a search depend on."""

    input_ids: tuple[int, ...]
    content_key: str | None
    adapter: str
    params: SamplingParams
    opaque: bool

    @classmethod
    def from_job(cls, job: Job) -> _Search:
        request = job.request
        params = replace(request.sampling, beam_rank=0, seed=None, prompt_logprobs=None)
        return cls(
            tuple(request.input_ids),
            request.content_key,
            request.adapter,
            params,
            bool(request.model_inputs) and request.content_key is None,
        )


class BeamSearch:
    """Runs jobs through beam search, one at a time. The texts of one search answer jobs that differ in rank alone.

    Args:
        call: of the model.
        vocabulary: of the model.
        width: of its logits.
    """

    def __init__(self, call: GenerateCall, vocabulary: Vocabulary, width: int) -> None:
        self._call = call
        self._rules = vocabulary.format_rules(width).for_generate()
        self._eos_ids = vocabulary.eos_ids
        self._last: tuple[_Search, list[list[int]]] | None = None
        self._encoder_decoder = bool(getattr(call.view.config, "is_encoder_decoder", False))

    def run(self, job: Job, inputs: dict[str, Any]) -> None:
        """Search one job's text, or take it from the search before.

        Args:
            inputs: the prompt's tensors, batch dimension 1.
        """
        search = _Search.from_job(job)
        if self._last is None or self._last[0] != search or search.opaque:
            found = self._search(job, inputs)
            self._last = (search, found) if job.active else None
        else:
            found = self._last[1]
        for token_id in found[job.request.sampling.beam_rank]:
            job.take(Sampled(token_id))
        job.finish("length")

    def _search(self, job: Job, inputs: dict[str, Any]) -> list[list[int]]:
        """The texts found, the best one first."""
        params = job.request.sampling
        ends = set(params.stop_token_ids) | (set() if params.ignore_eos else self._eos_ids)
        check = _Check(job)
        with torch.inference_mode():
            found = self._call(
                **inputs,
                num_beams=params.num_beams,
                num_return_sequences=params.num_beams,
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                max_new_tokens=params.max_tokens or 1,
                min_new_tokens=params.min_tokens or None,
                repetition_penalty=params.repetition_penalty,
                eos_token_id=sorted(ends) or NEVER,
                logits_processor=LogitsProcessorList([check]),
                stopping_criteria=StoppingCriteriaList([_Stop(job)]),
                **self._rules,
            )
        if check.poisoned:
            raise ModelError("The model's logits are not finite numbers (NaN or infinity) for this input.")
        if self._encoder_decoder:
            begun = inputs["decoder_input_ids"].shape[1] if "decoder_input_ids" in inputs else 1
        else:
            begun = inputs["input_ids"].shape[1]
        texts: list[list[int]] = found[:, begun:].tolist()
        return texts


class _Check(LogitsProcessor):  # type: ignore[misc]
    """Records logits that are not numbers: beam search would continue with them."""

    def __init__(self, job: Job) -> None:
        self.poisoned = False
        self._job = job

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if bool(scores.isnan().any()):
            self.poisoned = True
            return torch.zeros_like(scores)
        return scores


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), not self._job.active, device=input_ids.device)
