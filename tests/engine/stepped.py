"""A step loop put together from its parts, whose steps the test makes itself: no thread computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.admission import context_length
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.batching.engine import step_loop
from deployments.engine.batching.sequence import Sequence
from deployments.engine.batching.sequence_builder import SequenceBuilder
from deployments.engine.batching.step_loop import StepLoop
from deployments.engine.cache.sequence_bytes import SequenceBytes
from deployments.engine.inside.measure import measure
from deployments.engine.inside.resolve import Resolver
from deployments.engine.model.forward import Forward
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.capabilities import Capabilities
from deployments.engine.verify.encoder_inputs import encoder_inputs
from model_loaders.prompts.hooks import Hooks
from tests.engine.running import model_info


class Stepped:
    """A step loop and what makes its sequences.

    Args:
        model: a tiny model.
        limits: changes to the limits that follow from the options, by what a sequence costs.
        options: of `EngineOptions`.

    Attributes:
        texts: the tokens of each request that `add` has queued.
        hooks: of the loader, for interventions.
    """

    def __init__(
        self, model: Any, *, limits: Callable[[SequenceBytes], dict[str, int]] | None = None, **options: Any
    ) -> None:
        model.eval()
        info = model_info(model)
        vocabulary = Vocabulary(Hooks(info))
        chosen = EngineOptions(**{"memory_gib": 0.25, **options})
        context = context_length(info, chosen)
        forward = Forward(model, context, encoder_inputs(model, vocabulary.text_side))
        with torch.inference_mode():
            capabilities = Capabilities.measure(forward, context)
        sizes = capabilities.sequence_bytes
        self.loop = step_loop(forward, capabilities, chosen)
        if limits is not None:
            changed = dataclasses.replace(self.loop.limits, **limits(sizes))
            self.loop = StepLoop(forward, self.loop.prefiller, self.loop.store, sizes, changed)
        self._builder = SequenceBuilder(forward, vocabulary, capabilities.logits_width)
        self._builder.close()
        self._measure = partial(
            measure, forward, pads=capabilities.pads, mixes=capabilities.mixes, text_side=vocabulary.text_side
        )
        self.hooks: dict[str, Callable[..., Any]] = {}
        self._live: dict[str, LiveRequest] = {}
        self.texts: dict[str, list[int]] = {}

    def sequence(self, request: EngineRequest, emit: Emit) -> Sequence:
        """The state of a request, which is not queued."""
        self._live[request.request_id] = live = LiveRequest(request, emit)
        params = request.sampling
        if params.capture is None and not params.interventions:
            return self._builder.sequence(live)
        return self._builder.sequence(live, self._resolver.inspected(params, len(request.input_ids)))

    @cached_property
    def _resolver(self) -> Resolver:
        with torch.inference_mode():
            return Resolver(self._measure(), self.hooks, {}, torch.device("cpu"))

    def queue(self, request: EngineRequest, emit: Emit) -> None:
        """Queue a request."""
        self.loop.add(self.sequence(request, emit))

    def add(self, name: str, ids: list[int], max_tokens: int = 2) -> None:
        """Queue a greedy request, which must not fail."""
        tokens = self.texts[name] = []

        def emit(event: EngineEvent) -> None:
            assert isinstance(event, Delta), event
            tokens.extend(event.token_ids)

        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        self.queue(EngineRequest(request_id=name, input_ids=ids, sampling=sampling), emit)

    def cancel(self, name: str) -> None:
        """End a request between two steps."""
        self._live[name].cancel()
        with torch.inference_mode():
            self.loop.drop(self._live[name])

    def run(self) -> int:
        """The steps it takes until nothing is left to do."""
        steps = 0
        with torch.inference_mode():
            while not self.loop.idle:
                self.loop.step()
                steps += 1
        return steps
