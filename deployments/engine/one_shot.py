"""The engine for everything continuous batching cannot hold: requests run through `generate`, whole and in turn.

Text-only requests that wait together are computed together, left-padded, where a probe at load found that padding does
not change the model's logits; all others one at a time.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

import torch

from deployments.engine.admission import ALL_PARAMS, check_request, context_length, vocab_size
from deployments.engine.job import Job
from deployments.engine.options import EngineOptions
from deployments.engine.output import ChoiceOutput
from deployments.engine.protocol import Emit, EngineRequest, EngineStats
from deployments.engine.stock_generate import StockGenerate
from deployments.engine.vocabulary import Vocabulary
from deployments.errors import ModelError, OutOfMemory, TroupeError, Unavailable
from model_loaders.contract import ModelInfo

logger = logging.getLogger(__name__)

_NOT_YET = frozenset({"grammar", "prompt_logprobs", "num_beams"})


class OneShotEngine:
    """Serves one model through `generate` on a thread of its own. See `protocol.Engine`."""

    def __init__(self, info: ModelInfo, options: EngineOptions) -> None:
        self.max_model_len = context_length(info, options)
        self.supports = ALL_PARAMS - _NOT_YET
        self._vocabulary = Vocabulary(info)
        self._vocab_size = vocab_size(info.model)
        self._generate = StockGenerate(info.model)
        self._logits_width = int(info.model.get_output_embeddings().weight.shape[0])
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._jobs: dict[str, Job] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._thread = threading.Thread(target=self._work, name="one-shot-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        check_request(request, max_model_len=self.max_model_len, supports=self.supports, vocab=self._vocab_size)
        sampler = self._vocabulary.sampler(
            request.sampling,
            self._generate.prompt_ids(request.input_ids),
            vocab_size=self._logits_width,
            device=self._generate.device,
        )
        output = ChoiceOutput(self._vocabulary, request.sampling)
        job = Job(request=request, emit=emit, output=output, sampler=sampler, on_token=self._count)
        with self._changed:
            if self._closing:
                raise Unavailable("The model is being unloaded; try again.")
            self._jobs[request.request_id] = job
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            job = self._jobs.pop(request_id, None)
            if job is not None:
                job.cancelled = True

    def stats(self) -> EngineStats:
        return EngineStats(
            kind="one_shot",
            rows=len(self._running),
            waiting=len(self._waiting),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def check(self) -> None:
        if not self._thread.is_alive() and not self._closing:
            raise Unavailable("The engine's thread has ended.")

    def close(self, timeout: float = 30.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._jobs.values())
            self._jobs.clear()
            self._waiting.clear()
        for job in left:
            job.fail(Unavailable("The model was unloaded before the request had ended; try again."))
        self._thread.join(1.0)

    def _count(self) -> None:
        self._generated_tokens += 1

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            try:
                self._generate.run(jobs)
            except Exception as error:
                logger.exception("generate failed")
                for job in jobs:
                    job.fail(_as_error(error))
            finally:
                with self._changed:
                    self._running = []
                    for job in jobs:
                        self._jobs.pop(job.request.request_id, None)

    def _next(self) -> list[Job] | None:
        """The jobs to run together, once there are any; None when the engine closes."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].cancelled:
                    self._waiting.popleft()
                if self._waiting:
                    break
                if self._closing:
                    return None
                self._changed.wait()
            self._running = [self._waiting.popleft()]
            self._prompt_tokens += len(self._running[0].request.input_ids)
            return self._running


def _as_error(error: Exception) -> TroupeError:
    if isinstance(error, TroupeError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemory("The device ran out of memory for this request; send a shorter one or try again.")
    return ModelError(f"The model failed: {type(error).__name__}: {error}")
