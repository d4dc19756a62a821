"""`capture` and `interventions` over HTTP: handles, files, vectors, variants, refusals."""

from __future__ import annotations

import contextlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import torch
from openai import OpenAI

from deployments.inside_client import load_capture, pack, upload
from tests.inside.asking import far
from tests.inside.conftest import KEYS
from tests.inside.loaders import SEEN
from tests.openai.conftest import Serve, Server

MESSAGES = [{"role": "user", "content": "Hello there"}]
HEADERS = {"authorization": f"Bearer {KEYS[0]}"}
ALL = {"modules": ["hidden_states"], "positions": "all"}


@pytest.fixture
def client(inside: Server) -> OpenAI:
    return inside.client(api_key=KEYS[0], _strict_response_validation=False)


def post(server: Server, path: str, **body: Any) -> requests.Response:
    return requests.post(f"{server.url}/v1{path}", json={"model": "tiny", **body}, headers=HEADERS, timeout=60)


def complete(server: Server, **body: Any) -> requests.Response:
    return post(
        server, "/completions", **{"prompt": "abcdefgh", "max_tokens": 4, "temperature": 0, "ignore_eos": True, **body}
    )


def loaded(server: Server, handle: Any) -> Any:
    return load_capture(server.url, handle, api_key=KEYS[0])


def test_a_chat_has_a_file_for_each_choice(inside: Server, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=5,
        n=2,
        extra_body={"capture": ALL, "return_token_ids": True, "ignore_eos": True},
    )
    assert raw.headers["x-troupe-inside"] == "captured=1 interventions=0"
    answer = raw.parse()
    first, second = (loaded(inside, choice.model_extra["capture"]) for choice in answer.choices)
    ids = [*answer.model_extra["prompt_token_ids"], *answer.choices[0].model_extra["token_ids"]][:-1]
    assert first.token_ids.tolist() == ids
    assert first["hidden_states.2"].shape == (len(ids), 48)
    # The prompt is computed once, and its states are in the first file.
    prompt = answer.usage.prompt_tokens
    assert second.positions.tolist() == list(range(prompt, prompt + 4))
    assert second.meta["prompt_in"] == answer.choices[0].model_extra["capture"]["id"]
    assert first.meta["model"] == "tiny"
    assert (first.meta["prompt_tokens"], first.meta["completion_tokens"]) == (prompt, 5)


def test_a_stream_has_the_handle_beside_the_reason_to_end(inside: Server, client: OpenAI) -> None:
    wanted = {"capture": {"modules": ["model.norm"], "positions": "generated"}, "ignore_eos": True}
    chats = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=5, n=2, stream=True, extra_body=wanted
    )
    texts = client.completions.create(model="tiny", prompt="abc", max_tokens=5, stream=True, extra_body=wanted)
    for chunks, count in ((list(chats), 2), (list(texts), 1)):
        choices = [choice for chunk in chunks for choice in chunk.choices]
        with_handle = [choice for choice in choices if "capture" in (choice.model_extra or {})]
        assert [choice for choice in choices if choice.finish_reason] == with_handle
        assert len(with_handle) == count
        assert all(loaded(inside, each.model_extra["capture"])["model.norm"].shape == (4, 48) for each in with_handle)


def test_a_response_and_its_stream_have_a_capture(inside: Server) -> None:
    asked = {"input": "Hello there", "max_output_tokens": 4, "capture": {"modules": ["model.norm"]}}
    whole = post(inside, "/responses", **asked).json()
    assert loaded(inside, whole["capture"])["model.norm"].shape == (1, 48)
    events = post(inside, "/responses", **asked, stream=True).text
    completed = json.loads(events.strip().splitlines()[-1].removeprefix("data: "))
    assert loaded(inside, completed["response"]["capture"])["model.norm"].shape == (1, 48)


def test_scores_are_captured_and_steered(inside: Server) -> None:
    asked = {"prompt": "abc", "choices": ["de", "fgh"]}
    plain = post(inside, "/score", **asked, capture=ALL).json()
    files = [loaded(inside, each["capture"]) for each in plain["data"]]
    assert [len(file.positions) for file in files] == [5, 6]
    steered = post(inside, "/score", **asked, interventions=[{"module": "model.norm", "op": "zero"}]).json()
    assert [each["logprob"] for each in steered["data"]] == pytest.approx(
        [-each["tokens"] * torch.log(torch.tensor(261.0)).item() for each in steered["data"]], abs=1e-5
    )


def test_a_small_capture_can_be_in_the_answer(inside: Server) -> None:
    wanted = {"modules": ["model.norm"], "positions": "all", "return": "inline"}
    (choice,) = complete(inside, capture=wanted, echo=True, logprobs=0).json()["choices"]
    assert "url" not in choice["capture"]
    assert load_capture(choice["capture"])["model.norm"].shape == (11, 48)
    error = complete(inside, capture={**wanted, "modules": ["**"]}, max_tokens=200).json()["error"]
    assert (error["code"], error["param"]) == ("capture_too_large", "capture")


def test_the_best_of_several_answers_keeps_its_file_alone(inside: Server) -> None:
    before = listed(inside)
    answer = complete(inside, n=1, best_of=3, temperature=1, capture=ALL).json()
    (choice,) = answer["choices"]
    assert loaded(inside, choice["capture"]).positions.tolist() == list(range(11))
    assert {each["id"] for each in listed(inside)} - {each["id"] for each in before} == {choice["capture"]["id"]}


def listed(server: Server, key: str = KEYS[0]) -> list[dict[str, Any]]:
    answer = requests.get(f"{server.url}/v1/captures", headers={"authorization": f"Bearer {key}"}, timeout=10)
    data: list[dict[str, Any]] = answer.json()["data"]
    return data


def test_a_file_in_parts_by_its_key_alone_and_deleted(inside: Server) -> None:
    handle = complete(inside, capture=ALL).json()["choices"][0]["capture"]
    url = inside.url + handle["url"]
    whole = requests.get(url, headers=HEADERS, timeout=10)
    assert whole.headers["content-type"] == "application/vnd.safetensors"
    assert len(whole.content) == handle["bytes"] == int(whole.headers["content-length"])
    for asked, expected in (
        ("bytes=0-7", slice(0, 8)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-5", slice(-5, None)),
    ):
        part = requests.get(url, headers={**HEADERS, "range": asked}, timeout=10)
        assert (part.status_code, part.content) == (206, whole.content[expected])
    assert requests.get(url, headers={**HEADERS, "range": "bytes=999999-"}, timeout=10).status_code == 416
    assert requests.get(url, headers={**HEADERS, "range": "bytes=" + "9" * 5000 + "-"}, timeout=10).status_code == 200
    head = requests.head(url, headers=HEADERS, timeout=10)
    assert (head.headers["content-length"], head.content) == (str(handle["bytes"]), b"")
    assert head.headers["etag"] == whole.headers["etag"]
    other = {"authorization": f"Bearer {KEYS[1]}"}
    assert requests.get(url, headers=other, timeout=10).json()["error"]["code"] == "capture_not_found"
    assert requests.delete(url, headers=other, timeout=10).status_code == 404
    assert handle["id"] in [each["id"] for each in listed(inside)]
    assert listed(inside, KEYS[1]) == []
    assert requests.delete(url, headers=HEADERS, timeout=10).status_code == 204
    assert requests.get(url, headers=HEADERS, timeout=10).status_code == 404


def test_the_record_names_the_file_and_has_no_numbers(inside: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    vector = pack(torch.ones(48))
    change = {"module": "model.layers.0", "op": "add", "vector": vector}
    answer = complete(inside, capture=ALL, interventions=[change]).json()
    found = requests.get(f"{inside.url}/records", params={"q": answer["id"]}, headers=HEADERS, timeout=10).json()
    record = requests.get(f"{inside.url}/records/{found['data'][0]['record']}", headers=HEADERS, timeout=10).json()
    assert record["captures"] == [answer["choices"][0]["capture"]["id"]]
    assert record["sampling"]["interventions"] == []


def test_a_vector_that_was_uploaded(inside: Server) -> None:
    numbers = torch.linspace(-9, 9, 48)
    uploaded = upload(f"{inside.url}/v1", numbers, api_key=KEYS[0])
    assert upload(inside.url, numbers.tolist(), api_key=KEYS[0]) == uploaded
    texts = [
        complete(inside, interventions=[{"module": "model.layers.0", "op": "add", "vector": vector}]).json()["choices"]
        for vector in (uploaded, pack(numbers), numbers.tolist())
    ]
    assert texts[0] == texts[1] == texts[2]
    unknown = {"module": "model.layers.0", "op": "add", "vector": {"id": "vec-0"}}
    error = complete(inside, interventions=[unknown]).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_vector", "interventions[0].vector.id")
    numbers_of = ('[Infinity],"data_offsets":[0,8]', '[-2,-1],"data_offsets":[0,8]', '[2],"data_offsets":["0",8]')
    numbers_of += ('[2],"data_offsets":[-16,-8]', '[2],"data_offsets":[0.0,8]')
    described = [f'{{"vector":{{"dtype":"F32","shape":{each}}}}}'.encode() for each in numbers_of]
    for header in (b"", b"[" * 100_000, *described):
        body = len(header).to_bytes(8, "little") + header + bytes(8)
        refused = requests.post(f"{inside.url}/v1/vectors", data=body, headers=HEADERS, timeout=10)
        assert refused.json()["error"]["code"] == "vector_shape", header[:80]


def test_a_variant_answers_beside_the_plain_name(inside: Server, client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert "tiny+calm" in names
    plain = complete(inside, logprobs=1, prompt=["abc", "hello"]).json()
    calm = complete(inside, model="tiny+calm", logprobs=1, prompt=["abc", "hello"]).json()
    by_hand = complete(
        inside,
        logprobs=1,
        prompt=["abc", "hello"],
        interventions=[{"module": "model.layers.0", "op": "add", "vector": [3.0] * 48, "scale": 4.0}],
    ).json()
    assert calm["model"] == "tiny+calm"
    texts = [[choice["text"] for choice in answer["choices"]] for answer in (plain, calm, by_hand)]
    assert texts[1] == texts[2] != texts[0]
    assert calm["system_fingerprint"] == plain["system_fingerprint"]
    error = post(inside, "/embeddings", model="tiny+calm", input="abc").json()["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "model")
    assert "tiny+calm" in complete(inside, model="tiny+clam").json()["error"]["message"]


def test_a_client_tokenizes_under_the_name_of_a_variant(inside: Server) -> None:
    """lm_eval with `tokenizer_backend=remote` does, below the model's own path."""
    path = f"{inside.url}/models/tiny+calm/v1"
    ids = requests.post(f"{path}/tokenize", json={"prompt": "abc"}, headers=HEADERS, timeout=10).json()["tokens"]
    text = requests.post(f"{path}/detokenize", json={"tokens": ids}, headers=HEADERS, timeout=10).json()["prompt"]
    assert text.endswith("abc")
    said = requests.post(f"{path}/completions", json={"prompt": "abc", "max_tokens": 1}, headers=HEADERS, timeout=30)
    assert said.json()["model"] == "tiny+calm"
    assert requests.get(f"{path}/tokenizer_info", headers=HEADERS, timeout=10).status_code == 200


def test_the_catalogue(inside: Server) -> None:
    found = requests.get(f"{inside.url}/v1/modules", params={"model": "tiny"}, headers=HEADERS, timeout=30).json()
    modules = {each["name"]: each for each in found["data"]}
    assert (modules["model.layers"]["capturable"], modules["model.layers"]["taps"]) == (False, [])
    assert "not called" in modules["model.layers"]["reason"]
    block = {tap["tap"]: tap for tap in modules["model.layers.1"]["taps"]}
    assert (block["output"]["rows"], block["output"]["shape"], block["output"]["calls"]) == ("tokens", [48], 1)
    assert found["aliases"]["hidden_states.1"] == "model.layers.1:input"
    assert found["aliases"]["blocks.0.hook_resid_post"] == "model.layers.1:input"
    some = requests.get(
        f"{inside.url}/v1/modules", params={"model": "tiny", "match": "**.mlp"}, headers=HEADERS, timeout=30
    ).json()
    assert [each["name"] for each in some["data"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_nothing_is_measured_in_a_model_that_is_closed(caplog: pytest.LogCaptureFixture, serve: Serve) -> None:
    measured = []
    for inside in ("off", "capture"):
        caplog.clear()
        with caplog.at_level("INFO"):
            server = serve([{"id": "it", "loader": "tests.openai.tiny_models:load_model", "inside": inside}])
            assert complete(server, model="it").status_code == 200
            measured.append(any("inside (" in record.getMessage() for record in caplog.records))
    assert measured == [False, True]


CAPTURE = {"capture": {"modules": ["model.norm"]}}
HALF = {"data": "AAAA", "shape": [48]}
QUESTION = {"type": "predicate", "instructions": "It is true."}
CHANGE = {"interventions": [{"module": "model.norm", "op": "zero"}]}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/completions", {"model": "hooked", "prompt": "abc", **CAPTURE}, "capture"),
        ("/completions", {"model": "hooked", "prompt": "abc", **CHANGE}, "interventions"),
        ("/completions", {"model": "own", "prompt": "abc", **CHANGE}, "interventions"),
        ("/completions", {"model": "shut", "prompt": "abc", **CAPTURE}, "capture"),
        ("/completions", {"model": "seen", "prompt": "abc", **CHANGE}, "interventions"),
        ("/completions", {"prompt": "abc", "num_beams": 2, **CAPTURE}, "num_beams"),
        ("/embeddings", {"input": "abc", **CAPTURE}, "capture"),
        (
            "/decisions",
            {"input": "abc", "questions": [{"type": "predicate", "instructions": "x"}], **CHANGE},
            "interventions",
        ),
    ],
)
def test_what_cannot_look_inside_says_so(inside: Server, path: str, body: dict[str, Any], param: str) -> None:
    answer = post(inside, path, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported_parameter")
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"capture": {"modules": ["model.norm"], "position": "all"}}, "capture.position"),
        ({"capture": {"modules": []}}, "capture.modules"),
        ({"capture": {"modules": ["model.norm"], "positions": []}}, "capture.positions"),
        ({"capture": {"modules": ["model.norm"], "positions": "last"}}, "capture.positions"),
        ({"capture": {"modules": ["model.norm"], "positions": [0, 1.5]}}, "capture.positions[1]"),
        ({"capture": {"modules": ["model.norm"], "positions": {"form": 2}}}, "capture.positions.form"),
        ({"capture": {"modules": ["model.norm"], "positions": 3}}, "capture.positions"),
        ({"capture": "model.norm"}, "capture"),
        ({"interventions": [{"module": "model.norm", "op": "add", "vector": "ones"}]}, "interventions[0].vector"),
        ({"interventions": [{"module": "model.norm", "op": "add", "vector": [1, "a"]}]}, "interventions[0].vector[1]"),
        (
            {"interventions": [{"module": "model.norm", "op": "add", "vector": {"shape": [0], "data": ""}}]},
            "interventions[0].vector.shape[0]",
        ),
        ({"interventions": [{"module": "model.norm", "op": "add"}]}, "interventions[0]"),
        ({"interventions": [{"module": "model.norm", "op": "scale"}]}, "interventions[0]"),
        ({"interventions": [{"module": "model.norm", "op": "zero", "scale": 2}]}, "interventions[0]"),
        (
            {"interventions": [{"module": "model.norm", "op": "set", "vector": {"data": "AAAA", "shape": [48]}}]},
            "interventions[0].vector",
        ),
    ],
)
def test_a_misspelt_or_half_request_is_refused(inside: Server, body: dict[str, Any], param: str) -> None:
    error = complete(inside, **body).json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert "Fields" not in error["message"]


def test_a_key_that_is_not_known_is_refused_with_the_nearest(inside: Server) -> None:
    error = complete(inside, capture={"modules": ["model.norm"], "position": "all"}).json()["error"]
    assert error["message"] == (
        "Invalid 'capture.position': there is no such key (did you mean 'positions'?); got 'all'."
    )
    assert complete(inside, capture={"modules": ["model.norm"], "positions": None}).status_code == 200


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("model.layers.{0,9}", "'9'"),
        ("model.layers.{0-3}.mlp", "'2'"),
        ("model.layers.{0,1}.{mlp,mpl}:input", "'mpl'"),
        ("hidden_states.{1,7}", "'7'"),
        ("model.layers.{0-99999999999}", "'2'"),
    ],
)
def test_what_braces_name_is_there_or_refused(inside: Server, module: str, text: str) -> None:
    error = complete(inside, capture={"modules": [module]}).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_module", "capture.modules[0]")
    assert f"no module fits {text} in the braces" in error["message"]


def test_the_nearest_names_are_of_the_same_kind(inside: Server) -> None:
    error = complete(inside, capture={"modules": ["hidden_states.9"]}).json()["error"]
    assert "The nearest are hidden_states.2, hidden_states.1, hidden_states.0." in error["message"]


def test_a_query_of_the_catalogue_is_read_or_named(inside: Server) -> None:
    path = f"{inside.url}/v1/modules"
    broken = requests.get(path, params={"model": "tiny", "match": "model.layers.{0"}, headers=HEADERS, timeout=30)
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "match")
    other = requests.get(path, params={"model": "tiny", "mtach": "x"}, headers=HEADERS, timeout=30)
    assert other.headers["x-troupe-ignored"] == "mtach"


@pytest.mark.parametrize("module", ["{0-99999}{0-99999}{1-0}", ".".join(["**"] * 160) + ".none", "{a}" * 170])
def test_a_pattern_that_stands_for_very_much_is_answered_at_once(inside: Server, module: str) -> None:
    error = complete(inside, capture={"modules": [module]}).json()["error"]
    assert (error["code"], error["param"]) == ("unknown_module", "capture.modules[0]")
    shown: Any = {"params": {"model": "tiny", "match": module}, "headers": HEADERS, "timeout": 10}
    assert requests.get(f"{inside.url}/v1/modules", **shown).json()["data"] == []
    too_long = requests.get(f"{inside.url}/v1/modules", params={"match": "{a}" * 1200}, headers=HEADERS, timeout=10)
    assert (too_long.status_code, too_long.json()["error"]["param"]) == (400, "match")


def test_braces_whose_texts_fit_together_in_part(inside: Server) -> None:
    answer = complete(inside, capture={"modules": ["model.layers.0.{mlp,self_attn}.{gate_proj,q_proj}"]})
    names = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"}
    assert answer.json()["choices"][0]["capture"]["tensors"].keys() == names


def test_a_capture_that_is_too_large_is_refused_before_it_is_computed(inside: Server) -> None:
    asked = {"capture": {"modules": ["**"], "positions": "all"}, "max_tokens": 900}
    error = complete(inside, **asked).json()["error"]
    assert error["code"] == "capture_too_large"
    assert "per_choice_mib" in error["message"]


def test_files_expire_and_make_room(serve: Serve, tmp_path: Path) -> None:
    captures = {"dir": str(tmp_path), "ttl_s": 0.2, "gib": 20_000 / 2**30}
    server = serve([{"id": "tiny", "loader": "tests.openai.tiny_models:load_model"}], captures=captures)
    # Each file needs more than half of the room, so that each waits until the one before has expired.
    handles = [complete(server, capture=ALL, max_tokens=12).json()["choices"][0]["capture"] for _ in range(4)]
    assert all(handle["bytes"] > 10_000 for handle in handles)
    assert requests.get(server.url + handles[0]["url"], timeout=10).status_code == 404
    too_large = complete(server, capture=ALL, max_tokens=40).json()["error"]
    assert too_large["code"] == "capture_too_large"


def test_a_client_that_leaves_and_a_request_that_fails_leave_no_file(inside: Server) -> None:
    before = {each["id"] for each in listed(inside)}
    with pytest.raises(requests.exceptions.Timeout):
        requests.post(
            f"{inside.url}/v1/completions",
            json={
                "model": "tiny",
                "prompt": "abc",
                "max_tokens": 900,
                "ignore_eos": True,
                "capture": CAPTURE["capture"],
            },
            headers=HEADERS,
            timeout=0.2,
        )
    huge = {"module": "lm_head", "op": "scale", "scale": 3e38}
    failed = complete(inside, capture=ALL, interventions=[huge])
    assert failed.json()["error"]["code"] == "intervention_not_finite"
    assert {each["id"] for each in listed(inside)} == before


def test_embeddings_beside_a_capture_are_those_without(inside: Server) -> None:
    """Both run forwards over the same modules, in threads of their own."""
    texts = [f"text {number}" for number in range(6)]

    def embedded(text: str) -> Any:
        return post(inside, "/embeddings", input=text).json()["data"][0]["embedding"]

    def captured(text: str) -> tuple[list[int], torch.Tensor]:
        answer = complete(inside, prompt=text, max_tokens=24, capture={**ALL, "return": "inline"})
        found = load_capture(answer.json()["choices"][0]["capture"])
        return found.token_ids.tolist(), torch.cat([found[f"hidden_states.{layer}"] for layer in range(3)])

    vectors, states = [embedded(text) for text in texts], [captured(text) for text in texts]
    with ThreadPoolExecutor(12) as pool:
        beside = [pool.submit(embedded, text) for text in texts], [pool.submit(captured, text) for text in texts]
        assert [each.result() for each in beside[0]] == vectors
        for (ids, state), each in zip(states, beside[1], strict=True):
            found = each.result()
            assert found[0] == ids
            assert far(found[1], state) <= 1e-5


@pytest.mark.long
def test_memory_is_flat_over_hundreds_of_captures_and_clients_that_leave(serve: Serve, tmp_path: Path) -> None:
    captures = {"dir": str(tmp_path), "ttl_s": 0.5}
    server = serve([{"id": "tiny", "loader": "tests.openai.tiny_models:load_model"}], captures=captures)

    def one(number: int) -> None:
        body = {"model": "tiny", "prompt": f"{number} " * 60, "max_tokens": 16, "capture": CAPTURE["capture"]}
        if number % 2:  # half of the clients leave
            with contextlib.suppress(requests.exceptions.Timeout):
                requests.post(f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=0.02)
        else:
            assert complete(server, prompt=f"{number} " * 60, capture=ALL).status_code == 200

    def several(count: int) -> int:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(count)))
        return psutil.Process().memory_info().rss

    several(150)
    assert several(500) <= 1.02 * several(50) + (8 << 20)
    # The last files are gone with their time.
    end = time.monotonic() + 30
    while list(tmp_path.glob("*/cap-*")) and time.monotonic() < end:
        time.sleep(0.05)
    assert list(tmp_path.glob("*/cap-*")) == []
    assert listed(server) == []


def test_a_file_has_the_same_bytes_after_a_restart(serve: Serve) -> None:
    model = {"id": "tiny", "loader": "tests.openai.tiny_models:load_model", "engine": {"deterministic": True}}
    prompts = ["abcdefgh", "some other text", *(f"number {number}" for number in range(6))]

    def files(together: bool) -> dict[str, bytes]:
        server = serve([model])
        with ThreadPoolExecutor(len(prompts) if together else 1) as pool:
            answers = pool.map(lambda prompt: complete(server, prompt=prompt, capture=ALL).json(), prompts)
            handles = [answer["choices"][0]["capture"] for answer in answers]
        whole = [requests.get(server.url + handle["url"], headers=HEADERS, timeout=10).content for handle in handles]
        # The numbers of all tensors follow the header, which names the file and its time.
        numbers = [data[8 + int.from_bytes(data[:8], "little") :] for data in whole]
        return dict(zip(prompts, numbers, strict=True))

    assert files(together=False) == files(together=True)


def test_the_callback_of_a_loader_is_shown_states(inside: Server) -> None:
    SEEN.clear()
    asked = complete(inside, model="inspected", n=2, capture={"modules": ["model.norm"], "positions": "generated"})
    assert all("capture" in choice for choice in asked.json()["choices"])
    assert [{name: tuple(each.shape) for name, each in seen.items()} for seen in SEEN] == 2 * [
        {"model.layers.1": (3, 48), "lm_head": (3, 261)}
    ]
    # Ordinary tensors, for autograd: those of the engine were made in its inference mode.
    assert not any(each.is_inference() for seen in SEEN for each in seen.values())
