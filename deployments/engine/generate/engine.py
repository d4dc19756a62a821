"""The engine for everything continuous batching cannot hold: requests run through `generate`, whole and in turn.

Three ways to run a request: the loader's own `generate` hook; beam search; and the model's own `generate` with the
engine's sampling inside. The last runs requests of text alone together, padded, if a probe at load found that
padding does not change the model's logits; when half of them have ended and others wait, the rest is run together with
those, each going on where it was.
"""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import Future
from typing import Any

import torch

from deployments.adapters.lora_file import LoraFile
from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.cgroup import cores
from deployments.core.errors import ModelLoadFailed
from deployments.core.token_ids import vocab_size
from deployments.engine.adapters.table import AdapterTable, PlacedAdapter
from deployments.engine.base.admission import ALL_PARAMS, check_media, context_length, encodes_prompts, room_after
from deployments.engine.base.failures import as_error, free_memory, is_out_of_memory, raise_if_lost
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.base.turns import TurnQueue
from deployments.engine.generate.beam_search import BeamSearch, check_beams
from deployments.engine.generate.hook import GenerateHook
from deployments.engine.generate.job import Job
from deployments.engine.generate.model_generate import StockGenerate
from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from deployments.engine.model.random_state import TURN_LIMIT_S
from deployments.engine.model.rotary import SequenceRotary
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.generate_lengths import alike_beyond_lengths
from deployments.engine.verify.proofs import GENERATE, GENERATE_LENGTHS, RESUMED, ROTARY, Proofs
from model_loaders.contract import ModelInfo

logger = logging.getLogger(__name__)


class GenerateEngine(ThreadedEngine):
    """Serves one model through `generate` on a thread of its own. See `protocol.Engine`.

    Args:
        info: the loaded model.
        options: see `EngineOptions`; `max_batch_size`, `max_model_len`, `deterministic` (nothing runs together),
            `static_cache` and `threads` count here.
        vocabulary: of the model.
        turn_limit_s: seconds that a generate hook may keep the random state while others wait.
        proofs: notes what is proved of the model.

    Raises:
        ModelLoadFailed: the model has no `generate` and the loader gave no hook.
    """

    kind = "generate"

    def __init__(
        self,
        info: ModelInfo,
        options: EngineOptions,
        vocabulary: Vocabulary,
        *,
        turn_limit_s: float = TURN_LIMIT_S,
        proofs: Proofs | None = None,
    ) -> None:
        super().__init__()
        proofs = proofs or Proofs()
        if isinstance(info.model, torch.nn.Module):
            info.model.eval()
        self.max_model_len = context_length(info, options)
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size(info.model)
        self.encodes_prompts = encodes_prompts(info.model)
        self._encoder_decoder = bool(getattr(getattr(info.model, "config", None), "is_encoder_decoder", False))
        with proofs.of(ROTARY) as note:
            rotary = SequenceRotary(info.model, self.max_model_len)
            note.found = "follow the length" if rotary.depends else ""
        if rotary.depends:
            logger.warning(
                "Requests of this model run one at a time: its rotary frequencies depend on the length of a text."
            )
        self._runner = _runner(info, self._vocabulary, options, turn_limit_s, proofs, alone=rotary.depends)
        self.supports = self._runner.supports
        self.adapters = AdapterTable(info.model)
        self._options = options
        self._waiting: TurnQueue[Job] = TurnQueue()
        self._running: list[Job] = []
        self._start("generate-engine")

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        self._check_request(request, self.max_model_len, self._vocab_size)
        check_media(request, self._runner.needs)
        self._runner.check(request.sampling)
        if request.sampling.max_tokens is None:
            left = room_after(len(request.input_ids), self.max_model_len, encoded=self.encodes_prompts)
            request = dataclasses.replace(
                request, sampling=dataclasses.replace(request.sampling, max_tokens=max(1, left))
            )
        output = ChoiceOutput.from_request(self._vocabulary, request, encoder_decoder=self._encoder_decoder)
        grammar = self._runner.grammar(request.sampling)
        job = Job(live=self._admit(request, emit), output=output)
        if grammar is None:
            self._queue(job, None)
        else:
            grammar.add_done_callback(lambda done: self._queue(job, done))

    def add_adapter(self, key: str, file: LoraFile, dtype: torch.dtype = torch.float32) -> PlacedAdapter:
        """See `protocol.AdapterEngine`. Requests of one adapter run together."""
        return self.adapters.add(key, self.adapters.fit(file, dtype))

    def remove_adapter(self, key: str) -> None:
        """See `protocol.AdapterEngine`."""
        self.adapters.remove(key)

    def _queue(self, job: Job, grammar: Future[CompiledGrammar] | None) -> None:
        """Let a job wait for its turn; its grammar, if it has one, has been compiled."""
        try:
            self._runner.prepare(job, None if grammar is None else grammar.result())
        except Exception as error:
            job.fail(as_error(error))
        with self._changed:
            if job.active:
                self._waiting.add(job, job.request.turn)
                self._changed.notify()

    def _drop(self, live: LiveRequest) -> None:
        with self._changed:
            for job in [job for job in self._waiting if job.live is live]:
                self._waiting.discard(job)

    def _release(self) -> None:
        self._runner.close()

    # The engine's thread.

    def _work(self) -> None:
        torch.set_num_threads(self._options.threads or min(torch.get_num_threads(), cores()))
        while (jobs := self._next()) is not None:
            self._run(jobs)
            self._put_back()

    def _next(self) -> list[Job] | None:
        """The jobs to run together, once there are any; None when the engine closes."""
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait()
            first, *others = self._waiting
            jobs = [first]
            for job in others:
                alike = job.request.adapter == first.request.adapter and self._runner.together(first, job)
                if len(jobs) < self._options.max_batch_size and alike:
                    jobs.append(job)
            self._running = jobs
            for job in jobs:
                self._waiting.begin(job)
                job.live.running = True
            return jobs

    def _run(self, jobs: list[Job]) -> None:
        """Run jobs; where that fails, each of them alone, so that only the one at fault fails."""
        for job in jobs:
            if not job.begun:
                job.begun = True
                self._counts["prompt_tokens"] += len(job.request.input_ids)
        try:
            with self.adapters.applied([jobs[0].request.adapter]):
                self._runner.run(jobs, self._regroup)
        except Exception as error:
            raise_if_lost(error)
            logger.warning("generate failed with %d requests", len(jobs), exc_info=True)
            left = [job for job in jobs if job.active]
            if len(jobs) == 1:
                jobs[0].fail(as_error(error))
                left = []
            out_of_memory = is_out_of_memory(error)
        else:
            return
        if out_of_memory:
            free_memory()
        for job in left:
            self._run([job])

    def _regroup(self, active: int) -> bool:
        """Whether the running jobs should stop to be run together with those that wait."""
        self._counts["steps"] += 1
        return 2 * active <= len(self._running) and bool(self._waiting) and not self._closing

    def _put_back(self) -> None:
        """Let jobs that have not ended wait at the front."""
        with self._changed:
            jobs, self._running = [job for job in self._running if job.active], []
            for job in jobs:
                job.live.running = False
            self._waiting.add_first(jobs)


class _Runner:
    """How this model's requests run: through the hook, or through the stock model's `generate`."""

    def __init__(self, supports: frozenset[str], needs: str | None = None) -> None:
        self.supports = supports
        self.needs = needs

    def check(self, params: SamplingParams) -> None:
        """Refuse combinations of parameters that cannot be honored together."""

    def grammar(self, params: SamplingParams) -> Future[CompiledGrammar] | None:
        """The compilation a request has to wait for."""
        return None

    def prepare(self, job: Job, grammar: CompiledGrammar | None) -> None:
        """Set the job up before it waits; may raise."""

    def together(self, first: Job, other: Job) -> bool:
        """Whether two jobs can run at once."""
        return False

    def run(self, jobs: list[Job], regroup: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Release what belongs to the model."""


class _HookRunner(_Runner):
    def __init__(self, info: ModelInfo, turn_limit_s: float) -> None:
        self._hook: GenerateHook | None = GenerateHook(info, turn_limit_s)
        super().__init__(self._hook.supports)

    def run(self, jobs: list[Job], regroup: Any) -> None:
        if jobs[0].request.sampling.max_tokens == 0:
            jobs[0].finish("length")
        elif self._hook is not None:
            self._hook.run(jobs[0])

    def close(self) -> None:
        self._hook = None


class _StockRunner(_Runner):
    def __init__(
        self, info: ModelInfo, vocabulary: Vocabulary, options: EngineOptions, proofs: Proofs, *, alone: bool
    ) -> None:
        self._vocabulary = vocabulary
        limit = context_length(info, options)
        alone = alone or options.deterministic or options.max_batch_size == 1
        with proofs.of(GENERATE) as note:
            self._generate = StockGenerate(info.model, vocabulary, static_cache=options.static_cache, longest=limit)
            self._batches = not alone and proofs.recall(GENERATE, lambda: self._generate.batches)
            note.found = "together" if self._batches else "one at a time"
        if self._batches:
            with proofs.of(GENERATE_LENGTHS) as note:
                self._batches = proofs.recall(GENERATE_LENGTHS, lambda: alike_beyond_lengths(info.model, limit))
                note.found = "together" if self._batches else "one at a time"
        with proofs.of(RESUMED) as note:
            if self._batches:
                self._generate.resumable_to = proofs.recall(RESUMED, lambda: self._generate.resumable_to)
            self._resumes = self._batches and self._generate.resumes
            note.found = "yes" if self._resumes else ""
        self._beams = BeamSearch(self._generate.call, vocabulary, self._generate.width)
        self._grammars = GrammarCompiler(vocabulary, self._generate.width)
        unable = {"prompt_logprobs"} if self._generate.encoder_decoder else set()
        super().__init__(ALL_PARAMS - unable, self._generate.needs)

    def check(self, params: SamplingParams) -> None:
        if params.num_beams != 1:
            check_beams(params)

    def grammar(self, params: SamplingParams) -> Future[CompiledGrammar] | None:
        return None if params.grammar is None else self._grammars.compile(params.grammar)

    def prepare(self, job: Job, grammar: CompiledGrammar | None) -> None:
        request = job.request
        job.sampler = self._vocabulary.sampler(
            request.sampling,
            self._generate.prompt_ids(request),
            vocab_size=self._generate.width,
            device=self._generate.device,
            mask=None if grammar is None else grammar.mask_of(request),
            processors=request.processors,
        )

    def together(self, first: Job, other: Job) -> bool:
        if not self._batches:
            return False
        plain = all(not job.request.model_inputs and job.request.sampling.num_beams == 1 for job in (first, other))
        return plain and (not self._generate.encoder_decoder or _begun(first) == _begun(other))

    def run(self, jobs: list[Job], regroup: Any) -> None:
        for job in jobs:
            if job.request.sampling.prompt_logprobs is not None and not job.scored and job.active:
                self._generate.score_prompt(job)
        if jobs[0].request.sampling.num_beams > 1:
            self._beams.run(jobs[0], self._generate.inputs(jobs[0]))
        else:
            self._generate.run(jobs, lambda active: regroup(active) and self._can_stop(jobs))

    def _can_stop(self, jobs: list[Job]) -> bool:
        """Whether the jobs that are not done would go on as if they had not been stopped."""
        return self._resumes and all(self._generate.resumable(job) for job in jobs if job.active)

    def close(self) -> None:
        self._grammars.close()


def _runner(
    info: ModelInfo, vocabulary: Vocabulary, options: EngineOptions, turn_limit_s: float, proofs: Proofs, *, alone: bool
) -> _Runner:
    """How a model's requests run; `alone`: its rotary frequencies follow the length, so that none shares a forward."""
    if info.generate is not None and not is_stock(info):
        return _HookRunner(info, turn_limit_s)
    if not _has_stock_generate(info.model):
        own = callable(getattr(info.model, "generate", None))
        problem = "a generate of its own, which is not that of transformers" if own else "no generate"
        advice = 'a generate hook, such as "generate": model.generate' if own else "a generate hook"
        raise ModelLoadFailed(
            f"Model {info.label!r} ({type(info.model).__name__}) has {problem}; give its loader {advice}."
        )
    return _StockRunner(info, vocabulary, options, proofs, alone=alone)


def is_stock(info: ModelInfo) -> bool:
    """Whether the loader's hook is nothing but the model's own `generate`."""
    hook = info.generate
    own = getattr(hook, "__self__", None) is info.model and getattr(hook, "__name__", "") == "generate"
    return own and _has_stock_generate(info.model) and not own_settings(info)


def _has_stock_generate(model: Any) -> bool:
    """Whether the model generates as transformers does; another class may have a `generate` with its own contract."""
    return callable(getattr(model, "generate", None)) and getattr(model, "generation_config", None) is not None


def own_settings(info: ModelInfo) -> list[str]:
    """The loader's `generate_kwargs` that change answers: every request says the others itself."""
    return sorted(set(info.generate_kwargs) - {"do_sample", "temperature", "max_new_tokens"})


def _begun(job: Job) -> int:
    return len(job.sampler.generated) if job.sampler is not None else 0
