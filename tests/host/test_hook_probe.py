"""A loader's hooks that return something else than the contract says: an error of the server that names the hook."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from jinja2 import TemplateError

from deployments.config.model import ModelEntry
from deployments.core.errors import ModelLoadFailed
from deployments.host.loaded_model import LoadedModel
from deployments.local import make_app, model_app
from model_loaders.contract import as_model_info
from tests.tiny import byte_tokenizer, llama

MODEL = llama()
IDS = torch.tensor([[72, 105]])

TEMPLATES: list[tuple[Any, str]] = [
    ({"text": "Hi"}, "Hook apply_chat_template returned dict; expected str"),
    (None, "Hook apply_chat_template returned NoneType"),
    ([1, 2], "Hook apply_chat_template returned list"),
    (b"Hi", "Hook apply_chat_template returned bytes"),
    ("Hi \ud800", "Hook apply_chat_template returned half of a surrogate pair"),
    ("", "Hook apply_chat_template returned an empty text"),
]
ENCODED: list[tuple[Any, str]] = [
    ({"input_ids": [[72, 99999]]}, "Hook encode returned the token id 99999; expected the model's ids 0 to 260"),
    ({"input_ids": [-1]}, "Hook encode returned the token id -1"),
    ({"input_ids": IDS.float()}, "Hook encode returned input_ids of dtype torch.float32 and shape (1, 2)"),
    ({"input_ids": IDS.bool()}, "of dtype torch.bool"),
    ({"input_ids": []}, "Hook encode returned no token ids for a text of"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "Hook encode returned no token ids"),
    ({"input_ids": IDS.repeat(2, 1)}, "shape (2, 2)"),
    ({"input_ids": [[1, 2], [3]]}, "Hook encode returned input_ids=list"),
    ({"input_ids": "72 105"}, "Hook encode returned input_ids=str"),
    ({"input_ids": IDS.to("meta")}, "Hook encode returned input_ids=Tensor"),
    ({"input_ids": None}, "Hook encode returned dict with keys input_ids"),
    ({"ids": IDS}, "Hook encode returned dict with keys ids; expected a mapping with input_ids"),
    ({"input_ids": IDS, "attention_mask": [1]}, "an attention_mask of 1 positions for 2 input_ids"),
    (None, "Hook encode returned NoneType"),
    ("Hi", "Hook encode returned str"),
]
DECODED: list[tuple[Any, str]] = [
    (None, "Hook decode returned NoneType; expected str"),
    (["Hi"], "Hook decode returned list"),
    (b"Hi", "Hook decode returned bytes"),
    (b"Hi \xff".decode(errors="surrogateescape"), "Hook decode returned half of a surrogate pair"),
]
VECTORS: list[tuple[Any, str]] = [
    (torch.ones(4), "Hook embed returned torch.float32 of shape (4,); expected finite floats of shape [1, dimensions]"),
    (torch.ones(2, 4), "shape (2, 4)"),
    (torch.ones(1, 1, 4), "shape (1, 1, 4)"),
    (torch.ones(1, 0), "shape (1, 0)"),
    (torch.ones(1, 4, dtype=torch.long), "torch.int64"),
    (torch.full((1, 4), float("nan")), "not finite"),
    (torch.full((1, 4), 1e300, dtype=torch.float64), "not finite in float32"),
    (torch.ones(1, 4, device="meta"), "Hook embed returned Tensor"),
    (None, "Hook embed returned NoneType"),
    ([[1.0, 2.0], [3.0]], "Hook embed returned list"),
]
EVERY = [
    *(("apply_chat_template", *case) for case in TEMPLATES),
    *(("encode", *case) for case in ENCODED),
    *(("decode", *case) for case in DECODED),
    *(("embed", *case) for case in VECTORS),
]


def sound(name: str) -> Callable[..., Any]:
    """A hook that keeps the contract."""
    tokenizer = byte_tokenizer()
    return {
        "apply_chat_template": lambda messages: messages[0]["content"],
        "encode": lambda prompt: tokenizer(prompt),
        "decode": lambda token_ids: tokenizer.decode(token_ids),
        "embed": lambda texts: torch.ones(len(texts), 4),
    }[name]


def model(**hooks: Any) -> dict[str, Any]:
    return {"model": MODEL, "tokenizer": byte_tokenizer(), "model_name": "m", **hooks}


def asked(client: TestClient, name: str) -> Any:
    """The answer to a request that calls a hook."""
    if name == "embed":
        return client.post("/v1/embeddings", json={"model": "m", "input": "a text"})
    message = {"role": "user", "content": "a text"}
    return client.post("/v1/chat/completions", json={"model": "m", "messages": [message], "max_tokens": 2})


@pytest.mark.parametrize(("name", "returned", "said"), EVERY)
def test_a_hook_that_breaks_the_contract_is_a_load_error(name: str, returned: Any, said: str) -> None:
    info = as_model_info(model(**{name: lambda *args: returned}), "given")
    with pytest.raises(ModelLoadFailed, match=f"Hook {name} returned") as failed:
        LoadedModel(ModelEntry(id="m", loader="given"), info)
    assert said in str(failed.value)


@pytest.mark.parametrize("name", ["apply_chat_template", "encode", "decode", "embed"])
def test_a_hook_that_breaks_it_later_fails_that_request_alone(name: str) -> None:
    """Which is the server's fault and not the client's."""
    answers: list[Any] = []
    own = sound(name)
    app = model_app(
        model(**{name: lambda given: answers.pop() if answers else own(given)}), engine={"kind": "generate"}
    )
    with TestClient(app) as client:
        for case, returned, said in EVERY:
            if case == name:
                answers.append(returned)
                answer = asked(client, name)
                assert answer.status_code == 500
                assert answer.json()["error"]["code"] == "model_error"
                assert said in answer.json()["error"]["message"]
        assert asked(client, name).status_code == 200


def test_an_empty_prompt_is_still_the_clients_fault() -> None:
    with TestClient(model_app(model(encode=sound("encode")))) as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "", "max_tokens": 2})
    assert answer.status_code == 400


def test_a_tokenizer_that_has_more_ids_than_the_model_is_not_the_clients_fault() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    with TestClient(model_app({**model(), "tokenizer": tokenizer})) as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a<more>", "max_tokens": 2})
    assert answer.status_code == 500
    assert "The tokenizer returned the token id 261" in answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_generate_hook_that_breaks_it(stream: bool) -> None:
    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        return torch.full((1, 2), 65)

    with TestClient(model_app(model(generate=generate))) as client:
        body = {"model": "m", "prompt": "a text", "max_tokens": 2, "stream": stream}
        answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_error")
    assert "Hook generate returned 2 tokens; expected whole numbers" in answer.json()["error"]["message"]


ENDINGS = [SystemExit(3), asyncio.CancelledError("x"), GeneratorExit("x")]


@pytest.mark.parametrize("raised", ENDINGS, ids=lambda raised: type(raised).__name__)
@pytest.mark.parametrize("name", ["apply_chat_template", "encode", "decode", "embed", "generate"])
def test_a_hook_that_ends_the_process_ends_one_request(name: str, raised: BaseException) -> None:
    own = sound(name) if name != "generate" else lambda input_ids: torch.nn.functional.pad(input_ids, (0, 1), value=65)
    endings: list[BaseException] = []

    def hook(input_ids: Any) -> Any:
        if endings:
            raise endings.pop()
        return own(input_ids)

    hooks = {name: hook if name == "generate" else lambda given: hook(given)}
    with TestClient(model_app(model(**hooks), engine={"kind": "generate"})) as client:
        assert asked(client, name).status_code == 200
        endings.append(raised)
        answer = asked(client, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_error")
        assert f"Hook {name} failed: {type(raised).__name__}" in answer.json()["error"]["message"]
        assert asked(client, name).status_code == 200


def test_a_loader_that_ends_the_process_is_a_load_error() -> None:
    app = make_app({"models": [{"id": "m", "loader": "tests.host.test_hook_probe:exiting"}]})
    with TestClient(app) as client:
        for _ in range(2):
            answer = asked(client, "decode")
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_load_failed")
            assert "SystemExit: no license" in answer.json()["error"]["message"]


def exiting() -> dict[str, Any]:
    sys.exit("no license")


def test_a_generate_hook_that_raises_is_named() -> None:
    def generate(input_ids: torch.Tensor) -> torch.Tensor:
        raise KeyError("cache")

    with TestClient(model_app(model(generate=generate))) as client:
        answer = client.post("/v1/completions", json={"model": "m", "prompt": "a text", "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_error")
    assert "Hook generate failed: KeyError" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("raised", "status", "param"),
    [
        (TemplateError("roles must alternate"), 400, "messages[1]"),
        (ValueError("roles must alternate"), 400, "messages[1]"),
        (KeyError("content"), 500, None),
        (TypeError("not a string"), 500, None),
    ],
)
def test_a_template_hook_that_raises(raised: Exception, status: int, param: str | None) -> None:
    """Refused messages are the client's fault, everything else is the hook's."""

    def write(messages: list[Any]) -> str:
        if any(message["content"] == "no" for message in messages):
            raise raised
        return "Hi"

    with TestClient(model_app(model(apply_chat_template=write))) as client:
        messages = [{"role": "user", "content": text} for text in ("yes", "no", "yes")]
        answer = client.post("/v1/chat/completions", json={"model": "m", "messages": messages, "max_tokens": 2})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert "ook apply_chat_template" in answer.json()["error"]["message"]


def test_a_template_hook_may_change_its_messages() -> None:
    """The same request is written again, by a trial or for another choice."""

    def write(messages: list[Any]) -> str:
        called = [call["function"].pop("arguments") for call in messages[1]["tool_calls"]]
        return f"{messages[0]['content']}{messages[1]['tool_calls']}{called}"

    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with TestClient(model_app(model(apply_chat_template=write))) as client:
        for _ in range(2):
            answer = client.post("/v1/chat/completions/render", json={"model": "m", "messages": messages})
            assert "sea" in answer.json()["prompt"]


def test_a_hook_that_raises_or_hangs_at_load_may_still_serve(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []
    leave = threading.Event()

    def encode(prompt: str) -> Any:
        calls.append(prompt)
        if len(calls) == 1:
            leave.wait(20)
        if len(calls) == 2:
            raise ValueError("not yet")
        return sound("encode")(prompt)

    app = model_app(model(encode=encode), hook_timeout_s=0.2, engine={"kind": "generate"})
    with TestClient(app) as client:
        assert "A hook of model m has not returned for 0.2 s" in caplog.text
        leave.set()
        assert "Hook encode failed: ValueError: not yet" in asked(client, "encode").json()["error"]["message"]
        assert asked(client, "encode").status_code == 200


def raises_at_once(given: Any) -> Any:
    return {}["text"]


@pytest.mark.parametrize("name", ["apply_chat_template", "encode", "decode", "embed"])
def test_a_hook_that_raises_at_load_is_a_warning_with_its_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    line = raises_at_once.__code__.co_firstlineno
    for hook, said in (
        (raises_at_once, f"Hook {name} failed: KeyError: 'text' (test_hook_probe.py, line {line + 1})"),
        (lambda: None, f"Hook {name} failed: TypeError"),
    ):
        LoadedModel(ModelEntry(id="m", loader="given"), as_model_info(model(**{name: hook}), "given"))
        warning = next(each.message for each in caplog.records if each.levelname == "WARNING")
        assert said in warning
        assert "(test_hook_probe.py, line " in warning
        caplog.clear()


def test_a_template_that_refuses_the_trial_and_an_encoder_of_images_may_still_serve() -> None:
    def write(messages: list[Any]) -> str:
        if len(messages) < 2:
            raise ValueError("a system message comes first")
        return "Hi"

    def encode(prompt: str, images: Any = ()) -> Any:
        return {"input_ids": IDS} if len(images) else {}["image"]

    LoadedModel(ModelEntry(id="m", loader="given"), as_model_info(model(apply_chat_template=write, encode=encode), ""))


def test_embed_is_tried_with_two_texts() -> None:
    info = as_model_info(model(embed=lambda texts: torch.ones(1, 4)), "given")
    with pytest.raises(ModelLoadFailed, match=r"expected finite floats of shape \[2, dimensions\]"):
        LoadedModel(ModelEntry(id="m", loader="given"), info)


OFFERED: list[tuple[dict[str, Any], str]] = [
    ({"vectors": {"v": "abc"}}, "vectors['v']: 'abc'; no such file"),
    ({"vectors": {"v": [1.0, float("nan")]}}, "vectors['v']: numbers that are not finite"),
    ({"vectors": {"v": object()}}, "vectors['v']: object; expected a tensor"),
    ({"vectors": {"v": torch.ones(1, 2, 3)}}, "vectors['v']: a tensor of shape [1, 2, 3]"),
    ({"inspect": {"modules": ["lm_head"]}}, "no done_callback"),
    ({"inspect": {"module": ["lm_head"]}, "done_callback": print}, "did you mean 'modules'?"),
    ({"inspect": {"modules": ["lm_head"], "positions": "last"}, "done_callback": print}, "'positions'"),
    ({"inspect": {"modules": ["nope.x"]}, "done_callback": print}, "the model has no module 'nope.x'"),
    ({"inspect": {"modules": ["lm_head"]}, "done_callback": print, "generate": print}, "Only continuous batching"),
]


@pytest.mark.parametrize(("offered", "said"), OFFERED, ids=[said for _, said in OFFERED])
def test_what_a_loader_offers_for_the_inside_is_judged_when_it_loads(offered: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadFailed) as failed:
        LoadedModel(ModelEntry(id="m", loader="given"), as_model_info(model(**offered), "given"))
    assert "The loader of model 'm' returned" in str(failed.value)
    assert said in str(failed.value)


def test_an_intervention_hook_that_hangs_does_not_let_others_wait() -> None:
    leave = threading.Event()

    def stuck(states: torch.Tensor, **_: Any) -> None:
        leave.wait(30)

    app = model_app(model(hooks={"stuck": stuck}), hook_timeout_s=0.5)
    with TestClient(app) as client, ThreadPoolExecutor(1) as aside:
        change = {"module": "model.layers.0", "op": "hook", "name": "stuck"}
        body = {"model": "m", "prompt": "a text", "max_tokens": 2}
        try:
            hung = client.post("/v1/completions", json={**body, "interventions": [change]})
            other = client.post("/v1/completions", json=body)
            health = client.get("/health")
        finally:
            leave.set()
        for answer in (hung, other):
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_error")
            said = answer.json()["error"]["message"]
            assert "Hook 'stuck' of the loader has not returned for 0.5 s (at " in said
        assert "stuck" in health.text
        answers = [aside.submit(client.post, "/v1/completions", json=body).result().status_code for _ in range(20)]
        assert answers[-1] == 200
