"""What troapis did, and what it got wrong: its model_info contract, its entry file, its hooks, its saved requests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import uvicorn

from deployments.core.errors import ModelLoadFailed
from deployments.local import model_app
from model_loaders.contract import ModelInfo, as_model_info
from tests.seeds.serving import client, listening
from tests.tiny import byte_tokenizer, llama

ROOT = Path(__file__).parents[2]
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
ENTRY_FILE = """
import os
from tests.tiny import byte_tokenizer, llama

model = llama(max_position_embeddings=128).to(os.environ.get("DEVICE", "cpu"))
model_info = {"model_name": "org/tiny", "model": model, "tokenizer": byte_tokenizer()}

if __name__ == "__main__":
    from deployments.local import run_app

    run_app(model_info_from=model_info, port=int(os.environ["PORT"]))
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ENTRYPOINT", "DEVICE", "SAVE", "REQUEST_SAVE_DIR"):
        monkeypatch.delenv(name, raising=False)


def tiny(**fields: Any) -> dict[str, Any]:
    return {"model_name": "org/tiny", "model": llama(), "tokenizer": byte_tokenizer(), **fields}


class Processor:
    """A processor in troapis' sense: callable, with a tokenizer, which has a chat template."""

    def __init__(self) -> None:
        self.tokenizer = byte_tokenizer()

    def __call__(self, text: str, **kwargs: Any) -> Any:
        return self.tokenizer(text, **kwargs)


def chat(source: Any, messages: list[Any] = HELLO, **request: Any) -> Any:
    """One answer of a model served alone, under its own name."""
    request = {"model": "org/tiny", "max_tokens": 4, "temperature": 0, **request}
    with listening(model_app(source)) as address, client(address) as api:
        return api.chat.completions.create(messages=messages, **request)


# Loading


@pytest.mark.parametrize("source", [tiny, lambda: ModelInfo(**tiny())], ids=["dict", "ModelInfo"])
def test_run_app_takes_a_dict_or_a_model_info(source: Any) -> None:
    assert chat(source()).usage.completion_tokens == 4


def test_a_processor_lends_its_tokenizer() -> None:
    info = as_model_info({"model": llama(), "processor": Processor()}, "test")
    assert info.tokenizer is info.processor.tokenizer


def test_the_tokenizer_is_found_by_model_name(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    info = as_model_info({"model_name": str(tmp_path), "model": llama()}, "test")
    assert info.tokenizer.decode([72, 105]) == byte_tokenizer().decode([72, 105])
    with pytest.raises(ModelLoadFailed, match="neither tokenizer nor processor, and 'no/such' names none"):
        as_model_info({"model_name": "no/such", "model": llama()}, "test")


@pytest.fixture
def entry_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model_entrypoint.py"
    file.write_text(ENTRY_FILE)
    return file


def test_the_entry_file_is_found_without_being_named(entry_file: Path) -> None:
    assert chat(None).model == "org/tiny"
    assert chat("entrypoint", model="model").usage.completion_tokens == 4


def test_the_entry_file_is_named_by_path_or_variable(entry_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = entry_file.rename(entry_file.with_name("other.py"))
    assert chat(str(elsewhere)).usage.completion_tokens == 4
    monkeypatch.setenv("ENTRYPOINT", str(elsewhere))
    assert chat(None).usage.completion_tokens == 4
    assert chat(tiny()).usage.completion_tokens == 4  # a given model wins over the variable


def test_the_entry_file_under_uvicorns_reload(entry_file: Path) -> None:
    """troapis was developed with `fastapi dev`; here `uvicorn --factory deployments.local:model_app --reload`."""
    served = uvicorn.Config("deployments.local:model_app", factory=True)
    served.load()
    app: Any = served.loaded_app
    with listening(app) as address:
        assert requests.get(f"{address}/v1/models/org/tiny", timeout=60).status_code == 200


def test_a_missing_entry_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"model_entrypoint\.py does not exist"):
        model_app()


def wait_for_health(port: int) -> None:
    for _ in range(1200):
        try:
            assert requests.get(f"http://127.0.0.1:{port}/v1/health", timeout=60).json() == {"status": "ok"}
            return
        except requests.ConnectionError:
            time.sleep(0.1)


@pytest.mark.parametrize(("level", "says"), [("DEBUG", True), pytest.param("ERROR", False, marks=pytest.mark.long)])
def test_the_entry_file_as_a_program(entry_file: Path, tmp_path: Path, level: str, says: bool) -> None:
    from deployments.cli.endpoint.processes import free_port

    port = free_port()
    environment = {**os.environ, "PORT": str(port), "PYTHONPATH": str(ROOT), "DEVICE": "cpu", "LOGLEVEL": level}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen([sys.executable, str(entry_file)], env=environment, stderr=log)
    try:
        wait_for_health(port)
        models = requests.get(f"http://127.0.0.1:{port}/v1/models").json()
        assert [model["id"] for model in models["data"]] == ["org/tiny", "model"]
    finally:
        server.terminate()
        assert server.wait(20) is not None
    assert ("INFO" in (tmp_path / "log").read_text()) == says


def test_a_notebooks_cell(tmp_path: Path) -> None:
    """A cell runs inside an event loop, and is interrupted like any other."""
    from deployments.cli.endpoint.processes import free_port

    port = free_port()
    code = f"""
import asyncio, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it
from deployments.local import run_app
from tests.tiny import byte_tokenizer, llama

async def cell():
    try:
        run_app({{"model": llama(), "tokenizer": byte_tokenizer()}}, port={port})
        print("interrupted")
    except KeyboardInterrupt:
        print("not caught")

asyncio.new_event_loop().run_until_complete(cell())
"""
    notebook = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        wait_for_health(port)
        notebook.send_signal(signal.SIGINT)
        assert notebook.communicate(timeout=60)[0].splitlines()[-1] == "interrupted"
    finally:
        notebook.kill()
        notebook.communicate()


# Hooks


class Calls:
    """Hooks that note how they are called and then do what the defaults do."""

    def __init__(self) -> None:
        self.model, self.tokenizer = llama(), byte_tokenizer()
        self.seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        self.seen["apply_chat_template"] = ((messages,), kwargs)
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def encode(self, prompt: Any, **kwargs: Any) -> Any:
        self.seen["encode"] = ((prompt,), kwargs)
        return self.tokenizer(prompt, **kwargs)

    def generate(self, **kwargs: Any) -> Any:
        self.seen["generate"] = ((), kwargs)
        return self.model.generate(**kwargs)

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        self.seen["decode"] = ((token_ids,), kwargs)
        return self.tokenizer.decode(token_ids, **kwargs)

    def info(self, **more: Any) -> dict[str, Any]:
        names = ("apply_chat_template", "encode", "generate", "decode")
        hooks = {name: getattr(self, name) for name in names}
        return {"model_name": "org/tiny", "model": self.model, "tokenizer": self.tokenizer, **hooks, **more}


def test_every_hook_with_its_documented_defaults() -> None:
    calls = Calls()
    done = chat(calls.info(), max_tokens=4, temperature=0.7)
    (messages,), kwargs = calls.seen["apply_chat_template"]
    assert messages == HELLO
    assert kwargs == {"tokenize": False, "add_generation_prompt": True}
    (prompt,), kwargs = calls.seen["encode"]
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert kwargs == {"add_special_tokens": False, "return_tensors": "pt"}
    _, kwargs = calls.seen["generate"]
    assert kwargs["input_ids"].shape == kwargs["attention_mask"].shape == (1, done.usage.prompt_tokens)
    assert (kwargs["max_new_tokens"], kwargs["temperature"], kwargs["do_sample"]) == (4, 0.7, True)
    (token_ids,), kwargs = calls.seen["decode"]
    assert isinstance(token_ids, torch.Tensor)
    assert token_ids.dim() == 1
    assert kwargs == {"skip_special_tokens": True}


def test_every_kwargs_reaches_its_hook() -> None:
    calls = Calls()
    chat(
        calls.info(
            apply_chat_template_kwargs={"add_generation_prompt": False, "flavour": "plain"},
            encode_kwargs={"add_special_tokens": True, "padding": False},
            generate_kwargs={"repetition_penalty": 1.5},
            decode_kwargs={"skip_special_tokens": False},
        )
    )
    assert calls.seen["apply_chat_template"][1]["flavour"] == "plain"
    assert calls.seen["apply_chat_template"][1]["add_generation_prompt"] is False
    assert calls.seen["encode"][1] == {"add_special_tokens": True, "padding": False, "return_tensors": "pt"}
    assert calls.seen["generate"][1]["repetition_penalty"] == 1.5
    assert calls.seen["decode"][1] == {"skip_special_tokens": False}


@pytest.mark.parametrize("named", [False, True])
def test_generate_kwargs_are_for_the_models_own_generate_too(named: bool) -> None:
    source = tiny(generate_kwargs={"do_sample": True, "no_repeat_ngram_size": 1})
    if named:
        source["generate"] = source["model"].generate
    done = chat(source, max_tokens=12, extra_body={"return_token_ids": True})
    ids = torch.tensor([done.prompt_token_ids])
    expected = source["model"].generate(ids, max_new_tokens=12, do_sample=False, no_repeat_ngram_size=1, pad_token_id=0)
    assert done.choices[0].token_ids == expected[0, ids.shape[1] :].tolist()
    assert len(set(done.choices[0].token_ids)) == 12


def test_the_users_template_wins_over_the_processors() -> None:
    """troapis took processor.tokenizer's own whenever there was a processor."""
    source = {
        "model_name": "org/tiny",
        "model": llama(),
        "processor": Processor(),
        "apply_chat_template": lambda messages, **_: f"Q: {messages[0]['content']}\nA:",
    }
    done = chat(source, extra_body={"return_prompt_text": True})
    assert done.prompt_text == "Q: Hello\nA:"


def test_a_borrowed_template_is_a_bound_method() -> None:
    lender = byte_tokenizer()
    lender.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    done = chat(tiny(apply_chat_template=lender.apply_chat_template), extra_body={"return_prompt_text": True})
    assert done.prompt_text == "[Hello]"


def test_a_request_leaves_no_trace_in_the_shared_kwargs() -> None:
    """troapis merged max_tokens and temperature into model_info.generate_kwargs."""
    calls = Calls()
    source = calls.info(generate_kwargs={"do_sample": True})
    chat(source, max_tokens=3, temperature=0.3)
    assert source["generate_kwargs"] == {"do_sample": True}


def test_temperature_zero_is_greedy_and_no_limit_is_the_context() -> None:
    """troapis sent temperature=0 with do_sample=True, which transformers refuses; no max_tokens meant 20 tokens."""
    source = tiny(generate_kwargs={"do_sample": True}, max_model_len=128)
    first = chat(source, max_tokens=None)
    assert first.usage.total_tokens == 128 or first.choices[0].finish_reason == "stop"
    assert first.usage.completion_tokens > 20
    assert chat(source, max_tokens=None).choices[0].message.content == first.choices[0].message.content


@pytest.fixture(scope="module")
def served() -> Iterator[Any]:
    with listening(model_app(tiny())) as address, client(address) as api:
        yield api


def asked(served: Any, **request: Any) -> Any:
    request = {"model": "org/tiny", "messages": HELLO, "max_tokens": 8, "temperature": 0, **request}
    return served.chat.completions.create(**request)


def test_the_fields_that_troapis_ignored(served: Any) -> None:
    text = asked(served).choices[0].message.content
    cut = asked(served, stop=text[2])
    assert cut.choices[0].message.content == text.partition(text[2])[0]
    drawn = [asked(served, temperature=1.0, seed=7).choices[0].message.content for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert asked(served, temperature=1.5, seed=3, top_p=1e-6).choices[0].message.content == text
    chunks = asked(served, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text


def test_the_end_of_a_text_can_be_said(served: Any) -> None:
    """troapis had end_of_text, which would have failed on the first token; here it is stop_token_ids."""
    with pytest.raises(ModelLoadFailed, match=r"unknown key 'end_of_text'; known keys: .*stop_token_ids"):
        as_model_info(tiny(end_of_text=["</s>"]), "test")
    third = asked(served, extra_body={"return_token_ids": True}).choices[0].token_ids[2]
    done = chat(tiny(stop_token_ids=[third]), max_tokens=8)
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens <= 3


def test_completion_tokens_are_those_the_model_made(served: Any) -> None:
    """troapis counted a terminator that nobody could see; it counts here, as everywhere, and token_ids show it."""
    whole = asked(served, extra_body={"return_token_ids": True})
    assert whole.usage.completion_tokens == 8 == len(whole.choices[0].token_ids)
    end = whole.choices[0].token_ids[2]
    ended = asked(served, extra_body={"return_token_ids": True, "stop_token_ids": [end]})
    assert ended.choices[0].token_ids[-1] == end
    assert ended.usage.completion_tokens == len(ended.choices[0].token_ids) <= 3
    assert ended.choices[0].message.content == whole.choices[0].message.content[: ended.usage.completion_tokens - 1]


def test_explicit_nulls_are_absent(served: Any) -> None:
    body = {
        "model": "org/tiny",
        "messages": HELLO,
        "max_tokens": None,
        "seed": None,
        "top_logprobs": None,
        "stop": None,
    }
    url = f"{served.base_url}chat/completions"
    assert requests.post(url, json={**body, "max_tokens": 2}).status_code == 200


def test_usage_and_finish_reason_are_true(served: Any) -> None:
    """troapis counted the prompt once per choice, and said "stop" whatever had happened."""
    one, three = asked(served), asked(served, n=3, temperature=1.0)
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens <= 24
    assert len({choice.index for choice in three.choices}) == 3
    assert one.choices[0].finish_reason == "length"


def test_an_unknown_model_is_a_404_with_the_known_ones(served: Any) -> None:
    answer = requests.post(f"{served.base_url}chat/completions", json={"model": "gpt-5", "messages": HELLO})
    assert answer.status_code == 404
    assert "org/tiny" in answer.json()["error"]["message"]


def test_health_answers_while_the_model_computes() -> None:
    """troapis computed on the event loop: nothing else was answered meanwhile."""
    entered, leave = threading.Event(), threading.Event()
    (letter,) = byte_tokenizer().encode("A")

    def generate(input_ids: Any, max_new_tokens: int) -> Any:
        entered.set()
        leave.wait(20)
        return torch.cat([input_ids, torch.full((1, max_new_tokens), letter)], dim=1)

    with listening(model_app(tiny(generate=generate))) as address:
        request = {"model": "org/tiny", "messages": HELLO, "max_tokens": 3}
        answers: list[Any] = []
        asking = threading.Thread(
            target=lambda: answers.append(requests.post(f"{address}/v1/chat/completions", json=request, timeout=30))
        )
        asking.start()
        assert entered.wait(20)
        assert requests.get(f"{address}/v1/health", timeout=5).status_code == 200
        leave.set()
        asking.join(20)
    assert answers[0].json()["choices"][0]["message"]["content"] == "AAA"


# Inspection and saved requests


def test_done_callback_sees_what_the_model_was_given_and_made() -> None:
    seen: list[dict[str, Any]] = []
    done = chat(
        tiny(done_callback=lambda **everything: seen.append(everything)),
        n=2,
        temperature=1.0,
        extra_body={"return_token_ids": True},
    )
    assert [each["uid"].rpartition("#")[2] for each in seen] == ["0", "1"] or len(seen) == 2
    by_choice = {int(each["uid"].rpartition("#")[2]): each for each in seen}
    for choice in done.choices:
        each = by_choice[choice.index]
        assert each["prompt"].startswith("<|im_start|>user\nHello")
        assert each["input"]["input_ids"].tolist() == [done.prompt_token_ids]
        assert each["output"].tolist() == choice.token_ids
        assert each["response"] == choice.message.content
        assert each["finish_reason"] == choice.finish_reason
        assert each["request"].messages if hasattr(each["request"], "messages") else each["request"].prompts
        assert isinstance(each["model_info"].model, torch.nn.Module)


def test_a_done_callback_that_raises_changes_no_answer() -> None:
    def done_callback(output: Any) -> None:
        raise ValueError("mine")

    assert chat(tiny(done_callback=done_callback)).usage.completion_tokens == 4


def test_saved_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAVE", "true")
    monkeypatch.setenv("REQUEST_SAVE_DIR", str(tmp_path / "requests"))
    for _ in range(2):  # troapis began again at 1.json in every run
        chat(tiny())
    lines = [line for file in (tmp_path / "requests").rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == 2
    assert all("Hello" in json.dumps(json.loads(line)) for line in lines)
