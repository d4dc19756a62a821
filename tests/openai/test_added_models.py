"""Models that come while the server runs: checkpoints of a watched run, models of the Hub, and those that are added."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.openai.added import CLIENT, Start, admin, complete, listed, model, starting, states, until
from tests.tiny import byte_tokenizer, llama


def write(folder: Path, seed: int) -> Path:
    llama(seed=seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that tests copy."""
    top = tmp_path_factory.mktemp("place")
    for seed in range(3):
        write(top / "made" / f"seed{seed}", seed)
    (top / "run").mkdir()
    (top / "allowed").mkdir()
    return top


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    with starting(place) as begin:
        yield lambda **args: begin([model(place / "made" / "seed0")], **{"max_models_per_replica": 4, **args})


def copy(place: Path, seed: int, name: str) -> Path:
    return Path(shutil.copytree(place / "made" / f"seed{seed}", place / name))


def added(place: Path, seed: int, name: str = "mine", **fields: Any) -> dict[str, Any]:
    folder = place / "allowed" / name
    if not folder.exists():
        copy(place, seed, f"allowed/{name}")
    return {"id": name, "like": "base", "model_name": str(folder), **fields}


def test_checkpoints_of_a_run(place: Path, start: Start) -> None:
    copy(place, 1, "run/checkpoint-1000")
    copy(place, 1, "run/checkpoint-900")
    time.sleep(0.2)  # longer than settle_s
    server = start(
        folders=[
            {"glob": str(place / "run" / "checkpoint-*"), "id": "{parent}-{step}", "like": "base", "every_s": 0.05}
        ]
    )
    until(lambda: requests.get(f"{server.url}/health", timeout=10).status_code == 200)
    assert listed(server) == ["base", "run-900", "run-1000"], "whoever waits for the server misses none"
    assert complete(server, "run-900").status_code == 200
    copy(place, 2, "run/checkpoint-2000")
    until(lambda: complete(server, "run-2000").status_code == 200)
    answers = {name: complete(server, name).json() for name in ("base", "run-900", "run-1000", "run-2000")}
    weights = {name: answer["system_fingerprint"].split("-")[1] for name, answer in answers.items()}
    assert weights["run-900"] == weights["run-1000"]
    assert len(set(weights.values())) == 3
    assert complete(server, "run-3000").status_code == 404


def test_folders_that_are_not_models_say_why(place: Path, start: Start) -> None:
    half = copy(place, 1, "run/half")
    os.truncate(half / "model.safetensors", 1000)
    adapter = place / "run" / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (place / "run" / "empty").mkdir()
    copy(place, 1, "run/base")
    server = start(folders=[{"glob": str(place / "run" / "*"), "like": "base"}], settle_s=0)
    rows = admin(server, "GET", "?refresh").json()["data"]
    found = {(row["model"], row["origin"]): (row["state"], row["reason"] or "") for row in rows}
    assert found["base", "yaml"] == ("ready", "")
    assert found["base", "folder"] == ("refused", "The name 'base' is that of another model.")
    assert "model.safetensors has 1000 bytes" in found["half", "folder"][1]
    assert "is a PEFT adapter without a model" in found["adapter", "folder"][1]
    assert ("empty", "folder") not in found
    until(lambda: complete(server, "half").status_code != 503)  # It may be being written.
    refused = complete(server, "half")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "GET /admin/models says why" in refused.json()["error"]["message"]


def test_a_folder_that_is_being_written(place: Path, start: Start) -> None:
    copy(place, 1, "run/new")
    server = start(folders=[{"glob": str(place / "run" / "*"), "like": "base"}], settle_s=600)
    answer = complete(server, "new")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"] == "5"
    assert states(server)["new"]["state"] == "settling"


@pytest.mark.parametrize("is_index_first", [True, False], ids=["index first", "index last"])
def test_a_checkpoint_that_is_copied_slowly(is_index_first: bool, place: Path, start: Start) -> None:
    """Every file in two halves, each longer than `settle_s` after the other: nothing is served before the last."""
    whole = place / "allowed" / "whole"
    llama(seed=1).save_pretrained(whole, max_shard_size="100KB")
    byte_tokenizer().save_pretrained(whole)
    server = start(folders=[{"glob": str(place / "run" / "*"), "like": "base", "every_s": 0.05}], settle_s=0.05)
    slow = place / "run" / "slow"
    slow.mkdir()
    files = sorted(whole.iterdir(), key=lambda file: (file.suffix == ".safetensors", "index" in file.name))
    if is_index_first:
        files.sort(key=lambda file: "index" not in file.name)
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    for file in files:
        content = file.read_bytes()
        for part in (content[: len(content) // 2], content):
            assert complete(server, "slow").status_code in (404, 503)
            (slow / file.name).write_bytes(part)
            time.sleep(0.2)
    until(lambda: complete(server, "slow").status_code == 200)
    added = {"id": "mine", "like": "base", "model_name": str(whole)}
    assert admin(server, "POST", body=added).status_code == 201
    answers = [complete(server, name).json() for name in ("slow", "mine")]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]


def test_a_checkpoint_that_is_deleted(place: Path, start: Start) -> None:
    folder, other = copy(place, 1, "run/a"), copy(place, 2, "run/b")
    server = start(folders=[{"glob": str(place / "run" / "*"), "like": "base", "every_s": 0.05}])
    until(lambda: listed(server) == ["base", "a", "b"])
    first = complete(server, "a")
    assert first.status_code == 200
    shutil.rmtree(folder)
    shutil.rmtree(other)
    until(lambda: states(server)["a"]["state"] == "gone")
    until(lambda: listed(server) == ["base"])
    assert complete(server, "a").json()["choices"] == first.json()["choices"]
    refused = complete(server, "b")
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
    assert "is gone" in refused.json()["error"]["message"]


def test_a_model_that_is_added_replaced_and_removed(place: Path, start: Start) -> None:
    server = start()
    body = added(place, 1, aliases=["latest"])
    assert complete(server, "mine").status_code == 404
    new = admin(server, "POST", body={**body, "load": True})
    assert (new.status_code, new.json()["state"], new.json()["origin"]) == (201, "ready", "post")
    assert admin(server, "POST", body=body).status_code == 200
    first = complete(server, "latest").json()["system_fingerprint"]
    assert states(server)["mine"]["replicas"] == [{"replica": "local", "tier": "device", "fingerprint": first}]
    other = {**body, "model_name": added(place, 2, "other")["model_name"]}
    taken = admin(server, "POST", body=other)
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    assert admin(server, "POST", body={**other, "replace": True}).status_code == 201
    assert complete(server, "mine").json()["system_fingerprint"] != first
    assert admin(server, "DELETE", "/mine").json() == {"model": "mine", "deleted": True, "unloaded": 1}
    assert complete(server, "mine").status_code == complete(server, "latest").status_code == 404
    assert admin(server, "DELETE", "/mine").status_code == 404
    assert admin(server, "DELETE", "/base").json()["error"]["code"] == "name_taken"


def test_other_options_are_another_version(place: Path, start: Start) -> None:
    server = start()
    body = added(place, 1)
    assert admin(server, "POST", body=body).status_code == 201
    first = complete(server, "mine").json()["system_fingerprint"]
    changed = {**body, "engine": {"kind": "generate"}, "replace": True}
    assert admin(server, "POST", body=changed).status_code == 201
    second = complete(server, "mine").json()["system_fingerprint"]
    assert first.split("-")[1] == second.split("-")[1]
    assert first != second


def test_what_was_added_outlives_the_server(place: Path, start: Start) -> None:
    server = start()
    assert admin(server, "POST", body=added(place, 1)).status_code == 201
    server.stop()
    again = start()
    assert complete(again, "mine").status_code == 200


def test_what_may_be_added(place: Path, start: Start) -> None:
    server = start()
    outside = place / "made" / "seed1"
    (place / "allowed" / "link").symlink_to(outside)
    body = {"id": "x", "like": "base", "model_name": str(outside)}
    refusals = [
        ({**body, "model_name": str(place / "allowed" / "link")}, 403),
        ({**body, "model_name": f"{place}/allowed/../made/seed1"}, 403),
        ({**body, "model_name": "org/name"}, 403),
        (body, 403),
        ({**body, "model_name": str(place / "allowed" / "nothing")}, 400),
        ({**added(place, 1), "loader": "os:system"}, 400),
        ({**added(place, 1), "kwargs": {"trust_remote_code": True}}, 400),
        ({**added(place, 1), "engine": {"max_batch": 3}}, 400),
        ({**added(place, 1), "like": "nobody"}, 400),
        ({**added(place, 1), "id": "base"}, 409),
    ]
    for given, status in refusals:
        answer = admin(server, "POST", body=given)
        assert answer.status_code == status, (given, answer.text)
    assert admin(server, "POST", body=body, headers=CLIENT).status_code == 403
    assert admin(server, "GET", headers=CLIENT).status_code == 403
    assert listed(server) == ["base"]


def test_added_models_are_checked_as_those_of_the_configuration(place: Path, start: Start) -> None:
    server = start()
    body = added(place, 1, aliases=["latest"])
    assert admin(server, "POST", body=body).status_code == 201
    (place / "allowed" / "empty").mkdir()
    for fields, param, said in (
        ({"id": "a b\n/../x"}, "id", "remove the control characters of 'a b\\n/../x'"),
        ({"aliases": ["a\tb"]}, "aliases", "remove the control characters"),
        ({"id": "new"}, "aliases", "The name 'latest' is that of another model; choose another name."),
        ({"api": {"tool_parser": "x"}}, "api.tool_parser", "there is no parser 'x'; known: "),
        ({"api": {"default_params": {"temprature": 1}}}, "api.default_params.temprature", "mean 'temperature'?"),
        ({"engine": {"max_batch": 2}}, "engine.max_batch", "unknown key (did you mean 'max_batch_size'?)"),
        ({"engine": {"max_batch_size": True}}, "engine.max_batch_size", "write a number (got true)"),
        ({"engine": {"max_batch_size": 0}}, "engine", "max_batch_size should be at least 1; got 0"),
        ({"model_name": str(place / "allowed" / "empty")}, "model_name", "has no weights"),
        ({"loader": "os:system"}, "loader", "has it from the model that like or base names; leave it out"),
        ({"pinned": True}, "pinned", "only models of the configuration have it; leave it out"),
    ):
        refused = admin(server, "POST", body={**body, "replace": True, "load": True, **fields}).json()["error"]
        assert (refused["param"], said in refused["message"]) == (param, True), refused
    assert complete(server, "latest").status_code == 200
    assert "This server has: base, mine." in complete(server, "nobody").json()["error"]["message"]
    assert "it is in the configuration; remove it there" in admin(server, "DELETE", "/base").json()["error"]["message"]


def test_a_folder_whose_name_is_not_one_of_a_model(place: Path, start: Start) -> None:
    copy(place, 1, "run/a\tb")
    copy(place, 1, "run/c")
    server = start(folders=[{"glob": str(place / "run" / "*"), "like": "base", "every_s": 0.05}])
    until(lambda: listed(server) == ["base", "c"])


def test_a_folder_without_the_number_that_its_id_has(
    place: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    copy(place, 1, "run/checkpoint-7")
    copy(place, 1, "run/final")
    server = start(folders=[{"glob": str(place / "run" / "*"), "id": "r-{step}", "like": "base"}], settle_s=0)
    until(lambda: listed(server) == ["base", "r-7"])
    assert "run/final' is not a model: its name has no number for {step} in the id 'r-{step}'." in caplog.text


def test_a_model_that_cannot_be_loaded_replaces_nothing(place: Path, start: Start) -> None:
    server = start()
    body = added(place, 1)
    assert admin(server, "POST", body=body).status_code == 201
    first = complete(server, "mine").json()["system_fingerprint"]
    broken = copy(place, 2, "allowed/broken")
    (broken / "config.json").write_text('{"model_type": "nothing"}')
    for fields in ({"replace": True}, {"id": "new"}, {"id": "new"}):
        given = {**body, **fields, "aliases": [], "model_name": str(broken), "load": True}
        refused = admin(server, "POST", body=given).json()["error"]
        assert (refused["code"], refused["param"]) == ("invalid_value", "model_name"), refused
        assert refused["message"].startswith(f"Invalid 'model_name' {str(broken)!r}: Model '")
    assert complete(server, "mine").json()["system_fingerprint"] == first
    assert list(states(server)) == ["base", "mine"]
    assert admin(server, "POST", body={**body, "id": "later", "model_name": str(broken)}).status_code == 201
    assert complete(server, "later").status_code == 500
    later = states(server)["later"]
    assert (later["state"], "Model 'later'" in later["reason"]) == ("refused", True)


def test_a_model_like_one_with_variants(place: Path) -> None:
    zero = {"base+zero": {"interventions": [{"module": "model.norm", "op": "zero"}]}}
    with starting(place) as begin:
        server = begin([model(place / "made" / "seed0", variants=zero)])
        assert admin(server, "POST", body=added(place, 1)).status_code == 201
        assert listed(server) == ["base", "mine", "base+zero"]


def test_models_of_the_hub(place: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = place / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(place / "made" / "seed1", snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    server = start(hub={"allow": ["org/*"], "like": "base"})
    assert complete(server, "other/tiny").status_code == 404
    answer = complete(server, "org/tiny")
    assert answer.status_code == 200, answer.text
    assert states(server)["org/tiny"]["origin"] == "hub"
    assert listed(server) == ["base"]
    copied = admin(server, "POST", body=added(place, 1))
    assert copied.status_code == 201
    weights = {complete(server, name).json()["system_fingerprint"].split("-")[1] for name in ("org/tiny", "mine")}
    assert len(weights) == 1


def test_a_request_that_names_no_model_means_the_configured_one(place: Path, start: Start) -> None:
    server = start()
    assert admin(server, "POST", body=added(place, 1)).status_code == 201
    body = {"prompt": "a", "max_tokens": 1}
    answer = requests.post(f"{server.url}/v1/completions", json=body, headers=CLIENT, timeout=60)
    assert answer.json()["model"] == "base"
