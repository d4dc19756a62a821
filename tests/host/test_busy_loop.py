"""A host's event loop goes on while requests are prepared, whatever they ask for."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.core.calls import GenerateCall, Grammar, SamplingParams, TokensPrompt
from deployments.core.errors import BadRequest
from deployments.core.events import Accepted, Event, Failed, Finished
from deployments.host.host import ModelHost
from tests.host.test_host import error_of, events_of, host_of, run
from tests.tiny import byte_tokenizer, llama

WIDTH = 30_000
LENGTH = 100_000
LONGEST_GAP = 0.05
THREADS: set[threading.Thread] = set()


def load_wide() -> dict[str, Any]:
    """A model with a large vocabulary and a long context."""
    alphabet, chance = sorted(pre_tokenizers.ByteLevel.alphabet()), random.Random(0)
    letters = [c for c in alphabet if c.isascii()]
    tokens = dict.fromkeys(alphabet)
    while len(tokens) < WIDTH:
        tokens["".join(chance.choices(letters, k=chance.randint(2, 12)))] = None
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    model = llama(vocab_size=WIDTH, hidden_size=16, intermediate_size=16, max_position_embeddings=2 * LENGTH)
    return {"model": model, "tokenizer": PreTrainedTokenizerFast(tokenizer_object=backend), "encode": _encode}


def load_noting() -> dict[str, Any]:
    """A model whose decode hook notes the threads that call it."""
    tokenizer = byte_tokenizer()

    def decode(token_ids: torch.Tensor, **options: Any) -> str:
        THREADS.add(threading.current_thread())
        return str(tokenizer.decode(token_ids, **options))

    return {"model": llama(), "tokenizer": tokenizer, "decode": decode}


def _encode(text: str, **_: Any) -> Any:
    raise NotImplementedError


@contextlib.asynccontextmanager
async def serving(loader: str, kind: str = "continuous_batching") -> AsyncIterator[ModelHost]:
    engine = {"kind": kind, "threads": 1, "memory_gib": 1, "pack_linears": False}
    async with host_of({"id": "a", "loader": f"{__name__}:{loader}", "engine": engine}) as host:
        await host.load("a")
        yield host


def asked(ids: Sequence[int] = (5, 6, 7), n: int = 1, **sampling: Any) -> GenerateCall:
    return GenerateCall(
        request_id=f"r{time.monotonic_ns()}",
        model="a",
        prompts=(TokensPrompt(token_ids=tuple(ids)),),
        sampling=SamplingParams(**{"max_tokens": 2, **sampling}),
        n=n,
        stream=True,
    )


async def longest_gap(host: ModelHost, call: GenerateCall) -> float:
    """CPU seconds that the loop's thread spends between two turns of a task, until the first token is there."""
    gaps: list[float] = []
    ended = False

    async def tick() -> None:
        last = time.thread_time()
        while not ended:
            await asyncio.sleep(0.001)
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    async with contextlib.aclosing(host.generate(call)) as events:
        async for event in events:
            assert not isinstance(event, Failed), event.error
            if not isinstance(event, Accepted) or len(call.prompts[0].token_ids) > 1000:  # type: ignore[union-attr]
                break
        # What is left of the request is prepared while nobody waits for it.
        await asyncio.sleep(0.05)
    ended = True
    await ticking
    return max(gaps)


def _texts(count: int, size: int) -> tuple[str, ...]:
    chance = random.Random(1)
    return tuple("".join(chance.choices("abcdefgh", k=size)) for _ in range(count))


COSTLY: dict[str, dict[str, Any]] = {
    "bad_words": {"bad_words": _texts(1024, 6)},
    "long_bad_words": {"bad_words": _texts(1024, 1000)},
    "stop": {"stop": _texts(1024, 1000)},
    "logit_bias": {"logit_bias": dict.fromkeys(range(WIDTH), 1.0)},
    "allowed_token_ids": {"allowed_token_ids": tuple(range(WIDTH)) * 20},
    "stop_token_ids": {"stop_token_ids": tuple(range(1000, 2024))},
    "logprobs": {"logprobs": -1, "logprob_token_ids": tuple(range(1024))},
    "whole_vocabulary": {"logprobs": -1},
    "prompt": {"ids": [i % WIDTH for i in range(LENGTH)], "repetition_penalty": 1.1},
    "scored_prompt": {"ids": [i % WIDTH for i in range(LENGTH)], "prompt_logprobs": 0},
    "choices": {"grammar": Grammar(kind="choice", source=str(list(_texts(1024, 40))).replace("'", '"'))},
    "many": {"n": 1024, "bad_words": _texts(64, 6), "stop": _texts(64, 6), "repetition_penalty": 1.1},
    "many_long": {"n": 64, "ids": [i % WIDTH for i in range(10_000)], "allowed_token_ids": tuple(range(WIDTH))},
}


def test_the_loop_goes_on_while_costly_requests_are_prepared() -> None:
    async def main() -> None:
        async with serving("load_wide") as host:
            gaps = {name: await longest_gap(host, asked(**fields)) for name, fields in COSTLY.items()}
            assert {name: gap for name, gap in gaps.items() if gap >= LONGEST_GAP} == {}

    run(main())


@pytest.mark.parametrize("kind", ["continuous_batching", "generate"])
def test_no_hook_is_called_on_the_loop(kind: str) -> None:
    """Bad words, grammars and a report of the whole vocabulary need the text of every token."""
    grammar = Grammar(kind="choice", source='["yes", "no"]')

    async def main() -> None:
        async with serving("load_noting", kind) as host:
            THREADS.clear()
            asks: list[dict[str, Any]] = [{"bad_words": ("ab",)}, {"logprobs": -1}, {"grammar": grammar}, {}]
            for fields in [*asks, *asks]:
                call = asked(max_tokens=5, **fields)
                assert isinstance((await events_of(host, call))[-1], Finished)
            assert THREADS
            assert threading.current_thread() not in THREADS

    run(main())


def test_a_refusal_comes_before_anything_else_of_a_stream() -> None:
    async def main() -> None:
        async with serving("load_noting") as host:
            for fields, param in (
                ({"stop_token_ids": (9999,)}, "stop_token_ids"),
                ({"logit_bias": {9999: 1.0}}, "logit_bias"),
                ({"allowed_token_ids": (1, 9999)}, "allowed_token_ids"),
                ({"ids": (1, 9999)}, "prompt"),
                ({"num_beams": 2, "prompt_logprobs": 0}, "prompt_logprobs"),
            ):
                events = await events_of(host, asked(**fields))  # type: ignore[arg-type]
                error = error_of(events)
                assert isinstance(error, BadRequest)
                assert (error.param, len(events)) == (param, 1)

    run(main())


def test_leaving_while_choices_are_queued_leaves_nothing_behind() -> None:
    async def main() -> None:
        async with serving("load_noting") as host:
            for delay in (0.0, 0.001, 0.01, 0.05):
                call = asked(n=1024, max_tokens=400, bad_words=("ab",))
                task = asyncio.create_task(events_of(host, call))
                await asyncio.sleep(delay)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            # Requests that come later find the engine free; its counters are those before its last step.
            for _ in range(2):
                events: list[Event] = await asyncio.wait_for(events_of(host, asked()), 20)
                assert isinstance(events[-1], Finished)
            (model,) = host.snapshot()["models"]
            assert (model["sequences"], model["waiting"]) == (0, 0)

    run(main())
