"""How many generators an event passes on the models' side."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import pytest

from deployments.config.app import parse_args
from deployments.core.calls import GenerateCall, SamplingParams, TextPrompt
from deployments.core.events import Event, Finished
from deployments.host.host import ModelHost
from tests.tiny import byte_tokenizer, llama

_CONTEXTS = {"lease", "_leased", "traced"}


def load_model() -> dict[str, Any]:
    return {"model": llama(), "tokenizer": byte_tokenizer()}


async def generators_of(host: ModelHost, call: GenerateCall) -> tuple[list[str], list[Event]]:
    """The async generators that are begun for a call, without those of context managers; and its events."""
    begun: list[str] = []
    kept = sys.get_asyncgen_hooks()

    def note(generator: AsyncGenerator[Any, Any]) -> None:
        begun.append(generator.__name__)
        if kept.firstiter is not None:
            kept.firstiter(generator)

    sys.set_asyncgen_hooks(firstiter=note, finalizer=kept.finalizer)
    try:
        async with aclosing(host.generate(call)) as events:
            got = [event async for event in events]
    finally:
        sys.set_asyncgen_hooks(*kept)
    return [name for name in begun if name not in _CONTEXTS], got


@pytest.mark.parametrize("fields", [{"stream": True}, {"n": 2}, {"n": 1, "best_of": 2}])
def test_an_event_passes_one_generator_from_the_engine_to_the_replica(fields: dict[str, Any]) -> None:
    async def main() -> None:
        args = {"models": [{"id": "a", "loader": f"{__name__}:load_model"}]}
        host = ModelHost(parse_args(args), "cpu")
        call = GenerateCall(
            request_id="r",
            model="a",
            prompts=(TextPrompt(text="hi"),),
            sampling=SamplingParams(temperature=0, max_tokens=4),
            **fields,
        )
        try:
            begun, events = await generators_of(host, call)
        finally:
            await host.close()
        assert isinstance(events[-1], Finished)
        assert begun == ["generate"]

    asyncio.run(asyncio.wait_for(main(), 60))
