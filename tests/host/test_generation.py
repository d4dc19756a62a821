"""One call through an engine: its choices, their seeds and order, what is merged and what is counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import pytest

from deployments.core.calls import GenerateCall, SamplingParams, TextPrompt
from deployments.core.errors import OutOfMemory
from deployments.core.events import Accepted, Delta, EngineEvent, Event, Failed, Finished
from deployments.core.logprobs import TokenLogprob
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.host.generation import Generation
from deployments.host.loaded_model import EncodedPrompt
from deployments.host.worker import Worker
from model_loaders.prompts.hooks import Encoded


class Echoes:
    """An engine that answers at once with what a function of the request gives."""

    max_model_len = 100

    def __init__(self, answer: Callable[[EngineRequest], Sequence[EngineEvent]]) -> None:
        self.requests: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self._answer = answer

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        self.requests.append(request)
        for event in self._answer(request):
            emit(event)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)


def word(request: EngineRequest) -> list[EngineEvent]:
    """The prompt's length and the seed, in two deltas."""
    return [
        Delta(text=f"{len(request.input_ids)}:", token_ids=(1,), cached_tokens=2),
        Delta(text=f"{request.sampling.seed}", token_ids=(2,), finish_reason="stop"),
    ]


@contextmanager
def queueing() -> Iterator[Worker]:
    worker = Worker("submit")
    try:
        yield worker
    finally:
        worker.stop()


def run(engine: Any, *texts: str, **fields: Any) -> list[Event]:
    async def main() -> list[Event]:
        sampling = fields.pop("sampling", SamplingParams(seed=7))
        call = GenerateCall(
            request_id="r", model="m", prompts=tuple(TextPrompt(text=t) for t in texts), sampling=sampling, **fields
        )
        prompts = [EncodedPrompt(text=t, encoded=Encoded(input_ids=list(t.encode()))) for t in texts]
        with (
            queueing() as worker,
            closing(Generation(engine, call, prompts, texts, interval=lambda: 0.01)) as generation,
        ):
            await generation.submit(worker)
            got: list[Event] = [generation.accepted]
            while not generation.ended:
                got += await generation.take()
        return got

    return asyncio.run(main())


def texts_of(events: list[Event]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, Delta):
            texts[event.choice] = texts.get(event.choice, "") + event.text
    return texts


def test_choices_are_ordered_by_prompt_and_each_has_a_seed_of_its_own() -> None:
    engine = Echoes(word)
    events = run(engine, "ab", "abc", n=2)
    assert texts_of(events) == {0: "2:7", 1: "2:8", 2: "3:7", 3: "3:8"}
    assert len({request.request_id for request in engine.requests}) == 4
    assert isinstance(events[0], Accepted)
    assert isinstance(events[-1], Finished)
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 8, 4)
    assert engine.cancelled == []


def test_without_a_stream_each_choice_is_one_delta() -> None:
    deltas = [event for event in run(Echoes(word), "ab", n=3) if isinstance(event, Delta)]
    assert [delta.choice for delta in deltas] == [0, 1, 2]
    assert all(delta.token_ids == (1, 2) and delta.finish_reason == "stop" for delta in deltas)


def test_echo_begins_with_the_prompt() -> None:
    assert texts_of(run(Echoes(word), "ab", echo=True)) == {0: "ab2:7"}


def test_best_of_keeps_the_likeliest_and_counts_all() -> None:
    def scored(request: EngineRequest) -> list[EngineEvent]:
        assert request.sampling.logprobs == 0
        assert request.sampling.seed is not None
        entry = TokenLogprob(token_id=1, token="x", bytes=b"x", logprob=-abs(request.sampling.seed - 9))
        return [Delta(text=f"{request.sampling.seed}", token_ids=(1,), logprobs=(entry,), finish_reason="stop")]

    events = run(Echoes(scored), "ab", n=2, best_of=4)
    assert texts_of(events) == {0: "9", 1: "8"}
    assert all(event.logprobs is None for event in events if isinstance(event, Delta))
    assert isinstance(events[-1], Finished)
    assert events[-1].usage.completion_tokens == 4


def test_a_failed_choice_fails_the_call_and_the_others_are_cancelled() -> None:
    def fails(request: EngineRequest) -> list[EngineEvent]:
        if request.sampling.seed == 8:
            return [Failed(OutOfMemory("no memory"))]
        return [Delta(text="begun", token_ids=(1,))]

    engine = Echoes(fails)
    events = run(engine, "ab", n=3, stream=True)
    assert isinstance(events[-1], Failed)
    assert sorted(engine.cancelled) == ["r#0", "r#1", "r#2"]


class Keeps:
    """An engine whose events come when the test says so."""

    max_model_len = 100

    def __init__(self) -> None:
        self.emits: list[Emit] = []

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        self.emits.append(emit)

    def cancel(self, request_id: str) -> None:
        pass


def failing(stream: bool, first: bool) -> list[Event]:
    """The events of a call of two choices whose last deltas come together with a failure."""

    async def main() -> list[Event]:
        call = GenerateCall(
            request_id="r", model="m", prompts=(TextPrompt(text="a"),), sampling=SamplingParams(), n=2, stream=stream
        )
        prompt = EncodedPrompt(text="a", encoded=Encoded(input_ids=[97]))
        engine = Keeps()
        generation = Generation(engine, call, [prompt], ["a"], interval=lambda: 0.01)  # type: ignore[arg-type]
        with queueing() as worker:
            await generation.submit(worker)
        got: list[Event] = [generation.accepted]
        if first:
            engine.emits[0](Delta(text="one", token_ids=(1,)))
        if first and stream:
            got += await generation.take()
        engine.emits[0](Delta(text="two", token_ids=(2,)))
        engine.emits[1](Delta(text="other", token_ids=(3,)))
        engine.emits[0](Failed(OutOfMemory("no memory")))
        while not generation.ended:
            got += await generation.take()
        return got

    return asyncio.run(main())


def test_a_stream_that_fails_shows_what_it_had() -> None:
    events = failing(stream=True, first=True)
    assert texts_of(events) == {0: "onetwo", 1: "other"}
    assert isinstance(events[-1], Failed)


@pytest.mark.parametrize(("stream", "first"), [(True, False), (False, True), (False, False)])
def test_what_has_shown_nothing_fails_as_a_whole(stream: bool, first: bool) -> None:
    accepted, failed = failing(stream, first)
    assert isinstance(accepted, Accepted)
    assert isinstance(failed, Failed)
