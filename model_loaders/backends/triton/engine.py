"""A model on a Triton server as an engine: one gRPC stream per request, all on one event loop in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import ModelError, TroupeError, Unavailable, last_line
from deployments.core.events import Delta
from deployments.engine.base.admission import check_request, check_supported, context_length
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.backends.triton.answer import TextAnswer, TokenAnswer
from model_loaders.backends.triton.reply import Reply
from model_loaders.backends.triton.request import supported, tensors, with_defaults
from model_loaders.backends.triton.server import Interface, Server
from model_loaders.backends.triton.words import Words
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger("troupe.triton")

T = TypeVar("T")
_FIRST_LOOK_S = 3.0


class TritonEngine:
    """Serves one model of a Triton server. See `protocol.Engine`.

    Args:
        info: with the tokenizer.
        options: `max_batch_size` requests are sent at the same time; `max_model_len` is used.
        server: the connection.
        defaults: generation_config.json, for parameters that a request leaves alone.
        accumulated: each response of a stream repeats what came before it.
    """

    def __init__(
        self,
        info: ModelInfo,
        options: EngineOptions,
        server: Server,
        *,
        defaults: Mapping[str, Any],
        accumulated: bool,
    ) -> None:
        self.max_model_len = context_length(info, options)
        self._server = server
        self._defaults = defaults
        self._accumulated = accumulated
        self._vocabulary = Vocabulary(Hooks(info))
        self._words = Words(info.tokenizer, self._vocabulary)
        # All that any served model takes, while the server has not been reached.
        self.supports = supported(None)
        self._running: dict[str, tuple[Reply, concurrent.futures.Future[None]]] = {}
        self._lock = threading.Lock()
        self._closing = False
        self._sent = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._loop = asyncio.new_event_loop()
        self._places = asyncio.Semaphore(options.max_batch_size)
        self._thread = threading.Thread(target=self._loop.run_forever, name="triton", daemon=True)
        self._thread.start()
        self._look()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        check_request(request, max_model_len=self.max_model_len, supports=self.supports, vocab=None)
        params = with_defaults(request.sampling, self._defaults)
        if params.logprobs:
            check_supported(params, self.supports - {"logprobs"})
        reply = Reply(emit)
        with self._lock:
            if self._closing:
                raise Unavailable("The model is being unloaded; try again.")
            future = self._call(self._serve(request, params, reply))
            self._running[request.request_id] = (reply, future)
        future.add_done_callback(lambda _: self._running.pop(request.request_id, None))

    def cancel(self, request_id: str) -> None:
        if (found := self._running.pop(request_id, None)) is not None:
            reply, future = found
            reply.cancel()
            future.cancel()

    def stats(self) -> EngineStats:
        return EngineStats(
            kind="triton",
            rows=self._sent,
            waiting=max(0, len(self._running) - self._sent),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def check(self) -> None:
        if not self._thread.is_alive() and not self._closing:
            raise Unavailable("The engine's thread has ended.")

    def close(self, timeout: float = 30.0) -> None:
        with self._lock:
            self._closing = True
        concurrent.futures.wait([future for _, future in list(self._running.values())], timeout)
        for reply, future in list(self._running.values()):
            reply.fail(Unavailable("The model was unloaded before the request had ended; try again."))
            future.cancel()
        self._call(self._server.close()).result(5.0)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _look(self) -> None:
        """Ask the server what the model takes; a server that is down is asked again with the first request."""
        try:
            self.supports = supported(self._call(self._server.interface()).result(_FIRST_LOOK_S))
        except (Unavailable, TimeoutError) as error:
            logger.warning("%s; requests are answered with 503 until it is up", last_line(error))

    async def _serve(self, request: EngineRequest, params: SamplingParams, reply: Reply) -> None:
        try:
            async with self._places:
                self._sent += 1
                try:
                    await self._exchange(request, params, reply)
                finally:
                    self._sent -= 1
                    self._generated_tokens += reply.tokens
        except TroupeError as error:
            reply.fail(error)
        except Exception as error:
            logger.exception("a request failed")
            reply.fail(ModelError(f"The request to Triton failed: {last_line(error)}"))

    async def _exchange(self, request: EngineRequest, params: SamplingParams, reply: Reply) -> None:
        interface = await self._server.interface()
        self.supports = supported(interface)
        check_supported(params, self.supports)
        if params.max_tokens == 0:
            reply.give(Delta(finish_reason="length"))
            return
        inputs = tensors(request, params, interface, self._words)
        answer = self._answer(request, params, interface, reply)
        self._prompt_tokens += len(request.input_ids)
        async with aclosing(self._server.infer(inputs, request.request_id)) as responses:
            async for outputs in responses:
                answer.take(outputs)
                if not reply.active:
                    return
        answer.finish(params.max_tokens or 1)

    def _answer(
        self, request: EngineRequest, params: SamplingParams, interface: Interface, reply: Reply
    ) -> TokenAnswer | TextAnswer:
        repeated = self._accumulated
        if interface.text:
            return TextAnswer(reply, request, params, self._words, accumulated=repeated)
        output = ChoiceOutput.from_request(self._vocabulary, dataclasses.replace(request, sampling=params))
        scored = params.logprobs is not None
        return TokenAnswer(reply, output, request.input_ids, accumulated=repeated, scored=scored)
