"""No step of the work on a large body, or on a large answer, is long: other requests go on between two of them."""

from __future__ import annotations

import asyncio
import gc
import json
import pickle
import random
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from deployments.core.calls import Call, GenerateCall
from deployments.core.collector import leave_imports, let_go
from deployments.core.events import Accepted, Delta, Event, Finished, PromptScores, Usage
from deployments.core.json_text.reader import JsonReader
from deployments.core.json_text.writer import JsonWriter
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.core.token_ids import TokenIds
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment, Word
from deployments.large_messages import pack, unpack
from deployments.openai.app import build_api
from deployments.openai.chat import prompt
from deployments.openai.http.body import MAX_KEYS, MAX_OBJECTS, parse_object
from tests.forms import covering, some
from tests.openai.http.test_large_bodies import CHAT, MANY, Replica, ask, value

LONGEST_PIECE = 1 << 16


def tree(depth: int) -> Any:
    """Objects in objects, eight in each."""
    return {f"k{i}": tree(depth - 1) if depth else list(range(20)) for i in range(8)}


WIDE = {f"{i}": list(range(50)) for i in range(20_000)}
FILLED: dict[str, Callable[[], dict[str, Any]]] = {
    "a bias": lambda: {"logit_bias": {str(i): 1.5 for i in range(100_000)}},
    "a tree": lambda: {"documents": [tree(4)]},
    "a long text": lambda: {"documents": ['é\\"\n😀' * 100_000]},
    "a long ASCII text": lambda: {"documents": ["ab" * 5_000_000]},
    "a long key": lambda: {"documents": [{"\n" * 500_000: 1}]},
    "numbers": lambda: {"documents": [list(range(500_000)), [0.5] * 100_000]},
    "texts": lambda: {"documents": [f"text {i}" for i in range(200_000)]},
}


@covering(("ascii", [False, True]), ("name", FILLED), meet=1)
def test_a_large_body_is_read_in_short_pieces(name: str, ascii: bool) -> None:
    lengths: list[int] = []

    class Decoder(json.JSONDecoder):
        def __init__(self) -> None:
            super().__init__()
            scan = self.scan_once

            def scan_once(text: str, at: int) -> Any:
                found, end = scan(text, at)
                lengths.append(end - at)
                return found, end

            self.scan_once = scan_once

    given = FILLED[name]()
    raw = json.dumps(given, ensure_ascii=ascii).encode()
    limits = {"max_depth": 100, "max_objects": MAX_OBJECTS, "max_keys": MAX_KEYS}
    assert JsonReader(raw, Decoder(), **limits).read() == given
    assert max(lengths, default=0) <= LONGEST_PIECE


@some("seed", range(6), (0, 1))
def test_long_texts_are_read_as_they_are(seed: int) -> None:
    draw = random.Random(seed)
    weights = [draw.random() + 0.01 for _ in range(7)]
    texts = ["".join(draw.choices('aé😀\\"\n中', weights=weights, k=draw.choice([5000, 140_000]))) for _ in range(3)]
    given = {"texts": texts, texts[0]: 1, "more": [value(draw, 0) for _ in range(5)]}
    for ascii in (True, False):
        for mark in (b"", b"\xef\xbb\xbf"):
            assert parse_object(mark + json.dumps(given, ensure_ascii=ascii).encode()) == given


def walked(work: Callable[[], Any]) -> int:
    """The most objects that Python's garbage collector went through at once meanwhile."""
    most = 0

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal most
        if phase == "start":
            most = max(most, sum(len(gc.get_objects(i)) for i in range(info["generation"] + 1)))

    gc.collect()
    gc.freeze()  # What the other tests have made is not counted.
    gc.callbacks.append(note)
    try:
        work()
    finally:
        gc.callbacks.remove(note)
        gc.unfreeze()
    return most


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", lambda: {**CHAT, "documents": [tree(3)]}),
        ("/v1/chat/completions", lambda: {**CHAT, "generate_kwargs": {"x": tree(4)}}),
        (
            "/v1/chat/completions",
            lambda: {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 50_000},
        ),
        ("/v1/responses", lambda: {"input": MANY}),
        ("/v1/chat/completions", lambda: {**CHAT, "temperature": [[i] for i in range(100_000)]}),
    ],
    ids=["documents", "generate_kwargs", "messages", "input", "temperature"],
)
def test_the_garbage_collector_leaves_a_large_request_alone(path: str, fields: Callable[[], dict[str, Any]]) -> None:
    content = json.dumps(fields()).encode()
    app = build_api(Replica())
    asyncio.run(ask(app, path, b"{}"))
    assert walked(lambda: asyncio.run(ask(app, path, content))) < 20_000
    deadline = time.monotonic() + 10
    while not gc.isenabled() and time.monotonic() < deadline:
        time.sleep(0.01)  # The request's values are let go in a thread.
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_what_is_let_go_goes_in_steps_and_what_others_have_stays() -> None:
    kept = {"a": [1, 2]}
    holder: list[Any] = [{"own": [[i] for i in range(10_000)], "shared": kept, "long": list(range(100_000))}]
    steps = 0

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return count

    sys.settrace(count)
    try:
        let_go(holder)
    finally:
        sys.settrace(None)
    assert holder == []
    assert kept == {"a": [1, 2]}
    assert steps > 10_000  # One and more for each list: none went with all that it held.


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"logit_bias": [[0, 1]] * (MAX_KEYS + 1)}, "at most 300000 items"),
        ({"metadata": dict.fromkeys(map(str, range(MAX_KEYS + 1)), 1)}, "more than 300000 keys"),
        ({"stop": ["a"] * 100_000}, "at most 1024 items, not 100000"),
        ({"bad_words": ["a"] * 1025}, "at most 1024 items, not 1025"),
        ({"guided_choice": ["a"] * 100_001}, "at most 100000 items, not 100001"),
        ({"structured_outputs": {"choice": ["a"] * 100_001}}, "at most 100000 items, not 100001"),
        ({"guided_choice": ["a" * 2**21]}, "at most 2097152 characters"),
        ({"guided_regex": "a" * (2**21 + 1)}, "at most 2097152 characters"),
        ({"guided_json": "1" * (2**21 + 1)}, "at most 2097152 characters"),
        ({"guided_json": {"properties": WIDE}}, "at most 2097152 characters"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": WIDE}}},
            "at most 2097152 characters",
        ),
        ({"messages": [{"role": "user", "content": "a" * 2**24 + "é"}]}, "more than 16777216 characters"),
        ({"messages": [{"role": "user", "content": "a"}], "x": " " * 100}, None),
    ],
)
def test_what_would_take_a_long_step_is_refused_by_its_size(given: dict[str, Any], told: str | None) -> None:
    content = json.dumps({**CHAT, **given}, ensure_ascii=False).encode()
    status, body = asyncio.run(ask(build_api(Replica()), "/v1/chat/completions", content))
    assert (status == 200) is (told is None), body[:300]
    assert told is None or told in json.loads(body)["error"]["message"]


def test_a_number_of_thousands_of_digits_is_refused_by_its_length() -> None:
    status, body = asyncio.run(
        ask(build_api(Replica()), "/v1/chat/completions", b'{"temperature": ' + b"1" * 10**7 + b"}")
    )
    assert status == 400
    assert "more than 4096 digits" in json.loads(body)["error"]["message"]


def test_a_strict_schema_is_checked_beside_the_loop() -> None:
    """llguidance holds Python's lock: a long schema has a process of its own."""
    properties = {f"p{i}": {"type": "string"} for i in range(1000)}
    function = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": properties}}
    content = json.dumps({**CHAT, "tools": [{"type": "function", "function": function}]}).encode()
    status, body = asyncio.run(ask(build_api(Replica()), "/v1/chat/completions", content))
    assert status == 200, body
    function["parameters"] = {"type": "object", "properties": {**properties, "q": {"type": "nothing"}}}
    content = json.dumps({**CHAT, "tools": [{"type": "function", "function": function}]}).encode()
    status, body = asyncio.run(ask(build_api(Replica()), "/v1/chat/completions", content))
    assert status == 400
    assert "the schema has the unknown type 'nothing' at 'properties.q.type'" in json.loads(body)["error"]["message"]


def test_token_ids_are_a_sequence_that_crosses_as_one_block() -> None:
    ids = TokenIds(range(100_000))
    data = pickle.dumps(ids)
    assert len(data) < 4 * len(ids) + 200
    assert pickle.loads(data) == ids
    assert ids == tuple(range(100_000))
    assert ids == list(range(100_000))
    assert ids != tuple(range(99_999))
    assert (ids[-1], ids[2:4], len(ids), list(ids[:2])) == (99_999, (2, 3), 100_000, [0, 1])
    assert hash(ids) == hash(TokenIds(range(100_000)))
    assert not TokenIds()
    assert 5 in ids
    assert TokenIds(ids) == ids


def rows(count: int) -> list[TokenLogprob]:
    top = tuple(Candidate(i, f"t{i}", b"t", -1.0) for i in range(5))
    return [TokenLogprob(token_id=i, token="é", bytes=b"e", logprob=-0.5, top=top) for i in range(count)]


PACKED: dict[str, Callable[[], Any]] = {
    "a tree": lambda: tree(4),
    "messages": lambda: MANY,
    "a long text": lambda: "é" * 5_000_000,
    "scores": lambda: tuple(rows(5000)),
    "texts": lambda: tuple(f"t{i}" for i in range(100_000)),
    "empty lists": lambda: [[] for _ in range(50_000)],
}
STEPS = {"a long text": 2, "empty lists": 150}


@pytest.mark.parametrize("name", PACKED)
def test_packed_values_are_read_in_short_steps(name: str) -> None:
    """Python's lock changes hands only where Python code runs: here, at each call of a method."""
    given = PACKED[name]()
    data = pack(given)
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        found = unpack(data)
    finally:
        sys.setprofile(None)
    assert found == given
    assert calls >= STEPS.get(name, len(data.data) // 20_000)


@some("seed", range(5), (0, 1))
def test_large_values_are_written_as_json_has_them(seed: int) -> None:
    draw = random.Random(seed)
    given = {
        "ids": TokenIds(range(draw.choice([0, 5, 30_000]))),
        "long": 'é\n"😀' * draw.choice([1, 100_000]),
        "values": [value(draw, 0) for _ in range(40)],
        "scores": [{"token": "a", "logprob": -0.5, "bytes": [1, 2]} for _ in range(draw.choice([1, 20_000]))],
        'key "é': {str(i): [i] for i in range(5000)},
    }
    plain = {**given, "ids": list(given["ids"])}
    assert JsonWriter().data(given) == json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()
    text = json.dumps(plain, separators=(",", ":"))
    assert JsonWriter(ascii=True).text(given) == text
    assert JsonWriter(ascii=True).text(given, len(text)) == text
    assert JsonWriter(ascii=True).text(given, len(text) - 1) is None


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions/render", {"prompt": list(range(200_000))}),
        ("/v1/completions", {"prompt": list(range(200_000)), "return_token_ids": True}),
        ("/v1/completions", {"prompt": list(range(200_000)), "return_token_ids": True, "stream": True}),
        ("/v1/completions", {"prompt": "a", "n": 3, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True, "stream": True}),
        ("/v1/tokenize", {"prompt": "a"}),
    ],
)
def test_an_answer_with_many_ids_is_written_off_the_loop(path: str, fields: dict[str, Any]) -> None:
    writers: set[str] = set()

    class Noting(TokenIds):
        """Ids that note the threads in which they are gone through."""

        def __iter__(self) -> Any:
            writers.add(threading.current_thread().name)
            return super().__iter__()

        def __getitem__(self, index: Any) -> Any:
            writers.add(threading.current_thread().name)
            return super().__getitem__(index)

    app = build_api(Replica(ids=Noting(range(200_000))))
    status, body = asyncio.run(ask(app, path, json.dumps(fields).encode()))
    assert status == 200, body[:300]
    assert b"199998,199999]" in body
    assert writers
    assert threading.main_thread().name not in writers


class Writes(Replica):
    """A model whose answers are large although its requests are not."""

    async def tokenizer_info(self, model: str, *, expect: str = "") -> dict[str, Any]:
        return {"fingerprint": "", "special_tokens": [f"<{i}>" for i in range(20_000)]}

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        if isinstance(call, GenerateCall):
            scores = (None, *rows(1))
            yield Accepted(prompt_token_ids=((1, 2),) * len(call.prompts), prompt_texts=("a",) * len(call.prompts))
            for choice in range(len(call.prompts)):
                yield PromptScores(choice=choice, scores=scores)
                yield Delta(choice=choice, finish_reason="length")
        else:
            yield TranscriptionStarted(language="english", duration=9.0)
            yield TranscriptSegment(text="a", words=(Word("a", 0.0, 1.0),) * 20_000)
        yield Finished(usage=Usage(prompt_tokens=1))


FORM = (
    '--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\na\r\n'
    '--x\r\nContent-Disposition: form-data; name="response_format"\r\n\r\nverbose_json\r\n'
    '--x\r\nContent-Disposition: form-data; name="timestamp_granularities[]"\r\n\r\nword\r\n'
    '--x\r\nContent-Disposition: form-data; name="stream"\r\n\r\n{}\r\n--x--\r\n'
)


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("/v1/tokenizer_info", ""),
        ("/v1/score", json.dumps({"prompt": "a", "choices": [f"{i}" + "x" * 2000 for i in range(100)]})),
        ("/v1/audio/transcriptions", FORM.format("false")),
        ("/v1/audio/transcriptions", FORM.format("true")),
    ],
)
def test_a_large_answer_is_written_off_the_loop(path: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writers: set[str] = set()
    plain = json.JSONEncoder.encode

    def encode(encoder: json.JSONEncoder, value: Any) -> str:
        text = plain(encoder, value)
        assert len(text) < LONGEST_PIECE * 4
        writers.add(threading.current_thread().name)
        return text

    monkeypatch.setattr(json.JSONEncoder, "encode", encode)
    kind = {"content-type": "multipart/form-data; boundary=x"} if content.startswith("--") else None
    status, body = asyncio.run(ask(build_api(Writes()), path, content.encode(), kind))
    assert status == 200, body[:300]
    assert len(body) > 100_000
    assert threading.main_thread().name not in writers


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": MANY}),
        ("/v1/chat/completions", {"messages": MANY, "stream": True}),
        ("/v1/responses", {"input": MANY}),
        ("/v1/chat/completions/render", {"messages": MANY}),
        ("/v1/embeddings", {"messages": MANY}),
    ],
)
def test_what_was_made_of_a_large_request_is_let_go_off_the_loop(
    path: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To let go of a list of many messages at once holds up all other requests."""
    places: list[str] = []

    class Noting(list[Any]):
        def __del__(self) -> None:
            places.append(threading.current_thread().name)

    def noted(values: Any) -> Any:
        return Noting(values) if isinstance(values, list) and len(values) == len(MANY) else values

    def messages(given: Any) -> Any:
        read, media = read_messages(given)
        return noted(read), media

    read_messages, let_go = prompt.read_messages, prompt.let_go
    emptied: list[tuple[int, str]] = []

    def noting(values: list[Any]) -> None:
        emptied.append((len(values), threading.current_thread().name))
        let_go(values)

    monkeypatch.setattr(prompt, "read_messages", messages)
    monkeypatch.setattr(prompt, "let_go", noting)
    status, body = asyncio.run(ask(build_api(Replica()), path, json.dumps(fields).encode()))
    assert status == 200, body[:300]
    assert emptied[0][0] >= len(MANY)
    assert threading.main_thread().name not in {place for _, place in emptied}
    deadline = time.monotonic() + 10
    while not places and time.monotonic() < deadline:
        time.sleep(0.01)
    assert places
    assert threading.main_thread().name not in places


def test_a_full_collection_leaves_imports_alone_and_frees_what_comes_later() -> None:
    gc.unfreeze()
    everything = len(gc.get_objects())
    try:
        leave_imports()
        assert len(gc.get_objects()) < everything / 100

        class Node:
            me: Node

        node = Node()
        node.me = node
        gone = weakref.ref(node)
        del node
        gc.collect()
        assert gone() is None
    finally:
        gc.unfreeze()
