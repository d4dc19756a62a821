"""A model on a Triton server as an engine: one gRPC stream per request, all on one event loop in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import TroupeError, Unavailable, last_line
from deployments.core.events import Delta
from deployments.engine.base.admission import check_request, check_supported, context_length
from deployments.engine.base.failures import as_error
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.text_request import TextRequest
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.backends.triton.answer import TextAnswer, TokenAnswer
from model_loaders.backends.triton.request import supported, tensors, with_defaults
from model_loaders.backends.triton.server import Interface, Server
from model_loaders.backends.triton.words import Words
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger("troupe.triton")

T = TypeVar("T")
_FIRST_LOOK_S = 3.0


class TritonEngine(ThreadedEngine):
    """Serves one model of a Triton server. See `protocol.Engine`.

    Args:
        info: with the tokenizer.
        options: `max_batch_size` requests are sent at the same time; `max_model_len` is used.
        server: the connection.
        defaults: generation_config.json, for parameters that a request leaves alone.
        accumulated: each response of a stream repeats what came before it.
    """

    kind = "triton"
    finishes_waiting = True

    def __init__(
        self, info: ModelInfo, options: EngineOptions, server: Server, *, defaults: Mapping[str, Any], accumulated: bool
    ) -> None:
        super().__init__()
        self.max_model_len = context_length(info, options)
        self._server = server
        self._defaults = defaults
        self._accumulated = accumulated
        self._vocabulary = Vocabulary(Hooks(info))
        self._words = Words(info.tokenizer, self._vocabulary)
        # All that any served model takes, while the server has not been reached.
        self.supports = supported(None)
        self._exchanges: dict[LiveRequest, concurrent.futures.Future[None]] = {}
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(options.max_batch_size)
        self._start("triton")
        self._look()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        check_request(request, max_model_len=self.max_model_len, supports=self.supports, vocab=None)
        params = with_defaults(request.sampling, self._defaults)
        if params.logprobs:
            check_supported(params, self.supports - {"logprobs"})
        live = self._admit(request, emit)
        future = self._exchanges[live] = self._call(self._serve(live, params))
        future.add_done_callback(lambda _: self._exchanges.pop(live, None))

    def _drop(self, live: LiveRequest) -> None:
        if (future := self._exchanges.pop(live, None)) is not None:
            future.cancel()

    def _work(self) -> None:
        self._loop.run_forever()

    def _stop(self) -> None:
        concurrent.futures.wait(list(self._exchanges.values()), 1.0)
        self._call(self._server.close()).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _release(self) -> None:
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _look(self) -> None:
        """Ask the server what the model takes; a server that is down is asked again with the first request."""
        try:
            self.supports = supported(self._call(self._server.interface()).result(_FIRST_LOOK_S))
        except (Unavailable, TimeoutError) as error:
            logger.warning("%s; requests are answered with 503 until it is up", last_line(error))

    async def _serve(self, live: LiveRequest, params: SamplingParams) -> None:
        try:
            async with self._places:
                live.running = True
                await self._exchange(live, params)
        except Exception as error:
            if not isinstance(error, TroupeError):
                logger.exception("a request failed")
            live.fail(as_error(error, failed="The request to Triton failed"))

    async def _exchange(self, live: LiveRequest, params: SamplingParams) -> None:
        interface = await self._server.interface()
        self.supports = supported(interface)
        check_supported(params, self.supports)
        if params.max_tokens == 0:
            live.give(Delta(finish_reason="length"))
            return
        inputs = tensors(live.request, params, interface, self._words)
        answer = self._answer(live, params, interface)
        self._counts["prompt_tokens"] += len(live.request.input_ids)
        async with aclosing(self._server.infer(inputs, live.request.request_id)) as responses:
            async for outputs in responses:
                answer.take(outputs)
                if not live.active:
                    return
        answer.finish(params.max_tokens or 1)

    def _answer(self, live: LiveRequest, params: SamplingParams, interface: Interface) -> TokenAnswer | TextAnswer:
        repeated = self._accumulated
        if interface.text:
            return TextAnswer(live, params, self._words, accumulated=repeated)
        output = ChoiceOutput.from_request(self._vocabulary, dataclasses.replace(live.request, sampling=params))
        text = TextRequest(live=live, output=output)
        return TokenAnswer(text, accumulated=repeated, scored=params.logprobs is not None)
