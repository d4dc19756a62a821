"""The engine that batches continuously: requests of any length join and leave the running sequences at any step."""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch

from deployments.adapters.lora_file import LoraFile
from deployments.config.engine import EngineOptions
from deployments.core.cgroup import cores
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.engine.adapters.table import AdapterTable, PlacedAdapter
from deployments.engine.base.admission import ALL_PARAMS, INSIDE_PARAMS, check_media, context_length, encodes_prompts
from deployments.engine.base.failures import as_error, unloading
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from deployments.engine.base.text_side import TextSide
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.batching.beam_jobs import BeamJobs, check_search
from deployments.engine.batching.memory import default_budget, weight_bytes
from deployments.engine.batching.prefill import Prefiller, default_chunk
from deployments.engine.batching.prefix_cache import PrefixStore
from deployments.engine.batching.prompt_lookup import prompt_lookup
from deployments.engine.batching.running_batches import Limits
from deployments.engine.batching.sequence_builder import SequenceBuilder
from deployments.engine.batching.step_loop import StepLoop
from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from deployments.engine.inside.catalogue import Catalogue, Portable
from deployments.engine.inside.inspected import Inspected
from deployments.engine.inside.measure import measure
from deployments.engine.inside.resolve import Resolver
from deployments.engine.model.forward import Forward
from deployments.engine.model.patches import Patches
from deployments.engine.speedups.deterministic import Steady, Strategy, make_deterministic
from deployments.engine.speedups.fixed_decode import FixedDecode, fixed_decode
from deployments.engine.speedups.packed_linear import pack_linears
from deployments.engine.speedups.traced_decode import traced_decode
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.capabilities import Capabilities
from deployments.engine.verify.encoder_inputs import encoder_inputs, encoder_needs
from deployments.engine.verify.proofs import DETERMINISTIC, FORWARD, INSIDE, PACKED, ROTARY, Proofs
from deployments.engine.verify.row_probe import watch_modules
from model_loaders.contract import ModelInfo

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GIB = 1 << 30
_LOOK_EVERY_S = 1.0


class BatchingEngine(ThreadedEngine):
    """Serves one model through its stock `forward`, on a thread of its own. See `protocol.Engine`.

    Args:
        info: the loaded model.
        vocabulary: of the model.
        options: see `EngineOptions`.
        proofs: notes what is proved of the model.
        inside: requests may capture states of the model, and change them.

    Raises:
        UnknownLayer: the model's cache is none that sequences can hold.
    """

    kind = "continuous_batching"
    last_step_s = 30.0

    def __init__(
        self,
        info: ModelInfo,
        vocabulary: Vocabulary,
        options: EngineOptions,
        proofs: Proofs | None = None,
        *,
        inside: bool = True,
    ) -> None:
        super().__init__()
        proofs = proofs or Proofs()
        info.model.eval()
        self._cores = options.threads or min(torch.get_num_threads(), cores())
        # What is measured and proved at load is so with as many threads as later.
        torch.set_num_threads(self._cores)
        self._context = context_length(info, options)
        # A search computes with other shapes than the fixed ones of the deterministic mode.
        self.supports = (ALL_PARAMS | INSIDE_PARAMS) - ({"num_beams"} if options.deterministic else set())
        self.supports -= set() if inside else INSIDE_PARAMS
        self._needs = encoder_needs(info.model)
        self._vocabulary = vocabulary
        self._forward = _forward(info.model, self._context, vocabulary.text_side, proofs)
        with torch.inference_mode(), proofs.of(FORWARD) as note:
            self.capabilities = Capabilities.known(self._forward, self._context, proofs)
            note.found = str(self.capabilities)
        self.inside = Resolver(Catalogue([], {}), {}, {}, self._forward.device)
        if inside:
            catalogue = _inside(self._forward, self.capabilities, vocabulary.text_side, proofs)
            hooks = self.hook_watch.watched(info.hooks)
            self.inside = Resolver(catalogue, hooks, info.vectors, self._forward.device)
        self._grammars = GrammarCompiler(self._vocabulary, self.capabilities.logits_width)
        if options.static_cache:
            logger.warning("Engine option static_cache=True has no effect on sequences: their caches grow.")
        self._beams = BeamJobs(info.model, self._vocabulary, self._context)
        self._builder = SequenceBuilder(self._forward, self._vocabulary, self.capabilities.logits_width)
        self._commands: deque[Callable[[], None]] = deque()
        self._patches = Patches()
        try:
            self._loop = self._patched_loop(options, proofs)
            self.max_model_len = _held_length(self._context, self._loop)
            self.encodes_prompts = encodes_prompts(info.model)
            self._stats = self._loop.stats()
            self._start("batching-engine")
        except BaseException:
            self._patches.close()
            self._release()
            raise

    def _patched_loop(self, options: EngineOptions, proofs: Proofs) -> StepLoop:
        """The step loop, over a model that is changed as the options say."""
        forward = self._forward
        fixed = fixed_decode(forward, options)
        # torch.compile cannot read a packed weight.
        wanted = False if fixed is not None else options.pack_linears
        with proofs.of(PACKED) as note:
            packed = pack_linears(forward.model, self._patches, wanted, recall=partial(proofs.recall, PACKED))
            note.found = f"{packed} modules" if packed else ""
        deterministic = None
        if options.deterministic:
            with proofs.of(DETERMINISTIC) as note:
                steady = proofs.recall(DETERMINISTIC, Steady)
                deterministic = make_deterministic(forward, options.max_batch_size, self._patches, steady)
                note.found = deterministic
        self.adapters = forward.adapters = self._adapter_table(deterministic)
        return step_loop(forward, self.capabilities, options, deterministic, fixed)

    def _adapter_table(self, deterministic: Strategy | None) -> AdapterTable:
        """The adapters over the model, whose modules have the forwards by now that they keep."""
        groups = self.capabilities.pads and deterministic is None
        watch = partial(watch_modules, self._forward, groups=groups)
        return AdapterTable(
            self._forward.model,
            row_by_row=deterministic is not None,
            watch=None if deterministic == "isolated" else watch,
        )

    def add_adapter(self, key: str, file: LoraFile, dtype: torch.dtype = torch.float32) -> PlacedAdapter:
        """See `protocol.AdapterEngine`."""
        fitted = self.adapters.fit(file, dtype)
        return self._between_steps(lambda: self.adapters.add(key, fitted))

    def remove_adapter(self, key: str) -> None:
        """See `protocol.AdapterEngine`."""

        def remove() -> None:
            self.adapters.remove(key)
            self._loop.store.forget(key)

        self._between_steps(remove)

    def _between_steps(self, function: Callable[[], T]) -> T:
        """What a function returns or raises that the engine's thread calls between two steps. Blocks.

        Raises:
            TroupeError: the engine closes, or its thread has died.
        """
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        with self._changed:
            if self._closing:
                raise unloading()
            self._commands.append(call)
            self._changed.notify()
        while True:
            with contextlib.suppress(TimeoutError):
                return done.result(_LOOK_EVERY_S)
            self.check()

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        """See `protocol.Engine`. The sequence is made in a thread of the engine: the caller may be an event loop."""
        params = request.sampling
        inputs = self._forward.model.get_input_embeddings().weight.shape[0]
        self._check_request(request, self._context, inputs)
        check_media(request, self._needs)
        if params.num_beams != 1:
            check_search(params)
        else:
            self._check_bytes(request)
        inspected = self.inspected(request)
        compiled = self._grammars.compile(params.grammar) if params.grammar is not None else None
        live = self._admit(request, emit, counted=False)

        def build() -> None:
            self._build(live, compiled, inspected)

        if compiled is None:
            self._builder.run(params, build)
        else:
            compiled.add_done_callback(lambda _: self._builder.run(params, build))

    def inspected(self, request: EngineRequest) -> Inspected | None:
        """What a request captures and changes inside the model; None if nothing.

        Raises:
            BadRequest: it cannot be captured or changed.
        """
        params = request.sampling
        if params.num_beams != 1 and (params.capture is not None or params.interventions):
            raise UnsupportedParameter(
                "A beam search cannot be captured or changed; leave out 'num_beams', or 'capture' and 'interventions'.",
                param="num_beams",
            )
        if params.num_beams != 1:
            return None
        return self.inside.inspected(params, self._builder.lengths(request)[0], request.inspect)

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

    def _build(self, live: LiveRequest, compiled: Future[CompiledGrammar] | None, inspected: Inspected | None) -> None:
        """Make a request's sequence and hand it to the engine's thread. Runs in the builder's thread."""
        if not live.active:
            return
        try:
            command = self._command(live, compiled, inspected)
        except Exception as error:
            live.fail(as_error(error))
            return
        with self._changed:
            if live.active:
                self._commands.append(command)
                self._changed.notify()

    def _command(
        self, live: LiveRequest, compiled: Future[CompiledGrammar] | None, inspected: Inspected | None
    ) -> Callable[[], None]:
        """What the engine's thread is to do for a request."""
        if live.request.sampling.num_beams != 1:
            job = self._beams.job(live)
            return lambda: self._beams.queue(job)
        sequence = self._builder.sequence(live, inspected)
        sequence.group = self.adapters.group(live.request.adapter)
        if compiled is not None:
            sequence.sampler.mask = compiled.result().mask_of(live.request)
        return lambda: self._loop.add(sequence)

    def _drop(self, live: LiveRequest) -> None:
        with self._changed:
            self._commands.append(lambda: self._loop.drop(live))
            self._changed.notify()

    def stats(self) -> EngineStats:
        return self._stats

    def _release(self) -> None:
        self._grammars.close()
        self._builder.close()

    # The engine's thread.

    def _work(self) -> None:
        torch.set_num_threads(self._cores)
        try:
            with torch.inference_mode():
                while self._take_commands():
                    self._step()
                    self._beams.run_next(self.adapters)
        finally:
            self._patches.close()
            self._loop.clear()
            self._stats = self._loop.stats()

    def _take_commands(self) -> bool:
        """Wait for work and carry out what was asked; False when the engine closes and nothing is left to do."""
        with self._changed:
            while not (self._commands or self._closing) and self._idle:
                self._changed.wait()
            commands, self._commands = self._commands, deque()
        for command in commands:
            self._carry_out(command)
        return not (self._closing and self._idle)

    @property
    def _idle(self) -> bool:
        return self._loop.idle and self._beams.idle

    def _carry_out(self, command: Callable[[], None]) -> None:
        try:
            command()
        except Exception as error:
            logger.exception("The batching engine failed; its requests are computed again.")
            self._loop.recovery.after_step(error)

    def _step(self) -> None:
        try:
            self._loop.step()
        except Exception as error:
            logger.exception("A step of the batching engine failed; its requests are computed again, one at a time.")
            self._loop.recovery.after_step(error)
        self._stats = self._loop.stats()


def _forward(model: Any, limit: int, text_side: TextSide, proofs: Proofs) -> Forward:
    """The model's forward passes, which know the model's rotary frequencies."""
    with proofs.of(ROTARY) as note:
        forward = Forward(model, limit, encoder_inputs(model, text_side))
        note.found = "follow the length" if forward.rotary.depends else ""
    return forward


def _inside(forward: Forward, capabilities: Capabilities, text_side: TextSide, proofs: Proofs) -> Catalogue:
    """What requests may capture and change inside the model."""
    with torch.inference_mode(), proofs.of(INSIDE) as note:

        def prove() -> Portable:
            found = measure(forward, pads=capabilities.pads, mixes=capabilities.mixes, text_side=text_side)
            return found.portable()

        catalogue = Catalogue.of_model(forward.model, proofs.recall(INSIDE, prove))
        offered = sum(entry.capturable for entry in catalogue.entries.values())
        note.found = f"{offered} of {len(catalogue.entries)} modules"
    return catalogue


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


def step_loop(
    forward: Forward,
    capabilities: Capabilities,
    options: EngineOptions,
    deterministic: Strategy | None = None,
    fixed: FixedDecode | None = None,
) -> StepLoop:
    """The step loop that options and capabilities ask for."""
    budget = default_budget(forward.device) if options.memory_gib is None else int(options.memory_gib * _GIB)
    if fixed is not None:
        fixed.memory = budget // 3
        budget -= fixed.memory
    share = budget // 2 if options.prefix_cache_gib is None else int(options.prefix_cache_gib * _GIB)
    chunk = options.prefill_chunk or default_chunk(forward.device)
    limits = Limits(
        max_batch_size=options.max_batch_size,
        budget=budget,
        split_bytes=weight_bytes(forward.model),
        mixes_lengths=capabilities.mixes,
        joins=deterministic != "isolated",
        prefix_alignment=None if deterministic is None else chunk,
        separates_inspected=fixed is not None,
    )
    prefiller = Prefiller(
        forward,
        chunk=chunk,
        vocab_size=capabilities.logits_width,
        chunks=capabilities.chunks,
        pads=capabilities.pads and deterministic is None,
    )
    prefiller.separates_inspected = limits.separates_inspected
    chunks = capabilities.chunks
    lookup = prompt_lookup(forward, options.prompt_lookup, chunks=chunks, deterministic=deterministic is not None)
    store = PrefixStore(min(share, budget) if options.prefix_cache and chunks else 0)
    replayed = fixed or traced_decode(forward, options)
    return StepLoop(forward, prefiller, store, capabilities.sequence_bytes, limits, replayed, lookup)
