"""The model's own `generate`, with our sampling and our output inside it.

`generate` keeps what is particular to a model: caches and states, encoders, image tensors, position ids. A logits
processor at the end of its list chooses each row's token by the row's own parameters, and leaves `generate` nothing
but an argmax over that one token; a stopping criterion ends the rows that are done.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers import (
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from deployments.engine.admission import vocab_size
from deployments.engine.fresh_state import fresh_state
from deployments.engine.job import Job
from deployments.engine.neutral import neutral_view
from deployments.engine.protocol import EngineRequest
from deployments.engine.row_sampler import RowSampler
from deployments.engine.sampling import sample_rows
from deployments.engine.scoring import PromptScorer
from deployments.engine.vocabulary import Vocabulary
from deployments.errors import ModelLoadFailed

# An id beyond every vocabulary: the engine alone ends a text.
_NEVER = 1 << 40
_SCORED_FLOATS = 1 << 28
_SAFE_IDS = 100
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


class StockGenerate:
    """Runs jobs through `model.generate`, several at once where padding does not change their logits.

    The modules' state is the one after loading whenever a run begins: nothing of an earlier one reaches it.

    Args:
        model: a transformers model with `generate`.
        vocabulary: of the model.
        static_cache: keep the KV cache at its full length from the start.

    Attributes:
        device: of the model's inputs.
        encoder_decoder: whether the prompt goes to an encoder.
        width: of the logits.

    Raises:
        ModelLoadFailed: the model cannot generate.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, *, static_cache: bool = False) -> None:
        fresh_state(model).reset()
        self._model = neutral_view(model, _NEVER)
        self._fresh = fresh_state(self._model)
        if static_cache:
            self._model.generation_config.cache_implementation = "static"
        self._vocabulary = vocabulary
        self._forward = set(inspect.signature(model.forward).parameters)
        self._main_input = str(model.main_input_name)
        self._pad = int(self._model.generation_config.pad_token_id)
        self.device = _device(model)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        ids = ordinary_ids(model, vocabulary, 16)
        self._prompts = [ids[:2], ids[2:7], ids[7:16]]
        self.width = self._measured_width()

    def run(self, jobs: Sequence[Job], regroup: Callable[[int], bool]) -> None:
        """Generate until every job has ended, or until `regroup` calls for a new choice of jobs.

        A job that was begun before goes on where it was.

        Args:
            jobs: more than one only where all are text alone.
            regroup: told how many jobs are still active, at every step.
        """
        self._fresh.reset()
        samplers = [_sampler(job) for job in jobs]
        bridge = _Bridge(jobs, samplers)
        left = max((s.params.max_tokens or 1) - len(s.generated) for s in samplers)
        stop = _Stop(jobs, regroup)
        with torch.inference_mode():
            self.call(
                **self._batch(jobs),
                max_new_tokens=max(1, left),
                logits_processor=LogitsProcessorList([bridge]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        if not stop.regrouping:
            for job in jobs:
                job.finish("length")

    def call(self, **kwargs: Any) -> Any:
        """The model's `generate`; transformers' plain one for a model such as Whisper, whose own splits and retries."""
        if "decoder_input_ids" in kwargs and self._main_input in kwargs and self._main_input != "input_ids":
            return GenerationMixin.generate(self._model, **kwargs)
        return self._model.generate(**kwargs)

    def prompt_ids(self, request: EngineRequest) -> list[int]:
        """The tokens before the first generated one: those of the decoder."""
        if not self.encoder_decoder or self._main_input in request.model_inputs:
            return list(request.input_ids)
        config = self._model.generation_config
        start = config.decoder_start_token_id if config.decoder_start_token_id is not None else config.bos_token_id
        return [int(start or 0)]

    def inputs(self, job: Job) -> dict[str, Any]:
        """The tensors of one prompt."""
        return self._batch([job], resume=False)

    def _batch(self, jobs: Sequence[Job], *, resume: bool = True) -> dict[str, Any]:
        """The tensors of several prompts, and with `resume` of what was generated already."""
        begun = [_sampler(job).generated if resume else [] for job in jobs]
        if not self.encoder_decoder:
            ids = [[*job.request.input_ids, *done] for job, done in zip(jobs, begun, strict=True)]
            return {**self._media(jobs), **self._padded(ids)}
        heard = self._main_input in jobs[0].request.model_inputs
        inputs = self._media(jobs)
        if not heard:
            inputs.update(self._padded([job.request.input_ids for job in jobs]))
        if heard or any(begun):
            # Jobs share a decoder only when they have come equally far: it has no padding.
            ids = [[*self.prompt_ids(job.request), *done] for job, done in zip(jobs, begun, strict=True)]
            inputs["decoder_input_ids"] = torch.tensor(ids, device=self.device)
        return inputs

    def score_prompt(self, job: Job) -> None:
        """Compute and give out the log-probabilities of a prompt's own tokens."""
        self._fresh.reset()
        ids = job.request.input_ids
        params = job.request.sampling
        scorer = PromptScorer(self._vocabulary, ids, params.prompt_logprobs or 0, params.logprob_token_ids)
        inputs = self.inputs(job)
        step = len(ids) if "logits_to_keep" not in self._forward else max(1, _SCORED_FLOATS // self.width)
        with torch.inference_mode():
            for start in range(0, len(ids), step):
                if step < len(ids):
                    kept = torch.arange(start, min(start + step, len(ids)), device=self.device)
                    inputs["logits_to_keep"] = kept
                logits = self._model(**inputs, use_cache=False).logits[0]
                scorer.feed(logits[-len(ids) :], start)
        job.give(scorer.scores())

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Ids and mask, padded on the side where a model of this kind is trained to be padded."""
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self._pad, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(0, len(row)) if self.encoder_decoder else slice(width - len(row), width)
            ids[i, place], mask[i, place] = torch.tensor(list(row), dtype=torch.long), 1
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    def _media(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The encoder's other tensors of a job that is alone, in the model's dtype and on its device."""
        if len(jobs) > 1:
            return {}
        return {
            key: value.to(device=self.device, dtype=self._model.dtype if value.is_floating_point() else value.dtype)
            for key, value in jobs[0].request.model_inputs.items()
        }

    def _measured_width(self) -> int:
        """The width of the logits, from a run, or from the model's head where it needs more than text to run."""
        try:
            return self._probe_logits(self._prompts[:1]).shape[-1]
        except Exception as error:
            head = getattr(self._model.get_output_embeddings(), "weight", None)
            if head is None:
                raise ModelLoadFailed(f"The model cannot generate: {type(error).__name__}: {error}") from error
            return int(head.shape[0])

    @cached_property
    def batches(self) -> bool:
        """Whether prompts of several lengths give the same logits together as alone, as a probe finds."""
        try:
            together = self._probe_logits(self._prompts)
            alone = torch.cat([self._probe_logits([prompt]) for prompt in self._prompts], dim=1)
        except Exception:
            return False
        scale = max(1.0, float(alone[alone.isfinite()].abs().max()))
        tolerance = _TOLERANCE.get(self._model.dtype, 1e-3) * scale
        return bool(torch.isclose(together, alone, rtol=0, atol=tolerance).all())

    def _probe_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits of three steps in which every row is given the same tokens; float32 [steps, rows, vocab]."""
        self._fresh.reset()
        probe = _Probe(self._pad)
        with torch.inference_mode():
            self._model.generate(
                **self._padded(prompts), max_new_tokens=3, logits_processor=LogitsProcessorList([probe])
            )
        return torch.stack(probe.seen)


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
        return _only(scores, tokens)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the rows whose jobs have ended; all of them when other jobs should be run instead."""

    def __init__(self, jobs: Sequence[Job], regroup: Callable[[int], bool]) -> None:
        self._jobs = jobs
        self._regroup = regroup
        self.regrouping = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = [not job.active for job in self._jobs]
        if not all(ended):
            self.regrouping = self.regrouping or self._regroup(ended.count(False))
        return torch.tensor([e or self.regrouping for e in ended], device=input_ids.device)


class _Probe(LogitsProcessor):  # type: ignore[misc]
    """Notes the logits and gives every row the same next token."""

    def __init__(self, avoided: int) -> None:
        self.seen: list[torch.Tensor] = []
        self._avoided = avoided

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(scores.float().clone())
        token_id = 5 + len(self.seen) + (5 + len(self.seen) == self._avoided)
        return _only(scores, [token_id % scores.shape[1]] * len(scores))


def _only(scores: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Scores under which each row can only choose its token."""
    forced = torch.full_like(scores, float("-inf"))
    return forced.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


def ordinary_ids(model: Any, vocabulary: Vocabulary, count: int) -> list[int]:
    """Arbitrary token ids that are no special tokens and no placeholders of the model's config."""
    size = min(len(vocabulary) or _SAFE_IDS, vocab_size(model) or _SAFE_IDS)
    avoided = set(vocabulary.special_ids | vocabulary.eos_ids)
    for key, value in model.config.to_dict().items():
        if key.endswith(("_token_id", "_token_index")):
            avoided.update(value if isinstance(value, list) else [value])
    return random.Random(0).choices([i for i in range(size) if i not in avoided] or [0], k=count)


def _sampler(job: Job) -> RowSampler:
    if job.sampler is None:
        raise RuntimeError("A job of StockGenerate needs a sampler.")
    return job.sampler


def _device(model: Any) -> torch.device:
    parameter = next(iter(model.parameters()), None)
    return parameter.device if parameter is not None else torch.device("cpu")
