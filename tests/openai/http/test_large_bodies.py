"""Bodies of megabytes: what is done with them is done off the event loop, and in small steps."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from deployments.core.calls import Call, ChatPrompt, GenerateCall, Prompt, SamplingParams, TextPrompt, TokensPrompt
from deployments.core.client import Embeddings, EmbedOptions, Rendered
from deployments.core.errors import BadRequest, shown
from deployments.core.events import Accepted, Delta, Event, Finished, Usage
from deployments.core.model_card import ModelCard
from deployments.large_messages import pack, unpack
from deployments.openai.app import build_api
from deployments.openai.chat.plan import conversation_key
from deployments.openai.http.body import MAX_DEPTH, MAX_OBJECTS, parse_object

IDS = random.Random(0).choices(range(1, 100_000), k=400_000)
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MANY = [{"role": "user", "content": f"message {i}"} for i in range(50_000)]
PARTS = [{"role": "user", "content": [{"type": "text", "text": f"part {i}"} for i in range(50_000)]}]
IMAGE = [{"type": "image_url", "image_url": {"url": "data:," + "x" * 8_000_000}}]
WRONG = {str(i): "x" for i in range(200_000)}
CALLS: dict[str, tuple[str, Any, int | None]] = {
    "ids": ("/v1/completions", {"prompt": IDS}, 200),
    "ids of which the last is wrong": ("/v1/completions", {"prompt": [*IDS, -1]}, 400),
    "lists of ids": ("/v1/completions", {"prompt": [IDS[:200_000], IDS[200_000:]]}, 200),
    "ids to embed": ("/v1/embeddings", {"input": IDS}, 200),
    "ids to spell": ("/v1/detokenize", {"tokens": IDS}, 200),
    "messages": ("/v1/chat/completions", {"messages": MANY}, 200),
    "messages of which the last is wrong": ("/v1/chat/completions", {"messages": [*MANY, {"role": 3}]}, 400),
    "parts": ("/v1/chat/completions", {"messages": PARTS}, 200),
    "items": ("/v1/responses", {"input": MANY}, 200),
    "messages to tokenize": ("/v1/tokenize", {"messages": MANY}, 200),
    "messages to score": ("/v1/score", {"messages": MANY, "choices": ["a"]}, None),
    "a bias": ("/v1/chat/completions", {**CHAT, "logit_bias": {str(i): 1.5 for i in range(100_000)}}, 200),
    "a bias that is wrong": ("/v1/chat/completions", {**CHAT, "logit_bias": WRONG}, 400),
    "stop ids that are wrong": ("/v1/chat/completions", {**CHAT, "stop_token_ids": ["x"] * 500_000}, 400),
    "allowed ids": ("/v1/chat/completions", {**CHAT, "allowed_token_ids": IDS}, 200),
    "a nested value": ("/v1/chat/completions", {**CHAT, "documents": [[[{"a": [0]}]]] * 60_000}, 200),
    "a value of the wrong kind": ("/v1/chat/completions", {**CHAT, "temperature": MANY}, 400),
    "an image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": IMAGE}]}, 200),
}


class Replica:
    """A `ModelClient` that answers at once: what is measured is the API alone.

    Args:
        ids: of every prompt and of every answer.
    """

    card = ModelCard(id="m", aliases=())

    def __init__(self, ids: Sequence[int] = (1,)) -> None:
        self.ids = ids

    def models(self) -> list[ModelCard]:
        return [self.card]

    def resolve(self, name: str) -> ModelCard:
        return self.card

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        assert isinstance(call, GenerateCall)
        count = len(call.prompts)
        yield Accepted(prompt_token_ids=(self.ids,) * count, prompt_texts=("a",) * count)
        for choice in range(count * call.n):
            yield Delta(choice=choice, text="a", token_ids=self.ids, finish_reason="stop")
        yield Finished(usage=Usage(prompt_tokens=1))

    async def render(self, model: str, prompt: Prompt, *, expect: str = "") -> Rendered:
        return Rendered(text="a", token_ids=self.ids, max_model_len=10)

    async def detokenize(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> str:
        return "a"

    async def embed(
        self, model: str, prompts: Sequence[Prompt], options: EmbedOptions, *, expect: str = ""
    ) -> Embeddings:
        return Embeddings(vectors=(b"\0\0\0\0",) * len(prompts), prompt_tokens=1)

    async def tokenizer_info(self, model: str, *, expect: str = "") -> dict[str, Any]:
        return {"chat_template": "", "chat_templates": None, "response_template": None, "fingerprint": ""}

    async def load(self, model: str) -> None:
        raise NotImplementedError

    async def unload(self, model: str) -> bool:
        raise NotImplementedError

    async def spell(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[str, ...]:
        raise NotImplementedError

    async def ready(self) -> None:
        """Nothing to wait for."""

    async def status(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    async def drain(self, on: bool = True) -> None:
        raise NotImplementedError


async def ask(app: ASGIApp, path: str, content: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """The status and the body of an answer, computed in this event loop."""
    sent: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]
    answered: list[Message] = []
    gone = asyncio.Event()

    async def receive() -> Message:
        if not sent:
            await gone.wait()
        return sent.pop() if sent else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        answered.append(message)

    given = {"content-type": "application/json", **(headers or {})}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {
        "type": "http",
        "method": "POST" if content else "GET",
        "path": path,
        "headers": pairs,
        "query_string": b"",
        "state": {},
    }
    await app({**scope, "http_version": "1.1", "root_path": "", "scheme": "http"}, receive, send)
    return answered[0]["status"], b"".join(message.get("body", b"") for message in answered)


@pytest.mark.parametrize("case", CALLS)
def test_the_loop_has_next_to_nothing_to_do_with_a_large_body(case: str) -> None:
    path, fields, status = CALLS[case]
    content = json.dumps({"max_tokens": 1, **fields} if "completions" in path else fields).encode()
    app = build_api(Replica())

    async def measured() -> tuple[int, bytes, float, float]:
        await ask(app, path, b"{}")
        loop, process = time.thread_time(), time.process_time()
        status, body = await ask(app, path, content)
        return status, body, time.thread_time() - loop, time.process_time() - process

    found, body, on_loop, everywhere = asyncio.run(measured())
    assert status is None or found == status, body[:500]
    assert "huge-bodies" in {thread.name for thread in threading.enumerate()}
    assert on_loop < 0.3 * everywhere, f"{on_loop:.3f} of {everywhere:.3f} s on the loop"


def value(draw: random.Random, depth: int) -> Any:
    """Any JSON value, often a long one."""
    kind = draw.randrange(8 if depth < 4 else 6)
    if kind < 6:
        text = "".join(draw.choices('ab"\\[]{},:\n é😀\x7f', k=draw.randrange(200)))
        return [None, True, draw.randrange(-9, 10**9), draw.random() * 1e9, text, "x" * 9000][kind]
    items = [value(draw, depth + 1) for _ in range(draw.choice([0, 1, 3, 30]))]
    return items if kind == 6 else {f"{i}{'k' * draw.randrange(20)}\\": item for i, item in enumerate(items)}


@pytest.mark.parametrize("seed", range(20))
def test_a_large_body_is_read_as_json_has_it(seed: int) -> None:
    draw = random.Random(seed)
    given = {"ids": list(range(30_000)), "floats": [1.5e-7, -2] * 3000, "a": [value(draw, 0) for _ in range(30)]}
    given["b"] = {str(i): value(draw, 0) for i in range(30)}
    indent = draw.choice([None, 1])
    assert parse_object(json.dumps(given, ensure_ascii=draw.random() < 0.5, indent=indent).encode()) == given


FILLER = "0," * 50_000


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'{{"a": [{FILLER}]}}', "Expecting value at line 1, column 100008"),
        (f'{{"a": [{FILLER}1 2]}}', "Expecting ',' delimiter at line 1"),
        (f'{{"a": [{FILLER}1], b: 2}}', "Expecting property name enclosed in double quotes"),
        (f'{{"a": [{FILLER}1], "b" 2}}', "Expecting ':' delimiter"),
        (f'{{"a": [{FILLER}1]', "Expecting ',' delimiter"),
        (f'{{"a": [{FILLER}1]}} x', "Extra data"),
        (f'{{"a": [{FILLER}NaN]}}', "NaN is not a JSON value"),
        (f'{{"a": [{FILLER}1e999]}}', "the number 1e999 is out of range"),
        (f'{{"a": [{FILLER}"\\ud800"]}}', "surrogate"),
        (f'{{"a": [{FILLER}1], "\\ud800": 1}}', "surrogate"),
        (f'{{"a": [{FILLER}{{"b": ["\\ud800"]}}]}}', "surrogate"),
        (f"[{FILLER}1]", "it is an array"),
        (" " * 100_000, "the body is empty"),
        (f'{{"a": [{FILLER}{"[" * MAX_DEPTH}{"]" * MAX_DEPTH}]}}', f"deeper than {MAX_DEPTH}"),
        (f'{{"a": {"[" * 90_000}{"]" * 90_000}}}', f"deeper than {MAX_DEPTH}"),
        (f'{{"a": [{"[],{}," * MAX_OBJECTS}1]}}', f"more than {MAX_OBJECTS} objects"),
        (f'{{"a": [{"[[],{}]," * (MAX_OBJECTS // 2)}1]}}', f"more than {MAX_OBJECTS} objects"),
    ],
)
def test_what_is_wrong_with_a_large_body(text: str, told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_object(text.encode())
    assert told in caught.value.message
    assert caught.value.code == "invalid_json"


def test_brackets_in_texts_are_not_objects() -> None:
    texts = ["[{" * 1000] * 1000
    assert parse_object(json.dumps({"a": [{"b": text} for text in texts]}).encode())["a"][-1] == {"b": texts[0]}


def test_packed_calls_arrive_as_they_were() -> None:
    chat = ChatPrompt(
        messages=[{"role": "user", "content": [{"type": "text", "text": "é"}]}, {"role": "user", "content": "b"}],
        template_kwargs={"documents": [{"a": {"b": [1, None]}}], "x": {}},
    )
    call = GenerateCall(
        request_id="r",
        model="m",
        prompts=(chat, TokensPrompt(token_ids=tuple(IDS[:40_000])), TokensPrompt(token_ids=()), TextPrompt(text="t")),
        sampling=SamplingParams(logit_bias={5: 1.0}, allowed_token_ids=(1, 2)),
    )
    assert unpack(pack(call)) == call
    for given in ({"a": {"b": 1}}, {}, [chat, chat], ("x", 1), None):
        assert unpack(pack(given)) == given


def test_a_key_of_a_conversation_reads_samples_of_long_texts() -> None:
    def key(text: str, *more: str) -> str:
        parts = [{"type": "image_url", "image_url": {"url": text}}]
        return conversation_key("m", [{"role": "user", "content": parts}, *({"role": r, "content": r} for r in more)])

    image = "data:image/png;base64," + "".join(random.Random(1).choices("abcdefgh", k=2_000_000))
    started = time.thread_time()
    first = key(image)
    assert time.thread_time() - started < 0.02
    assert first == key(image, "assistant", "user")
    assert first != key(image[::-1])
    assert first != key(image[:-1])
    assert first != key("data:image/png;base64," + "".join(random.Random(2).choices("abcdefgh", k=2_000_000)))


def test_a_key_of_a_conversation_reads_so_many_messages() -> None:
    opening = [{"role": "user", "content": f"{i}"} for i in range(300_000)]
    started = time.thread_time()
    assert conversation_key("m", opening) == conversation_key("m", [*opening, {"role": "assistant", "content": "a"}])
    assert time.thread_time() - started < 0.02


def test_a_value_in_a_message_is_cut_before_it_is_written() -> None:
    for short in ([1, "a", {"b": None}], "text", {"a": [1.5]}, (1, 2), 3):
        assert shown(short) == repr(short)
    for long in ([7] * 1000, "x" * 1000, {i: i for i in range(1000)}, [["ab"] * 50] * 50):
        assert shown(long) == repr(long)[:77] + "..."
    started = time.thread_time()
    shown([[MANY] * 100] * 100)
    assert time.thread_time() - started < 0.02
