"""/v1/files and /v1/batches with the official client, over the scripted model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai import OpenAI

from tests.openai.batches.batching import CHAT, create, ended, request, results, until
from tests.openai.conftest import MODELS, Server

DISK = 100_000
KEYS = {"api_keys": ["one", "two"]}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Server]:
    running = Server({**KEYS, "batches": {"file_mib": 1, "file_lines": 50}}, MODELS, state_dir=str(state))
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client(api_key="one")


def test_a_batch_from_its_file_to_its_answers(client: OpenAI) -> None:
    batch = create(client, [request(f"r{i}", f"text {i}") for i in range(20)], metadata={"run": "7"})
    assert (batch.status, batch.metadata) == ("validating", {"run": "7"})
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.errors is None
    assert batch.error_file_id is None
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": 20, "completed": 20, "failed": 0}
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times, key=lambda time: time or 0)
    assert batch.expires_at == batch.created_at + 86400
    found = results(client, batch.output_file_id)
    assert set(found) == {f"r{i}" for i in range(20)}
    live = client.chat.completions.create(model="org/scripted", messages=[{"role": "user", "content": "text 3"}])
    line = found["r3"]
    assert (line["error"], line["response"]["status_code"]) == (None, 200)
    body = line["response"]["body"]
    assert body["choices"][0]["message"]["content"] == live.choices[0].message.content == "text 3"
    assert body["system_fingerprint"] == live.system_fingerprint
    assert body["id"].endswith(line["id"])
    assert openai.types.chat.ChatCompletion.model_validate(body).usage == live.usage
    file = client.files.retrieve(str(batch.output_file_id))
    assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert file.bytes == len(client.files.content(file.id).content)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/embeddings", {"input": "abc"}),
        ("/v1/responses", {"input": "abc"}),
    ],
)
def test_every_endpoint(client: OpenAI, server: Server, endpoint: str, body: dict[str, Any]) -> None:
    body = {"model": "org/scripted", **body}
    batch = create(client, [{"custom_id": "a", "method": "POST", "url": endpoint, "body": body}], endpoint)
    batch = ended(client, batch.id)
    answer = results(client, batch.output_file_id)["a"]["response"]["body"]
    live = requests.post(server.url + endpoint, json=body, headers={"authorization": "Bearer one"}, timeout=10).json()
    assert without_ids(answer) == without_ids(live)


def without_ids(answer: Any) -> Any:
    """An answer without what is new in each."""
    if isinstance(answer, list):
        return [without_ids(each) for each in answer]
    if not isinstance(answer, dict):
        return answer
    changing = ("id", "created", "created_at", "completed_at")
    return {key: without_ids(value) for key, value in answer.items() if key not in changing}


BAD: dict[str, Any] = {
    "invalid_json_line": "{",
    "duplicate_custom_id": request("good", "again"),
    "missing_required_parameter": {"custom_id": "no-url", "method": "POST", "body": {}},
    "invalid_url": {**request("url", "x"), "url": "/v1/score"},
    "mismatched": {**request("other", "x"), "url": "/v1/completions"},
    "invalid_method": {**request("get", "x"), "method": "GET"},
    "unsupported_parameter": request("stream", "x", stream=True),
    "model_not_found": request("model", "x", model="none"),
    "invalid_value": request("value", "x", temperature=-1),
    "invalid_custom_id": {**request("", "x")},
    "model_error": request("fails", "[fail model_error]x"),
}


def test_a_bad_line_is_an_error_and_the_rest_is_computed(client: OpenAI) -> None:
    batch = create(client, [request("good", "fine"), "", *BAD.values(), request("last", "fine")])
    batch = ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.to_dict() == {"total": len(BAD) + 2, "completed": 2, "failed": len(BAD)}
    assert set(results(client, batch.output_file_id)) == {"good", "last"}
    lines = list(map(json.loads, client.files.content(str(batch.error_file_id)).text.splitlines()))
    by_number = {int(line["id"].rpartition("_")[2]): line for line in lines}
    for number, code in enumerate(BAD, start=3):
        error = by_number[number]["error"]
        assert error["code"] == code.replace("mismatched", "invalid_url"), error
    assert (by_number[3]["custom_id"], by_number[3]["response"]) == (None, None)
    assert by_number[3]["error"]["message"].startswith("Line 3: ")
    answered = next(line for line in lines if line["custom_id"] == "model")["response"]
    assert (answered["status_code"], answered["body"]["error"]["code"]) == (404, "model_not_found")


def test_lists_and_pages(client: OpenAI) -> None:
    made = [create(client, [request("a", "x")]).id for _ in range(3)]
    page = client.batches.list(limit=2)
    assert ([batch.id for batch in page.data], page.has_more) == ([made[2], made[1]], True)
    assert client.batches.list(limit=1, after=made[1]).data[0].id == made[0]
    assert set(made) <= {batch.id for batch in client.batches.list(limit=1)}  # the client turns the pages
    files = client.files.list(purpose="batch", limit=2, order="asc")
    assert len(files.data) == 2
    assert files.data[0].created_at <= files.data[1].created_at
    for wrong in (0, 101, "000000001999", "9" * 5000):
        with pytest.raises(openai.BadRequestError) as caught:
            client.batches.list(extra_query={"limit": wrong})
        assert caught.value.param == "limit"


def test_what_a_list_cannot_be_asked_is_refused_or_named(client: OpenAI) -> None:
    for wrong in ({"purpose": "xx"}, {"after": "nope"}):
        with pytest.raises(openai.BadRequestError) as error:
            client.files.list(**wrong)  # type: ignore[arg-type]
        assert [error.value.param] == list(wrong)
    raw = client.files.with_raw_response.list(extra_query={"foo": "asc"})
    assert raw.headers["x-troupe-ignored"] == "foo"


def test_a_key_sees_only_its_own(client: OpenAI, server: Server) -> None:
    batch = ended(client, create(client, [request("a", "x")]).id)
    other = server.client(api_key="two")
    assert other.files.list().data == []
    assert other.batches.list().data == []
    for refused in (
        lambda: other.files.retrieve(batch.input_file_id),
        lambda: other.files.content(batch.input_file_id),
        lambda: other.files.delete(batch.input_file_id),
        lambda: other.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            refused()
        assert caught.value.code == "file_not_found"
    for asked in (other.batches.retrieve, other.batches.cancel):
        with pytest.raises(openai.NotFoundError) as caught:
            asked(batch.id)
        assert caught.value.code == "batch_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        other.batches.list(after=batch.id)
    assert error.value.param == "after"


def test_a_deleted_input_is_still_computed(client: OpenAI, state: Path) -> None:
    batch = create(client, [request(f"{i}", "[hold 0.2]x") for i in range(15)])
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.input_file_id)
    batch = ended(client, batch.id)
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 15
    assert len(results(client, batch.output_file_id)) == 15
    client.files.delete(str(batch.output_file_id))
    names = {path.name for path in (state / "batches" / "files").iterdir()}
    assert batch.input_file_id not in names
    assert batch.output_file_id not in names


def test_a_cancelled_batch_keeps_what_is_done(client: OpenAI) -> None:
    batch = create(client, [request("first", "x"), *(request(f"{i}", "[hold 60]x") for i in range(20))])
    until(client, batch.id, lambda batch: batch.request_counts.completed == 1)
    cancelled = client.batches.cancel(batch.id)
    assert (cancelled.status, cancelled.cancelling_at is None) == ("cancelling", False)
    batch = ended(client, batch.id)
    assert (batch.status, batch.cancelled_at is None) == ("cancelled", False)
    assert set(results(client, batch.output_file_id)) == {"first"}
    with pytest.raises(openai.ConflictError) as caught:
        client.batches.cancel(batch.id)
    assert caught.value.code == "batch_ended"


def test_a_batch_expires(client: OpenAI) -> None:
    batch = create(
        client, [request("first", "x"), *(request(f"{i}", "[hold 60]x") for i in range(20))], completion_window="3s"
    )
    batch = ended(client, batch.id)
    assert (batch.status, batch.expired_at is None) == ("expired", False)
    assert set(results(client, batch.output_file_id)) == {"first"}
    errors = results(client, batch.error_file_id)
    assert len(errors) == 20
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


def test_an_unknown_file_is_named_by_the_field(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.batches.create(input_file_id="file-none", endpoint=CHAT, completion_window="24h")
    assert error.value.param == "input_file_id"


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file(client: OpenAI, content: bytes) -> None:
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = ended(client, client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h").id)
    assert batch.status == "failed"
    assert batch.failed_at is not None
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[0].code == "empty_file"


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"\x00\x01binary", "invalid_file", "it is not text"),
        (b"x" * (1 << 20) + b"\n", "request_too_large", "1 MiB"),
        (b"\n" * 51, "request_too_large", "50 lines"),
    ],
)
def test_a_file_that_is_refused(client: OpenAI, state: Path, content: bytes, code: str, said: str) -> None:
    before = set((state / "batches" / "files").iterdir())
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("in.jsonl", content), purpose="batch")
    assert caught.value.code == code
    assert said in caught.value.message
    assert set((state / "batches" / "files").iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"endpoint": "/v1/score"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
    ],
)
def test_wrong_fields(client: OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, [request("a", "x")], **fields)
    assert caught.value.param == param


def test_a_file_expires(client: OpenAI) -> None:
    expiry: Any = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch", expires_after=expiry)
    assert file.expires_at == file.created_at + 3600
    for wrong in (5, "9" * 5000):
        expiry["seconds"] = wrong
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch", expires_after=expiry)


def test_a_server_without_a_state_dir(serve: Any) -> None:
    client = serve().client()
    for ask in (client.batches.list, lambda: client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "batches_off"
        assert "Start it with --state-dir FOLDER (args.state_dir in its configuration)" in caught.value.message


@pytest.fixture(scope="module")
def one_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds one of three models, and has room for little."""
    models = [{"id": name, "loader": MODELS[0]["loader"], "aliases": [f"{name}-too"]} for name in "abc"]
    state = str(tmp_path_factory.mktemp("one"))
    api = {
        "batches": {"disk_gib": DISK / 2**30, "concurrency": 2},
        "admin_keys": ["admin"],
        "heartbeat_seconds": 0.05,
    }
    running = Server(api, models, state_dir=state, max_models_per_replica=1, swap_patience_s=0.5)
    running.start()
    yield running
    running.stop()


def test_lines_of_a_model_are_computed_together(one_place: Server) -> None:
    client = one_place.client()
    names = ["a", "b", "c", "a-too", "b-too", "c-too"]
    lines = [request(f"{i}", "x", model=names[i % 6]) for i in range(18)]
    assert ended(client, create(client, lines).id).request_counts == openai.types.BatchRequestCounts(
        total=18, completed=18, failed=0
    )
    assert loads_of(one_place) == 3


def test_lines_of_another_model_leave_the_place_to_live_requests(one_place: Server) -> None:
    client = one_place.client()
    message: Any = {"role": "user", "content": "x"}

    def live() -> None:
        client.chat.completions.create(model="a", messages=[message])

    live()
    loads = loads_of(one_place)
    batch = create(client, [request(f"{i}", "x", model="b") for i in range(4)])
    for _ in range(20):
        live()
        time.sleep(0.05)
    assert loads_of(one_place) == loads
    assert client.batches.retrieve(batch.id).request_counts == openai.types.BatchRequestCounts(
        total=4, completed=0, failed=0
    )
    counts = ended(client, batch.id).request_counts
    assert counts is not None
    assert (counts.completed, loads_of(one_place)) == (4, loads + 1)


def loads_of(server: Server) -> int:
    (replica,) = requests.get(f"{server.url}/health?verbose", timeout=10).json()["data"]
    return int(replica["loads"])


def test_a_full_disk_pauses_a_batch(one_place: Server) -> None:
    client = one_place.client()
    used = sum(file.bytes for file in client.files.list())
    ballast = client.files.create(file=("ballast.jsonl", b" " * (DISK - used - 6_000)), purpose="batch")
    batch = create(client, [request(f"{i}", "[hold 0.2]x", model="a") for i in range(12)])
    paused = until(client, batch.id, lambda batch: batch.errors)
    assert paused.status == "in_progress"
    assert [error.code for error in paused.errors.data] == ["disk_full"]
    with pytest.raises(openai.APIStatusError) as caught:
        client.files.create(file=("more.jsonl", b" " * 6_000), purpose="batch")
    assert caught.value.code == "disk_quota"
    client.files.delete(ballast.id)
    batch = ended(client, batch.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert len(results(client, batch.output_file_id)) == 12


def test_a_state_dir_belongs_to_one_server(server: Server, state: Path) -> None:
    second = Server({}, MODELS, state_dir=str(state))
    second.start()
    try:
        with second.client() as client, pytest.raises(openai.InternalServerError) as caught:
            client.files.list()
        assert (caught.value.status_code, caught.value.code) == (503, "unavailable")
        assert "is used by another server" in caught.value.message
    finally:
        second.stop()
