"""Random schedules: whatever joins, leaves, is cancelled or shares a beginning, every text is that of a solo run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent
from deployments.engine.base.protocol import EngineRequest
from tests.engine.architectures import decoder
from tests.engine.running import prompt
from tests.engine.stepped import Stepped
from tests.forms import forms

KINDS = ("llama", "gemma3_text", "falcon_h1", "qwen3_next")
SHORT, LONG = 4, 100
"""Schedules of each kind."""


@dataclass(frozen=True)
class Plan:
    """One request of a schedule: what it asks, the step it arrives at, and after how many tokens it is dropped."""

    shared: int
    shared_length: int
    own: int
    own_length: int
    max_tokens: int
    seed: int | None
    stop_token: int | None
    arrives: int
    dropped_after: int | None

    @property
    def ids(self) -> tuple[int, ...]:
        return (*prompt(self.shared, self.shared_length), *prompt(100 + self.own, self.own_length))

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            temperature=0.0 if self.seed is None else 0.8,
            seed=self.seed,
            stop_token_ids=() if self.stop_token is None else (self.stop_token,),
        )


plans = st.builds(
    Plan,
    shared=st.integers(0, 2),
    shared_length=st.sampled_from([0, 0, 20, 45, 70]),
    own=st.integers(0, 5),
    own_length=st.integers(1, 50),
    max_tokens=st.integers(1, 20),
    seed=st.one_of(st.none(), st.integers(0, 3)),
    stop_token=st.one_of(st.none(), st.integers(3, 60)),
    arrives=st.integers(0, 25),
    dropped_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
)


@dataclass
class Client:
    """What one request has received."""

    plan: Plan
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    dropped: bool = False

    def emit(self, event: EngineEvent) -> None:
        assert isinstance(event, Delta), event
        assert not self.dropped
        assert self.finish_reason is None
        self.token_ids.extend(event.token_ids)
        self.finish_reason = event.finish_reason


@cache
def model(kind: str) -> Any:
    return decoder(kind)


@cache
def crowd(kind: str) -> Stepped:
    return Stepped(model(kind), max_batch_size=4, prefill_chunk=24, prefix_cache_gib=0.0005)


@cache
def hermit(kind: str) -> Stepped:
    return Stepped(model(kind), max_batch_size=1, prefix_cache=False)


def add(engine: Stepped, name: str, client: Client) -> None:
    request = EngineRequest(request_id=name, input_ids=list(client.plan.ids), sampling=client.plan.sampling)
    engine.queue(request, client.emit)


@cache
def solo(kind: str, ids: tuple[int, ...], seed: int | None, stop_token: int | None, max_tokens: int) -> Client:
    client = Client(Plan(0, 0, 0, 0, max_tokens, seed, stop_token, 0, None))
    engine = hermit(kind)
    request = EngineRequest(request_id="solo", input_ids=list(ids), sampling=client.plan.sampling)
    engine.queue(request, client.emit)
    engine.run()
    return client


def play(kind: str, schedule: list[Plan]) -> list[Client]:
    engine = crowd(kind)
    loop = engine.loop
    clients = [Client(plan) for plan in schedule]
    step = 0
    while step <= max(plan.arrives for plan in schedule) or not loop.idle:
        for i, client in enumerate(clients):
            if client.plan.arrives == step:
                add(engine, str(i), client)
            after = client.plan.dropped_after
            if after is not None and client.plan.arrives <= step and len(client.token_ids) >= after:
                client.dropped = True
                engine.cancel(str(i))
        loop.step()
        step += 1
        assert step < 2000
    return clients


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@forms("examples", SHORT, LONG)
@pytest.mark.parametrize("kind", KINDS)
def test_every_text_is_that_of_a_solo_run(kind: str, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(schedule=st.lists(plans, min_size=1, max_size=8))
    def every_text(schedule: list[Plan]) -> None:
        check(kind, schedule)

    every_text()


def check(kind: str, schedule: list[Plan]) -> None:
    for client in play(kind, schedule):
        plan = client.plan
        alone = solo(kind, plan.ids, plan.seed, plan.stop_token, plan.max_tokens)
        if client.dropped:
            assert client.token_ids == alone.token_ids[: len(client.token_ids)]
        else:
            assert client.token_ids == alone.token_ids
            assert client.finish_reason == alone.finish_reason
    loop = crowd(kind).loop
    stats = loop.stats()
    assert stats.sequences == stats.waiting == stats.cache_bytes == 0
    entries = list(loop.store)
    assert stats.prefix_bytes == sum(entry.nbytes for entry in entries) <= loop.store.limit
    assert stats.prefix_entries == len({(tuple(entry.ids), entry.content_key) for entry in entries})
