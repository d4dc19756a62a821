"""The model's own `generate`, with our sampling and our output inside it.

`generate` keeps what is particular to a model: caches and states, encoders, image tensors, position ids. A logits
processor at the end of its list chooses each row's token by the row's own parameters, and leaves `generate` nothing
but an argmax over that one token; a stopping criterion ends the rows that are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from deployments.engine.admission import left_padded
from deployments.engine.job import Job
from deployments.engine.neutral import neutral_view
from deployments.engine.row_sampler import RowSampler
from deployments.engine.sampling import sample_rows

_NEVER = 1 << 40


class StockGenerate:
    """Runs jobs through `model.generate`, several at once where left padding does not change their logits.

    Args:
        model: a transformers model with `generate`.
    """

    def __init__(self, model: Any) -> None:
        self._model = neutral_view(model, _NEVER)
        self._encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._pad = int(self._model.generation_config.pad_token_id)
        self.device = next(iter(model.parameters())).device

    def run(self, jobs: Sequence[Job]) -> None:
        """Generate until every job is done. A job that was begun before goes on where it was."""
        ids, mask = left_padded([self._context(job) for job in jobs], self._pad)
        samplers = [_sampler(job) for job in jobs]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
        if len(jobs) == 1:
            inputs.update({key: self._moved(value) for key, value in jobs[0].request.model_inputs.items()})
        if self._encoder_decoder and samplers[0].generated:
            start = self._model.generation_config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.tensor([[start, *samplers[0].generated]], device=self.device)
        bridge = _Bridge(jobs, samplers)
        left = max(
            (job.request.sampling.max_tokens or 1) - len(s.generated) for job, s in zip(jobs, samplers, strict=True)
        )
        with torch.inference_mode():
            self._model.generate(
                **inputs,
                max_new_tokens=max(1, left),
                logits_processor=LogitsProcessorList([bridge]),
                stopping_criteria=StoppingCriteriaList([_Stop(jobs)]),
            )
        for job in jobs:
            job.finish("length")

    def prompt_ids(self, job_ids: Sequence[int]) -> list[int]:
        """The tokens before the first generated one."""
        if self._encoder_decoder:
            return [int(self._model.generation_config.decoder_start_token_id or 0)]
        return list(job_ids)

    def _context(self, job: Job) -> list[int]:
        generated = [] if self._encoder_decoder else _sampler(job).generated
        return [*job.request.input_ids, *generated]

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        dtype = self._model.dtype if value.is_floating_point() else value.dtype
        return value.to(device=self.device, dtype=dtype)


class _Bridge(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token of every job and lets no other through."""

    def __init__(self, jobs: Sequence[Job], samplers: Sequence[RowSampler]) -> None:
        self._jobs = jobs
        self._samplers = samplers

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        active = [i for i, job in enumerate(self._jobs) if job.active]
        tokens = [0] * len(self._jobs)
        if active:
            logits = scores if len(active) == len(self._jobs) else scores[active]
            for i, sampled in zip(active, sample_rows(logits, [self._samplers[i] for i in active]), strict=True):
                tokens[i] = max(sampled.token_id, 0)
                self._jobs[i].take(sampled)
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose jobs are done or cancelled."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([not job.active for job in self._jobs], device=input_ids.device)


def _sampler(job: Job) -> RowSampler:
    if job.sampler is None:
        raise RuntimeError("A job of StockGenerate needs a sampler.")
    return job.sampler
