"""A checkpoint that is rewritten while it is served: every answer is of one version, which its fingerprint names."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from openai import ConflictError
from transformers import LlamaForCausalLM

from tests.openai.conftest import Serve, Server
from tests.tiny import byte_tokenizer, llama

pytestmark = pytest.mark.usefixtures("all_is_walked")

ADMIN = {"Authorization": "Bearer key"}
BODY = {"model": "run", "prompt": "ab", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
Ask = Callable[..., requests.Response]


def write(folder: Path, seed: int, shards: str = "20KB") -> None:
    """A checkpoint of several files, written in place as a trainer does."""
    llama(seed=seed).save_pretrained(folder, max_shard_size=shards)
    byte_tokenizer().save_pretrained(folder)


def entry(folder: Path, **fields: Any) -> dict[str, Any]:
    engine = {"pack_linears": False, "threads": 1, "max_batch_size": 8}
    named = {"id": "run", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(folder)}}
    return {**named, "engine": engine, **fields}


@pytest.fixture(autouse=True)
def looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.registry.watch.LOOK_EVERY_S", 0.05)


@pytest.fixture
def ask(tmp_path: Path, serve: Serve) -> Ask:
    write(tmp_path / "run", seed=1)
    server = serve([entry(tmp_path / "run", aliases=["latest"])], admin_keys=["key"])
    return asker(server)


def asker(server: Server) -> Ask:
    def ask(path: str = "/v1/completions", body: dict[str, Any] | None = None, **headers: str) -> requests.Response:
        method = "GET" if body is None and path != "/v1/completions" else "POST"
        given = {**ADMIN, **{key.replace("_", "-"): value for key, value in headers.items()}}
        return requests.request(method, server.url + path, json=body or BODY, headers=given, timeout=60)

    return ask


def until_new(ask: Ask, old: str) -> requests.Response:
    """The first answer of another version."""
    for _ in range(2000):
        answer = ask()
        if answer.json()["system_fingerprint"] != old:
            return answer
    raise AssertionError("the old version still answers")


def fingerprint(answer: requests.Response) -> str:
    assert answer.status_code == 200, answer.text
    found = answer.json()["system_fingerprint"]
    assert answer.headers["x-troupe-fingerprint"] == found
    assert isinstance(found, str)
    return found


def weights(answer: requests.Response) -> str:
    return fingerprint(answer).split("-")[1]


def models_alive() -> int:
    """The models of this process, those of other servers included."""
    gc.collect()
    return sum(type(found) is LlamaForCausalLM for found in gc.get_objects())


def test_a_checkpoint_rewritten_under_load(tmp_path: Path, ask: Ask) -> None:
    """Every answer has the text of the version that its fingerprint names, and no request fails."""
    ask()
    before = models_alive()
    texts: dict[str, set[str]] = {}
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            answer = ask()
            assert answer.status_code == 200, answer.text
            texts.setdefault(weights(answer), set()).add(answer.json()["choices"][0]["text"])

    with ThreadPoolExecutor(6) as pool:
        workers = [pool.submit(work) for _ in range(6)]
        try:
            for seed in (2, 3):
                old = fingerprint(ask())
                write(tmp_path / "run", seed)
                until_new(ask, old)
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    assert len(texts) == 3
    for _ in range(1000):
        if models_alive() == before:
            break
    assert models_alive() == before
    assert all(len(found) == 1 for found in texts.values())
    assert len({next(iter(found)) for found in texts.values()}) == 3


def test_what_runs_ends_on_the_version_it_began_with(tmp_path: Path, ask: Ask) -> None:
    body = {**BODY, "max_tokens": 400, "stream": True}
    whole = ask(body={**body, "stream": False}).json()
    with requests.post(_url(ask), json=body, headers=ADMIN, stream=True, timeout=60) as stream:
        lines = stream.iter_lines()
        chunks = [json.loads(next(lines).removeprefix(b"data: "))]
        write(tmp_path / "run", seed=2)
        waiting = ThreadPoolExecutor(1).submit(until_new, ask, whole["system_fingerprint"])
        chunks += [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == whole["choices"][0]["text"]
    assert waiting.result().json()["choices"][0]["text"] != text[:12]


def _url(ask: Ask) -> str:
    return ask("/health").url.removesuffix("/health") + "/v1/completions"


def test_prefixes_are_those_of_one_version(tmp_path: Path, ask: Ask) -> None:
    body = {**BODY, "prompt": "a" * 300}

    def cached(answer: requests.Response) -> int:
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    first = ask(body=body)
    assert cached(ask(body=body)) > 0
    write(tmp_path / "run", seed=2)
    until_new(ask, fingerprint(first))
    assert cached(ask(body=body)) == 0
    again = ask(body=body)
    assert cached(again) > 0
    assert again.json()["choices"] != first.json()["choices"]


def test_a_folder_that_stays_incomplete_is_refused_by_the_files_name(tmp_path: Path, ask: Ask) -> None:
    old = fingerprint(ask())
    shard = min((tmp_path / "run").glob("*.safetensors"))
    content = shard.read_bytes()
    os.truncate(shard, 100)
    refused = next(answer for _ in range(2000) if (answer := ask()).status_code != 200)
    assert refused.status_code == 503
    assert shard.name in refused.json()["error"]["message"]
    shard.write_bytes(content)
    assert fingerprint(ask()) == old


def test_names_of_the_weights(tmp_path: Path, ask: Ask) -> None:
    """Copying and touching keep the weights' name; one weight, the template, or an option of the engine do not."""
    first = fingerprint(ask())
    folder = tmp_path / "run"
    for file in folder.iterdir():
        file.touch()
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copytree(folder, tmp_path / "one")
    shutil.copytree(folder, tmp_path / "template")
    shard = max((tmp_path / "one").glob("*.safetensors"))
    with shard.open("r+b") as opened:
        opened.seek(-3, os.SEEK_END)
        opened.write(b"\x01")
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    server = _serve(
        entry(tmp_path / "copy", id="copy"),
        entry(tmp_path / "one", id="one"),
        entry(tmp_path / "template", id="template"),
        {**entry(tmp_path / "copy", id="option"), "engine": {"kind": "generate", "threads": 1}},
    )
    other = asker(server)
    try:
        named = {
            name: fingerprint(other(body={**BODY, "model": name})) for name in ("copy", "one", "template", "option")
        }
    finally:
        server.stop()
    assert fingerprint(ask()) == named["copy"] == first
    assert len({name.split("-")[1] for name in named.values()}) == 3
    assert named["option"].split("-")[1] == first.split("-")[1]
    assert named["option"] != first


def _serve(*models: dict[str, Any]) -> Server:
    server = Server({}, list(models))
    server.start()
    return server


def test_a_request_for_the_old_weights_is_refused(tmp_path: Path, ask: Ask, serve: Serve) -> None:
    old = fingerprint(ask())
    assert weights(ask(x_troupe_expect=old)) == weights(ask(x_troupe_expect=old.split("-")[1]))
    write(tmp_path / "run", seed=2)
    new = fingerprint(until_new(ask, old))
    for path, body in EVERY_ROUTE.items():
        refused = ask(path, {"model": "run", **body}, x_troupe_expect=old)
        assert refused.status_code == 409, path
        assert refused.json()["error"]["code"] == "version_mismatch"
        assert refused.headers["x-should-retry"] == "false"
        answer = ask(path, {"model": "run", **body}, x_troupe_expect=new)
        assert answer.status_code == 200, (path, answer.text)
        assert answer.headers["x-troupe-fingerprint"] == new, path
    assert ask(x_troupe_expect="the old one").status_code == 400
    client = _client(ask)
    with pytest.raises(ConflictError):
        client.completions.create(model="run", prompt="a", extra_headers={"x-troupe-expect": old})


EVERY_ROUTE: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/responses": {"input": "a", "max_output_tokens": 1},
    "/v1/score": {"prompt": "a", "choices": ["b", "c"]},
    "/v1/tokenize": {"prompt": "a"},
    "/v1/completions/render": {"prompt": "a"},
    "/v1/embeddings": {"input": "a"},
}


def _client(ask: Ask) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=_url(ask).removesuffix("/completions"), api_key="key", max_retries=0)


def test_the_list_of_models(tmp_path: Path, ask: Ask) -> None:
    written = max(int(file.stat().st_mtime) for file in (tmp_path / "run").iterdir())
    listed = {model["id"]: model for model in ask("/v1/models").json()["data"]}
    assert [*listed] == ["run", "latest"]
    for model in listed.values():
        assert (model["root"], model["parent"], model["created"]) == ("run", None, written)
        assert "fingerprint" not in model
    found = fingerprint(ask())
    assert ask("/v1/models/latest").json()["fingerprint"] == found
    replicas = ask("/admin/replicas").json()["data"]
    assert replicas[0]["models"][0]["fingerprint"] == found


def test_the_record_names_the_version(tmp_path: Path, serve: Serve) -> None:
    write(tmp_path / "run", seed=1)
    server = serve([entry(tmp_path / "run")], record_dir=str(tmp_path / "record"))
    found = fingerprint(asker(server)())
    lines: list[dict[str, Any]] = []
    while not lines:
        lines = [json.loads(line) for file in (tmp_path / "record").iterdir() for line in file.read_text().splitlines()]
    assert lines[0]["fingerprint"] == found


@pytest.fixture
def given() -> Iterator[Server]:
    server = _serve({"id": "demo", "loader": "model_loaders.demo:load_model"}, scripted("one"), scripted("two"))
    yield server
    server.stop()


def scripted(name: str) -> dict[str, Any]:
    return {"id": name, "loader": "tests.openai.scripted:load_model"}


def test_models_whose_loader_names_no_files(given: Server) -> None:
    ask = asker(given)
    named = [fingerprint(ask(body={**BODY, "model": name})) for name in ("demo", "one", "two")]
    assert named[0].split("-")[1] != named[1].split("-")[1]
    assert named[1] == named[2]
