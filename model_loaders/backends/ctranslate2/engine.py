"""CTranslate2 as an engine: waiting requests with the same settings are computed in one batch."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import UnsupportedParameter
from deployments.engine.base.admission import check_request, context_length
from deployments.engine.base.failures import as_error, raise_if_lost
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.sampling.logprobs import TokenScore, token_scores
from deployments.engine.sampling.sample import Sampled
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.prompt_logprobs import PromptScorer
from deployments.engine.text.text_request import TextRequest
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.backends.ctranslate2.backend import Backend
from model_loaders.backends.ctranslate2.settings import Settings
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger("troupe.ctranslate2")

_SUPPORTS = frozenset(
    {
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "seed",
        "logprobs",
        "skip_special_tokens",
        "grammar",
        "num_beams",
        "extra",
    }
)


@dataclass(slots=True)
class _Waiting:
    """A request in the queue: what it wants, and when it came."""

    job: TextRequest
    settings: Settings
    since: float


class CTranslate2Engine(ThreadedEngine):
    """Serves one converted model. See `protocol.Engine`.

    Args:
        info: with the tokenizer.
        options: `max_batch_size` and `max_model_len` are used.
        backend: the library's model.
        workers: batches computed at the same time.
        wait: seconds that the first request of a batch waits for others.
    """

    kind = "ctranslate2"
    finishes_waiting = True

    def __init__(
        self, info: ModelInfo, options: EngineOptions, backend: Backend, *, workers: int = 1, wait: float = 0.005
    ) -> None:
        super().__init__()
        self.max_model_len = context_length(info, options)
        self.supports = _SUPPORTS | ({"prompt_logprobs"} if backend.scores_prompts else frozenset())
        self._backend = backend
        self._tokenizer = info.tokenizer
        self._vocabulary = Vocabulary(Hooks(info))
        self._max_batch_size = options.max_batch_size
        self._wait = wait
        self._queue: deque[_Waiting] = deque()
        self._start(*(f"ctranslate2-{i}" for i in range(workers)))

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        check_request(
            request, max_model_len=self.max_model_len, supports=self.supports, vocab=self._backend.source_size
        )
        params = request.sampling
        if params.grammar is not None:
            _check_choice(request)
        in_step = params.logprobs is not None or bool(params.min_tokens and params.repetition_penalty != 1)
        lengths = self._backend.length_class(len(request.input_ids), in_step)
        decoded = params if params.grammar is None else SamplingParams()
        settings = Settings.from_params(decoded, self._vocabulary.eos_ids, self._backend.target_size, lengths)
        # Only a decoder scores its prompt.
        output = ChoiceOutput.from_request(self._vocabulary, request, encoder_decoder=not self._backend.scores_prompts)
        job = TextRequest(live=self._admit(request, emit), output=output)
        with self._changed:
            if job.active:
                self._queue.append(_Waiting(job, settings, time.monotonic()))
                self._changed.notify_all()

    def _drop(self, live: LiveRequest) -> None:
        with self._changed:
            self._queue = deque(waiting for waiting in self._queue if waiting.job.live is not live)

    def _release(self) -> None:
        # The library aborts the process if its weights go while it computes; they are freed with the thread then.
        if any(thread.is_alive() for thread in self._threads):
            logger.warning("a batch has not ended; its model is freed when it does")
        else:
            self._backend.unload()

    def _work(self) -> None:
        while (batch := self._next()) is not None:
            jobs = [waiting.job for waiting in batch]
            try:
                self._run(jobs, batch[0].settings)
            except Exception as error:
                raise_if_lost(error)
                logger.exception("a batch failed")
                for job in jobs:
                    job.fail(as_error(error, failed="CTranslate2 failed"))

    def _next(self) -> list[_Waiting] | None:
        """Requests to compute together, once there are any; None when the engine closes."""
        with self._changed:
            while True:
                if self._queue:
                    mates = self._mates()
                    left = self._queue[0].since + self._wait - time.monotonic()
                    if left <= 0 or len(mates) == self._max_batch_size or self._closing:
                        break
                    self._changed.wait(left)
                elif self._closing:
                    return None
                else:
                    self._changed.wait()
            for waiting in mates:
                self._queue.remove(waiting)
                waiting.job.live.running = True
                self._counts["prompt_tokens"] += len(waiting.job.request.input_ids)
            self._counts["steps"] += 1
            return mates

    def _mates(self) -> list[_Waiting]:
        """The first in the queue and those that want the same, in their order."""
        settings = self._queue[0].settings
        alike = (each for each in self._queue if each.settings == settings)
        return [each for each, _ in zip(alike, range(self._max_batch_size), strict=False)]

    def _run(self, jobs: Sequence[TextRequest], settings: Settings) -> None:
        self._score_prompts([job for job in jobs if job.request.sampling.prompt_logprobs is not None])
        for job in jobs:
            if job.request.sampling.max_tokens == 0:
                job.finish("length")
            elif job.request.sampling.grammar is not None:
                self._choose(job)
        self._generate([job for job in jobs if job.active], settings)

    def _score_prompts(self, jobs: Sequence[TextRequest]) -> None:
        if not jobs:
            return
        for job, logits in zip(jobs, self._backend.prompt_logits([job.request.input_ids for job in jobs]), strict=True):
            top = job.request.sampling.prompt_logprobs or 0
            scorer = PromptScorer(self._vocabulary, job.request.input_ids, top)
            scorer.feed(logits, 0)
            job.give(scorer.scores())

    def _generate(self, jobs: Sequence[TextRequest], settings: Settings) -> None:
        if not jobs:
            return

        def on_token(row: int, token_id: int, logits: torch.Tensor | None) -> bool:
            job = jobs[row]
            try:
                job.take(Sampled(token_id, _score(job, token_id, logits)))
            except Exception as error:
                logger.exception("a token failed")
                job.fail(as_error(error, failed="CTranslate2 failed"))
            return not job.active

        longest = max(job.request.sampling.max_tokens or 1 for job in jobs)
        texts = self._backend.generate([job.request.input_ids for job in jobs], settings, longest, on_token)
        for job, token_ids in zip(jobs, texts, strict=True):
            if settings.beam_size > 1:
                for token_id in token_ids:
                    job.take(Sampled(token_id))
            # Nothing is generated for a prompt that is empty but for its end token.
            job.finish("stop")

    def _choose(self, job: TextRequest) -> None:
        """Take the likeliest of a closed set of texts, or draw one by its likelihood."""
        params = job.request.sampling
        assert params.grammar is not None
        texts: list[str] = json.loads(params.grammar.source)
        choices = [list(self._tokenizer(text_target=text, add_special_tokens=False)["input_ids"]) for text in texts]
        logprobs = self._backend.choice_logprobs(job.request.input_ids, choices)
        chosen = _pick([sum(each) for each in logprobs], params)
        for token_id, logprob in zip(choices[chosen], logprobs[chosen], strict=False):
            job.take(Sampled(token_id, TokenScore(logprob, 0)))
        job.finish("stop")


def _check_choice(request: EngineRequest) -> None:
    """Only a closed set of texts can be enforced, by the likelihood of each as a whole."""
    params = request.sampling
    assert params.grammar is not None
    if request.reasoning_opened:
        raise UnsupportedParameter(
            "CTranslate2 cannot follow a constraint after reasoning, and this prompt opens the reasoning; leave the "
            "constraint out or turn the reasoning off.",
            param=params.grammar.param,
        )
    if params.grammar.kind != "choice":
        raise UnsupportedParameter(
            f"CTranslate2 cannot follow a {params.grammar.kind}; it can only choose from a list of texts.",
            param=params.grammar.param,
        )
    if params.logprobs:
        raise UnsupportedParameter(
            "CTranslate2 gives no alternatives to the tokens of a choice; ask for logprobs without them.",
            param="logprobs",
        )
    if params.num_beams > 1:
        raise UnsupportedParameter("A choice is scored as a whole; leave num_beams out.", param="num_beams")


def _pick(scores: Sequence[float], params: SamplingParams) -> int:
    best = max(scores)
    if params.temperature <= 0:
        return scores.index(best)
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    return random.Random(params.seed).choices(range(len(scores)), weights)[0]


def _score(job: TextRequest, token_id: int, logits: torch.Tensor | None) -> TokenScore | None:
    asked = job.request.sampling.logprobs
    if asked is None or logits is None:
        return None
    return token_scores(logits[None], torch.tensor([token_id]), [asked])[0]
