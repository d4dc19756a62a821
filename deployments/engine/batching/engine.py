"""The engine that batches continuously: requests of any length join and leave the running sequences at any step."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import torch

from deployments.config.engine import EngineOptions
from deployments.core.errors import BadRequest, ModelError, TroupeError, Unavailable
from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.admission import ALL_PARAMS, check_media, check_request, context_length
from deployments.engine.base.cgroup import cores
from deployments.engine.base.failures import as_error
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from deployments.engine.batching.beam_jobs import BeamJobs, check_search
from deployments.engine.batching.memory import default_budget, weight_bytes
from deployments.engine.batching.prefill import Prefiller
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prompt_lookup import prompt_lookup
from deployments.engine.batching.running_batches import Limits
from deployments.engine.batching.sequence import Sequence
from deployments.engine.batching.sequence_builder import SequenceBuilder
from deployments.engine.batching.step_loop import StepLoop
from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from deployments.engine.model.forward import Forward
from deployments.engine.speedups.deterministic import Deterministic
from deployments.engine.speedups.fixed_decode import FixedDecode, fixed_decode
from deployments.engine.speedups.packed_linear import PackedLinears
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.capabilities import Capabilities
from deployments.engine.verify.encoder_inputs import encoder_inputs, encoder_needs
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

logger = logging.getLogger(__name__)

_GIB = 1 << 30


class BatchingEngine:
    """Serves one model through its stock `forward`, on a thread of its own. See `protocol.Engine`.

    Args:
        info: the loaded model.
        hooks: its hooks.
        options: see `EngineOptions`.

    Raises:
        UnknownLayer: the model's cache is none that sequences can hold.
    """

    def __init__(self, info: ModelInfo, hooks: Hooks, options: EngineOptions) -> None:
        info.model.eval()
        self._threads = options.threads or min(torch.get_num_threads(), cores())
        # What is measured and proved at load is so with as many threads as later.
        torch.set_num_threads(self._threads)
        self._context = context_length(info, options)
        # A search computes with other shapes than the fixed ones of the deterministic mode.
        self.supports = ALL_PARAMS - ({"num_beams"} if options.deterministic else set())
        self._needs = encoder_needs(info.model)
        self._vocabulary = Vocabulary(info, hooks)
        self._forward = Forward(info.model, self._context, encoder_inputs(info.model, hooks))
        with torch.inference_mode():
            self.capabilities = Capabilities.measure(self._forward, self._context)
        self._logits_width = self.capabilities.logits_width
        self._grammars = GrammarCompiler(self._vocabulary, self._logits_width)
        if options.static_cache:
            logger.warning("Engine option static_cache=True has no effect on sequences: their caches grow.")
        self._fixed = fixed_decode(self._forward, options)
        # A packed weight is nothing that torch.compile knows.
        self._packed = PackedLinears.from_model(info.model, False if self._fixed is not None else options.pack_linears)
        self._deterministic = Deterministic(self._forward, options.max_batch_size) if options.deterministic else None
        self._loop = _step_loop(self._forward, self.capabilities, options, self._deterministic, self._fixed)
        self.max_model_len = _held_length(self._context, self._loop)
        self._beams = BeamJobs(info.model, self._vocabulary, self._context)
        self._builder = SequenceBuilder(self._forward, self._vocabulary, self._logits_width, self._beams)
        self._changed = threading.Condition()
        self._building: dict[str, tuple[EngineRequest, Emit]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._live: set[str] = set()
        self._closing = False
        self._deadline = float("inf")
        self._death: BaseException | None = None
        self._stats = self._loop.stats()
        self._thread = threading.Thread(target=self._work, name="batching-engine", daemon=True)
        self._thread.start()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        """See `protocol.Engine`. The sequence is made in a thread of the engine: the caller may be an event loop."""
        params = request.sampling
        inputs = self._forward.model.get_input_embeddings().weight.shape[0]
        check_request(request, max_model_len=self._context, supports=self.supports, vocab=inputs)
        check_media(request, self._needs)
        if params.num_beams != 1:
            check_search(params)
        else:
            self._check_bytes(request)
        compiled = self._grammars.compile(params.grammar) if params.grammar is not None else None
        deliver = self._delivering(request, emit)
        self._begin(request, deliver)

        def build() -> None:
            self._build(request, deliver, compiled)

        if compiled is None:
            self._builder.run(params, build)
        else:
            compiled.add_done_callback(lambda _: self._builder.run(params, build))

    def _check_bytes(self, request: EngineRequest) -> None:
        """Refuse a request that does not fit even alone."""
        length, encoded = self._builder.lengths(request)
        limits = self._loop.limits
        need = self._loop.batches.sequence_bytes.of_sequence(length + (request.sampling.max_tokens or 1), encoded)
        if need > limits.budget:
            raise BadRequest(
                f"This request may need {need / _GIB:.2f} GiB of cache and the engine has "
                f"{limits.budget / _GIB:.2f} GiB; shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )

    def _begin(self, request: EngineRequest, deliver: Emit) -> None:
        """Note a request as live, and as one whose sequence is to be made."""
        with self._changed:
            if self._closing:
                raise _unloading()
            if self._death is not None:
                raise Unavailable(f"The engine has stopped: {self._death}")
            if request.request_id in self._live:
                raise BadRequest(f"Request {request.request_id!r} is already running.")
            self._live.add(request.request_id)
            self._building[request.request_id] = (request, deliver)

    def _build(self, request: EngineRequest, deliver: Emit, compiled: Future[CompiledGrammar] | None) -> None:
        """Make a request's sequence and hand it to the engine's thread. Runs in the builder's thread."""
        if not self._is_building(request):
            return
        command: Callable[[], None] | None = None
        try:
            command = self._command(request, deliver, compiled)
        except Exception as error:
            failure = Failed(as_error(error))
        with self._changed:
            if not self._is_building(request):
                return
            del self._building[request.request_id]
            if command is not None:
                self._commands.append(command)
                self._changed.notify()
        if command is None:
            deliver(failure)

    def _is_building(self, request: EngineRequest) -> bool:
        """Whether the request still waits for its sequence; it may have been cancelled, and sent again."""
        found = self._building.get(request.request_id)
        return found is not None and found[0] is request

    def _command(
        self, request: EngineRequest, deliver: Emit, compiled: Future[CompiledGrammar] | None
    ) -> Callable[[], None]:
        """What the engine's thread is to do for a request."""
        if request.sampling.num_beams != 1:
            job = self._builder.search(request, deliver)
            return lambda: self._beams.queue(job)
        sequence = self._sequence(request, deliver)
        if compiled is not None:
            sequence.sampler.mask = compiled.result().mask(
                request.sampling.max_tokens or 1, reasoning=request.reasoning, opened=request.reasoning_opened
            )
        return lambda: self._loop.add(sequence)

    def _sequence(self, request: EngineRequest, emit: Emit) -> Sequence:
        """The state of a new request."""
        return self._builder.sequence(request, emit)

    def _stop_building(self) -> list[Emit]:
        """Forget the requests whose sequences are not made yet; `_changed` is held. Returns who is to be told."""
        left, self._building = list(self._building.values()), {}
        return [deliver for _, deliver in left]

    def cancel(self, request_id: str) -> None:
        # A search that runs stops at its next token.
        self._beams.cancel(request_id)
        with self._changed:
            self._live.discard(request_id)
            self._building.pop(request_id, None)
            self._commands.append(lambda: self._cancel(request_id))
            self._changed.notify()

    def _cancel(self, request_id: str) -> None:
        self._loop.cancel(request_id)
        self._beams.cancel(request_id)

    def stats(self) -> EngineStats:
        return self._stats

    def check(self) -> None:
        if self._death is not None or not (self._thread.is_alive() or self._closing):
            raise ModelError(f"The engine's thread has died: {self._death}")

    def close(self, timeout: float = 30.0) -> None:
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            left = self._stop_building()
            self._changed.notify()
        for deliver in left:
            deliver(Failed(_unloading()))
        self._grammars.close()
        self._builder.close()
        self._thread.join(timeout)
        # A search whose job has ended stops at its next token.
        self._beams.fail_all(_unloading())
        self._thread.join(30.0)

    def _delivering(self, request: EngineRequest, emit: Emit) -> Emit:
        """`emit`, after whose last event the request is not live any more."""

        def deliver(event: EngineEvent) -> None:
            if isinstance(event, Failed) or (isinstance(event, Delta) and event.finish_reason is not None):
                self._live.discard(request.request_id)
            emit(event)

        return deliver

    # The engine's thread.

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                while self._take_commands():
                    self._step()
                    self._beams.run_next()
                self._end()
        except BaseException as error:
            logger.exception("The sequence engine's thread has died.")
            self._die(error)
        if self._deterministic is not None:
            self._deterministic.undo()
        self._packed.undo()
        self._stats = self._loop.stats()

    def _die(self, error: BaseException) -> None:
        """End every request, those that are on their way included."""
        stopped = Unavailable(f"The engine has stopped: {error}")
        with self._changed:
            self._death = error
            left, commands = self._stop_building(), self._commands
        for deliver in left:
            deliver(Failed(stopped))
        for command in commands:
            command()
        self._loop.fail_all(stopped)
        self._beams.fail_all(stopped)

    def _take_commands(self) -> bool:
        """Wait for work and carry out what was asked; False when the engine is to end."""
        with self._changed:
            while not (self._commands or self._closing) and self._loop.idle and self._beams.idle:
                self._changed.wait()
            commands, self._commands = self._commands, deque()
            closing = self._closing
        if closing:
            self._beams.fail_all(_unloading())
        for command in commands:
            self._carry_out(command)
        if not closing:
            return True
        self._loop.fail_waiting(_unloading())
        return not self._loop.idle and time.monotonic() < self._deadline

    def _carry_out(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:
            logger.exception("The batching engine failed; its requests are computed again.")
            self._loop.recover(error)

    def _step(self) -> None:
        try:
            self._loop.step()
        except Exception as error:
            logger.exception("A step of the batching engine failed; its requests are computed again, one at a time.")
            self._loop.recover(error)
        self._stats = self._loop.stats()

    def _end(self) -> None:
        self._loop.fail_all(_unloading())
        self._loop.store.clear()
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()


def _unloading() -> TroupeError:
    return Unavailable("The model is being unloaded; try again.")


def _held_length(length: int, loop: StepLoop) -> int:
    """The context's length, or what the budget holds of it: a text without max_tokens may become so long."""
    held = loop.batches.sequence_bytes.longest(loop.limits.budget, length)
    if held < length:
        logger.warning(
            "The %.3g GiB for caches hold %d tokens of one request, the model's context has %d: longer requests are "
            "refused. Set engine.memory_gib higher or engine.max_model_len lower.",
            loop.limits.budget / _GIB,
            held,
            length,
        )
    return held


def _step_loop(
    forward: Forward,
    capabilities: Capabilities,
    options: EngineOptions,
    deterministic: Deterministic | None,
    fixed: FixedDecode | None,
) -> StepLoop:
    """The step loop that options and capabilities ask for."""
    given = options.memory_gib
    budget = int(given * _GIB) if given is not None else default_budget(forward.device)
    share = budget // 2 if options.prefix_cache_gib is None else int(options.prefix_cache_gib * _GIB)
    keeps = options.prefix_cache and capabilities.chunks
    limits = Limits(
        max_batch_size=max(1, options.max_batch_size),
        budget=budget,
        split_bytes=weight_bytes(forward.model),
        mixes_lengths=capabilities.mixes,
        joins=deterministic is None or deterministic.strategy != "isolated",
        prefix_alignment=None if deterministic is None else max(1, options.prefill_chunk),
    )
    prefiller = Prefiller(
        forward,
        chunk=options.prefill_chunk,
        vocab_size=capabilities.logits_width,
        chunks=capabilities.chunks,
        pads=capabilities.pads and deterministic is None,
    )
    store = PrefixStore(min(share, budget) if keeps else 0)
    decode = None if fixed is None else fixed.decode
    lookup = prompt_lookup(
        forward, options.prompt_lookup, chunks=capabilities.chunks, deterministic=deterministic is not None
    )
    return StepLoop(forward, prefiller, store, capabilities.sequence_bytes, limits, decode, lookup)
