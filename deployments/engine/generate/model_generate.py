"""The model's own `generate`, with our sampling and our output inside it.

`generate` keeps what is particular to a model: caches and states, encoders, image tensors, position ids. A logits
processor at the end of its list chooses each sequence's token by the sequence's own parameters, and leaves `generate`
nothing but an argmax over that one token; a stopping criterion ends the sequences that are done.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence, Set
from functools import cached_property
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from deployments.core.errors import ModelError
from deployments.core.events import EngineEvent
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.generate.call import GenerateCall
from deployments.engine.generate.job import Job
from deployments.engine.model.encoder_side import decoder_prompt, decoder_start
from deployments.engine.model.fresh_state import fresh_state
from deployments.engine.sampling.sample import sample_batch
from deployments.engine.sampling.state import SequenceSampler
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.prompt_logprobs import PromptScorer
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.generate_probe import GenerateProbe, only

_SCORED_FLOATS = 1 << 28
_UNLIMITED = 1 << 30


class StockGenerate:
    """Runs jobs through `model.generate`, several at once if padding does not change their logits.

    The modules' state is the one after loading whenever a run begins: nothing of an earlier one reaches it.

    Args:
        model: a transformers model with `generate`.
        vocabulary: of the model.
        static_cache: keep the KV cache at its full length from the start.
        longest: tokens that a text may have.

    Attributes:
        call: the model's `generate`.
        device: of the model's inputs.
        encoder_decoder: whether the prompt goes to an encoder.
        width: of the logits.
        needs: what a prompt must have beside text, in words; None if text is enough.

    Raises:
        ModelLoadFailed: the model cannot generate.
    """

    def __init__(
        self, model: Any, vocabulary: Vocabulary, *, static_cache: bool = False, longest: int = _UNLIMITED
    ) -> None:
        self.call = GenerateCall(model, static_cache=static_cache)
        self._model = self.call.view
        self._fresh = fresh_state(self._model)
        self._vocabulary = vocabulary
        self._forward = set(inspect.signature(model.forward).parameters)
        self._masks = self.call.wraps or _takes_mask(model, self._forward)
        self._main_input = str(model.main_input_name)
        self._pad = int(self._model.generation_config.pad_token_id)
        self.device = _device(model)
        self.encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
        self._probe = GenerateProbe(self.call, self._texts, vocabulary, longest)
        self.width = self._probe.width
        self.needs = self._probe.needs

    @cached_property
    def batches(self) -> bool:
        """Whether prompts of several lengths give the same logits together as alone, as a probe finds."""
        return self._probe.batches()

    def resumable(self, job: Job) -> bool:
        """Whether a job can go on from its text so far as if it had not been stopped, as a probe finds."""
        return len(job.request.input_ids) + len(_sampler(job).generated) < self.resumable_to

    @property
    def resumes(self) -> bool:
        """Whether any job can."""
        return self.resumable_to > 0

    @cached_property
    def resumable_to(self) -> float:
        """How many tokens a text may have, prompt included, when it goes on."""
        return self._probe.resumable()

    def run(self, jobs: Sequence[Job], regroup: Callable[[int], bool]) -> None:
        """Generate until every job has ended, or until `regroup` calls for a new choice of jobs.

        A job that was begun before goes on where it was; if that would change its logits, from its prompt, with the
        tokens that it has.

        Args:
            jobs: more than one only if all are text alone.
            regroup: called at every step with the number of jobs that are still active.

        Raises:
            ModelError: the model's `generate` has not asked for a single token.
        """
        samplers = [_sampler(job) for job in jobs]
        resume = all(self.resumable(job) for job in jobs if _sampler(job).generated)
        bridge = _Bridge(jobs, samplers, [] if resume else [list(sampler.generated) for sampler in samplers])
        left = max((s.params.max_tokens or 1) - resume * len(s.generated) for s in samplers)
        stop = _Stop(jobs, regroup)
        with torch.inference_mode():
            self.call(
                **self._batch(jobs, resume=resume),
                max_new_tokens=max(1, left),
                logits_processor=LogitsProcessorList([bridge]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        if not bridge.steps:
            raise ModelError("The model's generate never asks which token comes next; give its loader a generate hook.")
        if not stop.regrouping:
            for job in jobs:
                job.finish("length" if bridge.steps >= left else "stop")

    def alone(self, request: EngineRequest) -> list[EngineEvent]:
        """The events of one request by itself."""
        events: list[EngineEvent] = []
        sampler = self._vocabulary.sampler(
            request.sampling, self.prompt_ids(request), vocab_size=self.width, device=self.device
        )
        live, output = LiveRequest(request, events.append), ChoiceOutput(self._vocabulary, request.sampling)
        self.run([Job(live=live, output=output, sampler=sampler)], lambda active: False)
        return events

    def prompt_ids(self, request: EngineRequest) -> list[int]:
        """The tokens before the first generated one: those of the decoder."""
        if not self.encoder_decoder:
            return list(request.input_ids)
        if self._main_input in request.model_inputs:
            return decoder_prompt(self._model, request.input_ids)
        return [decoder_start(self._model) or 0]

    def inputs(self, job: Job) -> dict[str, Any]:
        """The tensors of one prompt."""
        return self._batch([job], resume=False)

    def _batch(self, jobs: Sequence[Job], *, resume: bool = True) -> dict[str, Any]:
        """The tensors of several prompts, and with `resume` of what was generated already."""
        begun = [_sampler(job).generated if resume else [] for job in jobs]
        if self._main_input not in jobs[0].request.model_inputs or not self.encoder_decoder:
            return {**self._media(jobs), **self._texts([job.request.input_ids for job in jobs], begun)}
        ids = [[*self.prompt_ids(job.request), *done] for job, done in zip(jobs, begun, strict=True)]
        return {**self._media(jobs), "decoder_input_ids": torch.tensor(ids, device=self.device)}

    def _texts(self, prompts: Sequence[Sequence[int]], begun: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The tensors of prompts of text, and of what was generated already."""
        if not self.encoder_decoder:
            return self._padded([[*ids, *done] for ids, done in zip(prompts, begun, strict=True)])
        inputs = self._padded(prompts)
        if any(begun):
            # Jobs share a decoder only when they have come equally far: it has no padding.
            start = decoder_start(self._model) or 0
            inputs["decoder_input_ids"] = torch.tensor([[start, *done] for done in begun], device=self.device)
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
        inputs = {"input_ids": ids.to(self.device)}
        return {**inputs, "attention_mask": mask.to(self.device)} if self._masks else inputs

    def _media(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The encoder's other tensors of a job that is alone, in the model's dtype and on its device."""
        if len(jobs) > 1:
            return {}
        return {
            key: value.to(device=self.device, dtype=self._model.dtype if value.is_floating_point() else value.dtype)
            for key, value in jobs[0].request.model_inputs.items()
        }


class _Bridge(LogitsProcessor):  # type: ignore[misc]
    """Chooses the next token of every job and lets no other through.

    Args:
        replayed: tokens that each job has already, which are given again first.

    Attributes:
        steps: how often it was asked.
    """

    def __init__(
        self, jobs: Sequence[Job], samplers: Sequence[SequenceSampler], replayed: Sequence[Sequence[int]] = ()
    ) -> None:
        self.steps = 0
        self._jobs = jobs
        self._samplers = samplers
        self._replayed = replayed or [[]] * len(jobs)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = [done[self.steps] if self.steps < len(done) else 0 for done in self._replayed]
        active = [i for i, job in enumerate(self._jobs) if job.active and self.steps >= len(self._replayed[i])]
        self.steps += 1
        if active:
            logits = scores if len(active) == len(self._jobs) else scores[active]
            for i, sampled in zip(active, sample_batch(logits, [self._samplers[i] for i in active]), strict=True):
                tokens[i] = max(sampled.token_id, 0)
                self._jobs[i].take(sampled)
        return only(scores, tokens)


class _Stop(StoppingCriteria):  # type: ignore[misc]
    """Ends the sequences whose jobs have ended; all of them when other jobs should be run instead."""

    def __init__(self, jobs: Sequence[Job], regroup: Callable[[int], bool]) -> None:
        self._jobs = jobs
        self._regroup = regroup
        self.regrouping = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ended = [not job.active for job in self._jobs]
        if not all(ended):
            self.regrouping = self.regrouping or self._regroup(ended.count(False))
        return torch.tensor([e or self.regrouping for e in ended], device=input_ids.device)


def _sampler(job: Job) -> SequenceSampler:
    if job.sampler is None:
        raise RuntimeError("A job of StockGenerate needs a sampler.")
    return job.sampler


def _takes_mask(model: Any, forward: Set[str]) -> bool:
    """Whether transformers' `generate` takes a mask for a model: it refuses what its code does not name."""
    names = set(inspect.signature(model.prepare_inputs_for_generation).parameters)
    return "attention_mask" in (names | forward if names & {"kwargs", "model_kwargs"} else names)


def _device(model: Any) -> torch.device:
    parameter = next(iter(model.parameters()), None)
    return parameter.device if parameter is not None else torch.device("cpu")
