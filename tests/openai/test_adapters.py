"""Adapters over a model by the front door: from the configuration, from folders, and added while the server runs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from deployments.core.errors import ConfigError
from deployments.local import make_app
from tests.adapters.lora import merged, write_adapter
from tests.engine.running import greedy
from tests.openai.added import ADMIN, CLIENT, Start, admin, complete, listed, model, starting, states, until
from tests.openai.conftest import Server
from tests.tiny import byte_tokenizer, llama

LINEARS = ("q_proj", "v_proj", "up_proj", "down_proj")
PROMPT = "One prompt of some forty tokens, as it is."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and adapters that tests copy."""
    top = tmp_path_factory.mktemp("place")
    llama().save_pretrained(top / "base")
    byte_tokenizer().save_pretrained(top / "base")
    for i in range(3):
        write_adapter(llama(), top / "made" / f"a{i}", LINEARS, seed=i + 1, rank=3 + i)
    for folder in ("run", "allowed"):
        (top / folder).mkdir()
    return top


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, str]:
    """What the base answers, and what each merged adapter does."""
    ids = byte_tokenizer().encode(PROMPT)
    models = {"base": llama()}
    for i in range(3):
        folder = place / "made" / f"a{i}"
        models[folder.name] = merged(llama(), folder, lambda name: 2.0)
    texts = {name: byte_tokenizer().decode(greedy(model, ids, 8)) for name, model in models.items()}
    assert len(set(texts.values())) == 4
    return texts


@pytest.fixture
def start(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setattr("deployments.registry.watch.LOOK_EVERY_S", 0.05)
    with starting(place) as begin:

        def adapted(*adapters: dict[str, Any], base: dict[str, Any] | None = None, **args: Any) -> Server:
            models = [model(place / "base", **(base or {})), *adapters]
            return begin(models, **{"max_models_per_replica": 1, **args})

        yield adapted


def copied(place: Path, name: str, to: str) -> Path:
    return Path(shutil.copytree(place / "made" / name, place / to, dirs_exist_ok=True))


def entry(place: Path, name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "base": "base", "adapter": str(place / "made" / name), **fields}


def text(server: Server, model: str, **fields: Any) -> str:
    answer = complete(server, model, prompt=PROMPT, max_tokens=8, ignore_eos=True, **fields)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["model"] == model
    return str(found["choices"][0]["text"])


def fingerprint(server: Server, model: str) -> str:
    return complete(server, model, prompt="b").headers["x-troupe-fingerprint"]


def error(server: Server, model: str) -> tuple[int, str, str]:
    answer = complete(server, model)
    found = answer.json()["error"]
    return answer.status_code, found["code"], found["message"]


def test_adapters_of_the_configuration(place: Path, start: Start, expected: dict[str, str]) -> None:
    server = start(entry(place, "a0", aliases=["first"]), entry(place, "a1"))
    asked = ["base", "a0", "a1", "first", "base:a1"] * 6
    with ThreadPoolExecutor(10) as pool:
        texts = list(pool.map(lambda name: text(server, name), asked))
    names = {"first": "a0", "base:a1": "a1"}
    assert texts == [expected[names.get(name, name)] for name in asked]
    models = requests.get(f"{server.url}/v1/models", headers=CLIENT, timeout=10).json()["data"]
    assert [(m["id"], m["root"], m["parent"]) for m in models] == [
        ("base", "base", None),
        ("a0", "a0", "base"),
        ("a1", "a1", "base"),
        ("first", "a0", "base"),
    ]
    assert len({model["fingerprint"] for model in models}) == 3
    assert {model["max_model_len"] for model in models} == {512}
    assert all(model["created"] for model in models)
    rows = states(server)
    assert [(rows[name]["kind"], rows[name]["parent"]) for name in ("base", "a0")] == [
        ("model", None),
        ("adapter", "base"),
    ]
    assert rows["a1"]["replicas"] == [{"replica": "local", "tier": "device", "fingerprint": models[2]["fingerprint"]}]
    parts = [
        requests.get(f"{server.url}/v1/fingerprint?model={name}", headers=CLIENT, timeout=10).json()
        for name in ("base", "a0", "a1")
    ]
    assert [each["fingerprint"] for each in parts] == [model["fingerprint"] for model in models[:3]]
    for each in parts:
        assert each["fingerprint"][8:20] == each["weights"]["digest"][:12]
        assert each["fingerprint"].endswith(each["setup"]["digest"][:12])
    assert parts[1]["weights"]["base"] == parts[0]["weights"]


def test_the_record_answers_for_the_adapter_that_was_asked(
    place: Path, start: Start, expected: dict[str, str], tmp_path: Path
) -> None:
    api = {"record_dir": str(tmp_path), "resume": True}
    server = start(entry(place, "a0"), entry(place, "a1"), api=api)
    names = ("base", "a0", "a1")
    assert {name: text(server, name) for name in names} == {name: expected[name] for name in names}
    again = start(entry(place, "a0"), entry(place, "a1"), api=api, state_dir=str(tmp_path / "state"))
    until(lambda: sum(len(file.read_text().splitlines()) for file in tmp_path.glob("*.jsonl")) == 3)
    answers = {name: complete(again, name, prompt=PROMPT, max_tokens=8, ignore_eos=True) for name in names}
    assert [name for name in names if "x-troupe-resumed" not in answers[name].headers] == []
    assert {name: answer.json()["choices"][0]["text"] for name, answer in answers.items()} == {
        name: expected[name] for name in names
    }


def test_prefixes_belong_to_one_adapter(place: Path, start: Start, expected: dict[str, str]) -> None:
    mine = copied(place, "a0", "run/mine")
    server = start({"id": "a0", "base": "base", "adapter": str(mine)}, entry(place, "a1"), settle_s=0.05)

    def cached(name: str, text: str) -> int:
        answer = complete(server, name, prompt=PROMPT, max_tokens=8, ignore_eos=True).json()
        assert answer["choices"][0]["text"] == text
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    names = ("a0", "a1", "base")
    assert [cached(name, expected[name]) for name in names] == [0, 0, 0]
    assert min(cached(name, expected[name]) for name in names) > 16
    first = fingerprint(server, "a0")
    copied(place, "a2", "run/mine")
    until(lambda: fingerprint(server, "a0") != first)
    assert cached("a0", expected["a2"]) == 0
    assert min(cached("a0", expected["a2"]), cached("base", expected["base"])) > 16


def test_names_that_are_no_adapters(place: Path, start: Start) -> None:
    server = start(entry(place, "a0"))
    for name in ("base:typo", "typo", "a0:a0", "a0:base", "base:base"):
        assert error(server, name)[:2] == (404, "model_not_found"), name


def test_an_adapter_that_is_rewritten(place: Path, start: Start, expected: dict[str, str]) -> None:
    folder = copied(place, "a0", "run/mine")
    server = start({"id": "mine", "base": "base", "adapter": str(folder)}, settle_s=0.05)
    assert text(server, "mine") == expected["a0"]
    first = fingerprint(server, "mine")
    copied(place, "a2", "run/mine")
    until(lambda: fingerprint(server, "mine") != first)
    assert text(server, "mine") == expected["a2"]
    until(lambda: len(server_models(server)[0]["adapters"]) == 1)
    stale = requests.post(
        f"{server.url}/v1/completions",
        json={"model": "mine", "prompt": "a", "max_tokens": 1},
        headers={**CLIENT, "x-troupe-expect": first},
        timeout=60,
    )
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "version_mismatch")


def test_an_adapter_that_is_rewritten_under_load(place: Path, start: Start, expected: dict[str, str]) -> None:
    """Every answer belongs whole to one version, whatever is read while the file is written."""
    folder = copied(place, "a0", "run/mine")
    server = start({"id": "mine", "base": "base", "adapter": str(folder)}, settle_s=0.05)
    stop = threading.Event()
    seen: set[tuple[str, str]] = set()

    def work() -> None:
        while not stop.is_set():
            answer = complete(server, "mine", prompt=PROMPT, max_tokens=8, ignore_eos=True)
            assert answer.status_code == 200, answer.text
            seen.add((answer.headers["x-troupe-fingerprint"], answer.json()["choices"][0]["text"]))

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(work) for _ in range(4)]
        try:
            until(lambda: bool(seen) or any(each.done() for each in workers))
            for count, name in enumerate(("a1", "a2"), 2):
                weights = (place / "made" / name / "adapter_model.safetensors").read_bytes()
                (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
                shutil.copy(place / "made" / name / "adapter_config.json", folder)
                (folder / "adapter_model.safetensors").write_bytes(weights)
                until(lambda count=count: len(seen) >= count or any(each.done() for each in workers))  # type: ignore[misc]
        finally:
            stop.set()
        for each in workers:
            each.result()
    assert sorted(text for _, text in seen) == sorted(expected[name] for name in ("a0", "a1", "a2"))
    assert len({name for name, _ in seen}) == 3


def server_models(server: Server) -> list[dict[str, Any]]:
    answer = requests.get(f"{server.url}/admin/replicas", headers=ADMIN, timeout=10).json()
    found: list[dict[str, Any]] = answer["data"][0]["models"]
    return found


def test_adapters_in_folders(place: Path, start: Start, expected: dict[str, str]) -> None:
    copied(place, "a0", "run/checkpoint-900")
    shutil.copytree(place / "base", place / "run" / "checkpoint-950")
    zero = copied(place, "a1", "run/checkpoint-1000")
    write_adapter(llama(), zero, LINEARS, change=zeros)
    source = {"glob": str(place / "run" / "checkpoint-*"), "id": "r-{step}", "base": "base", "every_s": 0.05}
    server = start(folders=[source])
    until(lambda: listed(server) == ["base", "r-900"])
    assert text(server, "r-900") == expected["a0"]
    rows = states(server)
    assert (rows["r-1000"]["state"], rows["r-1000"]["kind"]) == ("refused", "adapter")
    assert "all its matrices B are zero" in rows["r-1000"]["reason"]
    assert "is not a PEFT adapter" in rows["r-950"]["reason"]
    assert error(server, "r-1000")[:2] == (404, "model_not_found")
    assert "all its matrices B are zero" in error(server, "r-1000")[2]
    copied(place, "a2", "run/checkpoint-1100")
    until(lambda: complete(server, "r-1100").status_code == 200)
    assert text(server, "base:r-1100") == expected["a2"]


@pytest.mark.parametrize("is_watched", [True, False])
def test_an_adapter_whose_folder_is_gone(is_watched: bool, place: Path, start: Start, expected: dict[str, str]) -> None:
    """One that is in use serves on; one that is not read yet is a 404, and never the base."""
    folders = {name: copied(place, name, f"run/{name}") for name in ("a0", "a1")}
    if is_watched:
        server = start(folders=[{"glob": str(place / "run" / "*"), "base": "base", "every_s": 0.05}])
    else:
        server = start(*({"id": name, "base": "base", "adapter": str(folder)} for name, folder in folders.items()))
    until(lambda: listed(server) == ["base", "a0", "a1"])
    assert text(server, "a0") == expected["a0"]
    for folder in folders.values():
        shutil.rmtree(folder)
    until(lambda: error_code(server, "a1") == "model_not_found")
    assert text(server, "a0") == expected["a0"]
    assert error(server, "base:a1")[:2] == (404, "model_not_found")


def error_code(server: Server, model: str) -> str | None:
    found = complete(server, model).json()
    assert "choices" not in found, model
    return str(found["error"]["code"])


def zeros(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = torch.zeros_like(tensors[key])


def test_adapters_that_are_added(place: Path, start: Start, expected: dict[str, str]) -> None:
    server = start()
    body = {"id": "mine", "base": "base", "adapter": str(copied(place, "a0", "allowed/mine"))}
    assert complete(server, "mine").status_code == 404
    new = admin(server, "POST", body={**body, "load": True})
    assert (new.status_code, new.json()["kind"], new.json()["parent"]) == (201, "adapter", "base")
    assert text(server, "mine") == expected["a0"]
    assert admin(server, "POST", body=body).status_code == 200
    other = {**body, "adapter": str(copied(place, "a1", "allowed/other"))}
    assert admin(server, "POST", body=other).json()["error"]["code"] == "name_taken"
    assert admin(server, "POST", body={**other, "replace": True}).status_code == 201
    assert text(server, "mine") == expected["a1"]
    assert admin(server, "DELETE", "/mine").json() == {"model": "mine", "deleted": True, "unloaded": 1}
    assert complete(server, "mine").status_code == 404
    assert server_models(server)[0]["adapters"] == []
    assert text(server, "base") == expected["base"]


def test_a_base_that_was_added(place: Path, start: Start, expected: dict[str, str]) -> None:
    server = start(max_models_per_replica=2)
    shutil.copytree(place / "base", place / "allowed" / "copy")
    model = {"id": "copy", "like": "base", "model_name": str(place / "allowed" / "copy")}
    assert admin(server, "POST", body=model).status_code == 201
    adapter = {"id": "mine", "base": "copy", "adapter": str(copied(place, "a0", "allowed/mine"))}
    assert admin(server, "POST", body=adapter).status_code == 201
    assert text(server, "mine") == expected["a0"]
    other = {**model, "aliases": ["other"], "replace": True}
    assert admin(server, "POST", body=other).json()["error"]["code"] == "name_taken"
    refused = admin(server, "DELETE", "/copy")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "name_taken")
    assert "is the base of mine" in refused.json()["error"]["message"]
    assert admin(server, "DELETE", "/mine").status_code == 200
    assert admin(server, "DELETE", "/copy").status_code == 200


def test_what_may_be_added(place: Path, start: Start) -> None:
    zero = {"interventions": [{"module": "model.norm", "op": "zero"}]}
    server = start(entry(place, "a0"), base={"variants": {"base+zero": zero}})
    folder = str(copied(place, "a1", "allowed/mine"))
    whole = write_adapter(llama(), place / "allowed" / "whole", LINEARS, init_lora_weights="pissa")
    good = {"id": "x", "base": "base", "adapter": folder}
    for given, status, word in [
        ({**good, "adapter": str(place / "made" / "a1")}, 403, "admin_roots"),
        ({**good, "adapter": "org/name"}, 403, "admin_roots"),
        ({**good, "base": "nobody"}, 400, "no model has the name 'nobody'"),
        ({**good, "base": "a0"}, 400, "is an adapter itself"),
        ({**good, "base": "base+zero"}, 400, "'base+zero' is a variant"),
        ({"id": "x", "base": "base"}, 400, "'adapter'"),
        ({"id": "x"}, 400, "'like'"),
        ({**good, "engine": {"max_batch_size": 2}}, 400, "'engine'"),
        ({"id": "x", "like": "a0", "model_name": folder}, 400, "'like'"),
        ({**good, "adapter": str(whole)}, 400, "init_lora_weights: pissa"),
    ]:
        answer = admin(server, "POST", body=given)
        assert answer.status_code == status, (given, answer.text)
        assert word in answer.json()["error"]["message"]


def of_another_shape(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_A" in key:
            tensors[key] = tensors[key][:, :-1].contiguous()


def test_an_adapter_that_does_not_fit_replaces_nothing(place: Path, start: Start, expected: dict[str, str]) -> None:
    server = start(api={"vllm_lora_routes": True})
    wrong = str(write_adapter(llama(), place / "allowed" / "wrong", LINEARS, change=of_another_shape))
    good = {"id": "good", "base": "base", "adapter": str(copied(place, "a0", "allowed/good"))}
    assert admin(server, "POST", body=good).status_code == 201
    for fields in ({"id": "good", "replace": True, "load": True}, {"id": "good", "replace": True}, {"id": "new"}):
        refused = admin(server, "POST", body={**good, **fields, "adapter": wrong}).json()["error"]
        assert (refused["code"], refused["param"]) == ("invalid_value", "adapter")
        assert "the adapter's matrices take" in refused["message"]
    body = {"lora_name": "new", "lora_path": wrong}
    assert requests.post(f"{server.url}/v1/load_lora_adapter", json=body, headers=ADMIN, timeout=60).status_code == 400
    assert error(server, "new")[0] == 404
    assert text(server, "good") == expected["a0"]
    server.stop()
    assert text(start(), "good") == expected["a0"]


def test_the_routes_of_vllm(place: Path, start: Start, expected: dict[str, str]) -> None:
    server = start(api={"vllm_lora_routes": True})
    folder = str(copied(place, "a0", "allowed/mine"))

    def post(path: str, headers: Any = ADMIN, **body: Any) -> requests.Response:
        return requests.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=60)

    assert post("load_lora_adapter", CLIENT, lora_name="mine", lora_path=folder).status_code == 403
    loaded = post("load_lora_adapter", lora_name="mine", lora_path=folder)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'mine' added successfully.")
    assert text(server, "mine") == expected["a0"]
    again = post("load_lora_adapter", lora_name="mine", lora_path=folder)
    assert (again.status_code, "already been loaded" in again.text) == (400, True)
    other = str(copied(place, "a1", "allowed/other"))
    assert post("load_lora_adapter", lora_name="mine", lora_path=other).status_code == 400
    assert post("load_lora_adapter", lora_name="mine", lora_path=other, load_inplace=True).status_code == 200
    assert text(server, "mine") == expected["a1"]
    assert post("unload_lora_adapter", lora_name="mine").status_code == 200
    assert complete(server, "mine").status_code == 404
    assert post("unload_lora_adapter", lora_name="mine").status_code == 404


def test_the_routes_of_vllm_are_off(start: Start) -> None:
    server = start()
    answer = requests.post(f"{server.url}/v1/load_lora_adapter", json={}, headers=ADMIN, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "route_gone")
    assert "api.vllm_lora_routes" in answer.json()["error"]["message"]


def drop(part: str) -> Callable[[dict[str, torch.Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        del tensors[next(key for key in tensors if part in key)]

    return change


def rename(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in list(tensors):
        tensors[key.replace(".layers.", ".blocks.")] = tensors.pop(key)


def one_more(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)


def another(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_C"] = torch.ones(2, 2)


def wider(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in tensors:
        if "lora_A" in key:
            tensors[key] = torch.ones(4, 7)


def not_a_number(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def other_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["r"] = 7


def drop_module(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in tensors if ".layers.0.mlp.up_proj." in key]:
        del tensors[key]


def convolution(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for key in [key for key in tensors if ".layers.0.mlp.up_proj." in key]:
        tensors[key] = tensors[key][..., None]


def drop_name(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["target_modules"] = [*config["target_modules"], "gate_proj"]


NO_PEFT = ", so that it needs a merged copy of its base, which the peft package makes: pip install peft."
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero": ("all its matrices B are zero", {"change": zeros}),
    "names": ("its base has no module model.blocks.0", {"change": rename}),
    "more": (
        "has another lm_head.weight than its base, and lm_head is not among modules_to_save",
        {"change": one_more},
    ),
    "other": ("has base_model.model.lm_head.lora_C, which belongs to no LoRA", {"change": another}),
    "half": ("lacks matrix B of model.layers.0.mlp.up_proj", {"change": drop("0.mlp.up_proj.lora_B")}),
    "layer": ("lacks the matrices of model.layers.0.mlp.up_proj", {"change": drop_module}),
    "target": ("has no matrices of gate_proj", {"change": drop_name}),
    "width": ("the adapter's matrices take 7", {"change": wider}),
    "nan": ("numbers that are not finite", {"change": not_a_number}),
    "rank": ("the configuration says 7", {"change": other_rank}),
    "max rank": ("its rank is 600; adapters.max_rank of its base is 512", {"rank": 600}),
    "dora": ("has no magnitude vector", {"change": drop("0.mlp.up_proj.lora_magnitude"), "use_dora": True}),
    "pissa": ("init_lora_weights: pissa", {"init_lora_weights": "pissa"}),
    "saved": ("has no weights of score, which is among modules_to_save", {"modules_to_save": ["score"]}),
    "tokens of the embedding": (
        "lacks the vectors of trainable_token_indices",
        {"trainable_token_indices": [1], "change": drop("token_adapter")},
    ),
    "experts": (f"(target_parameters){NO_PEFT}", {"target_parameters": ["experts.down_proj"]}),
    "convolution": (f"the matrices of model.layers.0.mlp.up_proj have 3 dimensions{NO_PEFT}", {"change": convolution}),
    "bias": (f"changes the biases of its base (bias: all){NO_PEFT}", {"bias": "all"}),
    "adalora": (f"its type is ADALORA{NO_PEFT}", {"peft_type": "ADALORA"}),
    "head": ("its task is SEQ_CLS", {"task_type": "SEQ_CLS"}),
    "prompt": ("its type is PROMPT_TUNING", {"peft_type": "PROMPT_TUNING"}),
    "unknown": ("has the option use_magic, which is unknown here", {"use_magic": True}),
}


def test_what_cannot_be_served_is_refused_by_name(
    place: Path,
    start: Start,
    expected: dict[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start goes on, the list says why, and the base is never served under the adapter's name."""
    monkeypatch.setattr("deployments.adapters.refused.find_spec", lambda name: None)
    for name, (_, options) in CASES.items():
        write_adapter(llama(), place / "run" / name, LINEARS, **options)
    pickle = write_adapter(llama(), place / "run" / "pickle", LINEARS)
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    words = byte_tokenizer()
    words.add_tokens(["<new>"])
    words.save_pretrained(write_adapter(llama(), place / "run" / "tokens", LINEARS))
    reasons = {name: reason for name, (reason, _) in CASES.items()}
    reasons |= {"pickle": "its weights are a pickle", "tokens": "its tokenizer has other tokens than its base's"}
    adapters = [{"id": name, "base": "base", "adapter": str(place / "run" / name)} for name in reasons]
    server = start(*adapters, base={"preload": True})
    rows = states(server)
    for name, reason in reasons.items():
        status, code, message = error(server, name)
        assert (status, code) == (404, "model_not_found"), name
        assert message.startswith(f"The adapter {name!r} cannot be served: "), message
        assert reason in message, message
        assert (rows[name]["state"], reason in rows[name]["reason"]) == ("refused", True), rows[name]
        warnings = [r for r in caplog.records if r.levelname == "WARNING" and f"adapter {name!r} cannot" in r.message]
        assert len(warnings) == 1, name
    assert rows["base"]["state"] == "ready"
    assert text(server, "base") == expected["base"]


def test_what_a_configuration_refuses(place: Path) -> None:
    base = {"id": "base", "loader": "a:b"}
    folder = str(place / "made" / "a0")
    good = {"id": "x", "base": "base", "adapter": folder}
    for models, word in [
        (
            [base, {**good, "base": "bass"}],
            "models[1].base: there is no model 'bass' among models (did you mean 'base'?)",
        ),
        ([base, good, {**good, "id": "y", "base": "x"}], "models[2].base: 'x' is an adapter itself"),
        ([base, {**good, "adapter": f"{folder}-gone"}], "models[1].adapter: "),
        ([base, {"id": "x", "base": "base"}], "an adapter has both keys"),
        ([base, {**good, "engine": {"max_batch_size": 3}}], "models[1].engine: an adapter has this of its base"),
        ([base, {**good, "loader": "a:b"}], "models[1].loader: an adapter has this of its base"),
        ([{"id": "x"}], "models[0].loader: missing"),
    ]:
        with pytest.raises(ConfigError) as raised:
            make_app({"models": models})
        assert word in str(raised.value)


def test_adapters_have_the_pool_of_their_base(place: Path) -> None:
    models = [{"id": "base", "loader": "a:b"}, {"id": "other", "loader": "a:b"}, entry(place, "a0")]
    pools = {"one": {"models": ["base"]}, "two": {"models": ["other"]}}
    make_app({"models": models, "pools": pools})
    with pytest.raises(ConfigError, match="has the adapter 'a0', which is in the pool of its base"):
        make_app({"models": models, "pools": {"one": {"models": ["base", "a0"]}, "two": {"models": ["other"]}}})


def test_adapters_leave_when_memory_is_short(place: Path, start: Start, expected: dict[str, str]) -> None:
    size = 40_000
    server = start(*(entry(place, f"a{i}") for i in range(3)), base={"adapters": {"memory_gib": size / 2**30}})
    for name in ("a0", "a1", "a2", "a0"):
        assert text(server, name) == expected[name]
        held = server_models(server)[0]["adapters"]
        assert sum(adapter["bytes"] for adapter in held) <= size
        assert held[-1]["id"] == name
    small = start(entry(place, "a0"), base={"adapters": {"memory_gib": 1e-6}})
    assert "adapters.memory_gib of its base is 1e-06" in error(small, "a0")[2]


@pytest.mark.parametrize(("workers", "count"), [(3, 8), pytest.param(16, 50, marks=pytest.mark.long)])
def test_running_requests_keep_their_adapter(
    workers: int, count: int, place: Path, start: Start, expected: dict[str, str]
) -> None:
    """While others are added, leave because memory is short, and are removed; then the one in use is rewritten."""
    mine = copied(place, "a0", "run/mine")
    room = {"memory_gib": 3_700 * (3 + 4 + count + 1) / 2**30}  # for the ranks of those in use and of the largest
    server = start({"id": "a0", "base": "base", "adapter": str(mine)}, entry(place, "a1"), base={"adapters": room})
    long = {
        name: complete(server, name, prompt=PROMPT, max_tokens=300, ignore_eos=True).json()
        for name in ("a0", "a1", "base")
    }
    stop = threading.Event()
    wrong: list[str] = []

    def work(name: str) -> None:
        while not stop.is_set():
            found = complete(server, name, prompt=PROMPT, max_tokens=300, ignore_eos=True).json()
            is_same = found["system_fingerprint"] == long[name]["system_fingerprint"]
            if is_same != (found["choices"] == long[name]["choices"]):
                wrong.append(name)

    with ThreadPoolExecutor(workers) as pool:
        done = [pool.submit(work, list(long)[i % len(long)]) for i in range(workers)]
        try:
            for i in range(count):
                folder = write_adapter(llama(), place / "allowed" / f"x{i}", LINEARS, seed=50 + i, rank=2 + i)
                body = {"id": f"x{i}", "base": "base", "adapter": str(folder), "load": True}
                assert admin(server, "POST", body=body).status_code == 201
                if i % 2:
                    assert admin(server, "DELETE", f"/x{i}").status_code == 200
            held = {adapter["id"] for adapter in server_models(server)[0]["adapters"]}
            assert {"a0", "a1"} <= held
            assert len(held) < 2 + count // 2, "some have left"
            copied(place, "a2", "run/mine")
            until(lambda: answered(server, "a0")["system_fingerprint"] != long["a0"]["system_fingerprint"])
        finally:
            stop.set()
        for each in done:
            each.result()
    assert wrong == []
    assert text(server, "a0") == expected["a2"]


def answered(server: Server, name: str) -> Any:
    return complete(server, name, prompt=PROMPT, max_tokens=1).json()


def test_the_texts_of_an_adapter_are_its_own(place: Path, start: Start) -> None:
    """Its chat template, and the token that ends a turn in it."""
    folder = copied(place, "a0", "run/mine")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|pad|>{% endfor %}"
    )
    server = start({"id": "mine", "base": "base", "adapter": str(folder)})
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    texts = [
        requests.post(
            f"{server.url}/v1/chat/completions/render", json={"model": model, **body}, headers=CLIENT, timeout=60
        ).json()
        for model in ("mine", "base")
    ]
    assert "[user] hi<|pad|>" in json.dumps(texts[0])
    assert "<|im_start|>user" in json.dumps(texts[1])
