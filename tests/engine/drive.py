"""Running requests through an engine and collecting what comes out."""

from __future__ import annotations

import itertools
import queue
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.core.calls import SamplingParams
from deployments.core.errors import TroupeError
from deployments.core.events import Delta, EngineEvent, PromptScores
from deployments.core.logprobs import TokenLogprob
from deployments.engine.base.protocol import Engine, EngineRequest

_numbers = itertools.count()


@dataclass
class Run:
    """One request on its way."""

    engine: Engine
    request_id: str
    events: queue.Queue[EngineEvent] = field(default_factory=queue.Queue)
    deltas: list[Delta] = field(default_factory=list)
    scores: PromptScores | None = None
    error: TroupeError | None = None

    def next(self, timeout: float = 30.0) -> EngineEvent:
        event = self.events.get(timeout=timeout)
        if isinstance(event, Delta):
            self.deltas.append(event)
        elif isinstance(event, PromptScores):
            self.scores = event
        else:
            self.error = event.error
        return event

    def wait(self, timeout: float = 30.0) -> Run:
        """Until the last event, after which nothing may follow."""
        while not self.ended:
            self.next(timeout)
        return self

    def result(self, timeout: float = 30.0) -> Run:
        """The same, and the request must not have failed."""
        self.wait(timeout)
        if self.error is not None:
            raise self.error
        return self

    @property
    def ended(self) -> bool:
        return self.error is not None or (bool(self.deltas) and self.deltas[-1].finish_reason is not None)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason


def start(
    engine: Engine,
    input_ids: Sequence[int],
    *,
    model_inputs: Mapping[str, torch.Tensor] | None = None,
    content_key: str = "",
    **kwargs: Any,
) -> Run:
    """Submit a request; `kwargs` are its sampling parameters, greedy and 16 tokens unless they say otherwise."""
    kwargs = {"temperature": 0.0, "max_tokens": 16, **kwargs}
    run = Run(engine, f"r{next(_numbers)}")
    request = EngineRequest(
        request_id=run.request_id,
        input_ids=list(input_ids),
        sampling=SamplingParams(**kwargs),
        model_inputs=model_inputs or {},
        content_key=content_key,
    )
    engine.submit(request, run.events.put)
    return run


def ask(engine: Engine, input_ids: Sequence[int], **kwargs: Any) -> Run:
    """Submit a request and wait for its end."""
    return start(engine, input_ids, **kwargs).result()


def greedy(model: Any, input_ids: Sequence[int], count: int, **kwargs: Any) -> list[int]:
    """What `generate` alone gives: `count` new tokens, no terminator."""
    ids = torch.tensor([list(input_ids)])
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=1 << 30,
            pad_token_id=0,
            **kwargs,
        )
    begun = 1 if model.config.is_encoder_decoder else len(input_ids)
    tokens: list[int] = found[0, begun:].tolist()
    return tokens
