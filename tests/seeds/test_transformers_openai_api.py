"""What the transformers-openai-api servers (mesolitica, malaysia-ai, CalunVier) did, and what they got wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import yaml
from openai import OpenAI
from tokenizers import processors
from transformers import GenerationConfig

from deployments.cli.endpoint.processes import free_port
from deployments.local import make_app, model_app
from model_loaders.resolve import load_model_info
from tests.seeds.serving import client, listening
from tests.tiny import byte_tokenizer, llama
from tests.tiny import t5 as tiny_t5

ROOT = Path(__file__).parents[2]
HEADER = "<|im_start|>assistant\n"


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    """The demo model as --hf-model would serve it: its id, and the alias "model"."""
    entry = {"id": "demo", "aliases": ["model"], "loader": "model_loaders.demo:load_model"}
    with listening(make_app({"models": [entry]})) as address:
        yield address


@pytest.fixture(scope="module")
def api(demo: str) -> Iterator[OpenAI]:
    with client(demo) as opened:
        yield opened


def ask(api: OpenAI, text: str, **request: Any) -> Any:
    request = {"model": "model", "temperature": 0, "max_tokens": 24, **request}
    return api.chat.completions.create(messages=user(text), **request)


def reply(api: OpenAI, text: str, **request: Any) -> str:
    return ask(api, text, **request).choices[0].message.content or ""


# Their clients


def test_the_request_of_their_readme(demo: str) -> None:
    """Un-prefixed, with its sampling fields; `truncate`, which it never used, truncates the prompt as in TGI."""
    body = {
        "model": "model",
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 50,
        "max_tokens": 16,
        "truncate": 2048,
        "repetition_penalty": 1,
        "stop": [],
        "messages": user("hello, what is good about malaysia"),
        "stream": True,
    }
    with requests.post(f"{demo}/chat/completions", json=body, stream=True, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "x-troupe-ignored" not in answer.headers
        lines = [line.decode() for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert lines[-1] == "data: [DONE]"
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_base_url_without_v1(demo: str) -> None:
    with OpenAI(base_url=demo, api_key="-", timeout=60) as api:
        done = api.chat.completions.create(
            model="model", messages=user("Repeat exactly: k7Qp2x"), temperature=0, stop=["[/INST]", "[INST]", "<s>"]
        )
    assert done.choices[0].message.content == "k7Qp2x"
    assert done.usage is not None
    assert done.usage.completion_tokens > 0


@pytest.mark.parametrize("path", ["/health", "/", "/v1/models"])
def test_the_routes_that_monitors_ask(demo: str, path: str) -> None:
    assert requests.get(f"{demo}{path}", timeout=60).status_code == 200


def test_an_error_is_one_and_no_empty_200(demo: str) -> None:
    """400 and 404 became 500, or a 200 with an empty answer."""
    for body, status in (({"model": "other"}, 404), ({"temperature": -1}, 400), ({"stop": [1]}, 400)):
        answer = requests.post(f"{demo}/chat/completions", json={"messages": user("hi"), **body}, timeout=60)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


# Bugs of the seed, in the order of its inventory


def test_1_answers_do_not_depend_on_batch_mates(api: OpenAI) -> None:
    """A mask off by one let the shorter rows of a batch see one padded key."""
    texts = [f"Repeat exactly: {'ab3dE5'[: 1 + i % 6] * (1 + i % 3)}" for i in range(8)]
    alone = [reply(api, text) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        together = list(pool.map(lambda text: reply(api, text), texts))
    assert together == alone


def test_2_who_leaves_takes_nobody_along(api: OpenAI) -> None:
    """A cancelled future failed every other request of its batch."""
    text = "Count from 1 to 30"
    expected = reply(api, text, max_tokens=60)

    def leave(_: int) -> None:
        with ask(api, "Count from 1 to 99", max_tokens=200, stream=True) as stream:
            next(iter(stream))

    with ThreadPoolExecutor(6) as pool:
        staying = [pool.submit(reply, api, text, max_tokens=60) for _ in range(3)]
        list(pool.map(leave, range(3)))
        assert [future.result() for future in staying] == [expected] * 3


def test_3_the_assistants_turn_is_opened(api: OpenAI) -> None:
    done = ask(api, "Repeat exactly: k7Qp2x", extra_body={"return_prompt_text": True})
    assert done.prompt_text.endswith(HEADER)
    assert done.choices[0].message.content == "k7Qp2x"


def test_4_stop_strings_of_many_tokens(api: OpenAI) -> None:
    """Stop strings were looked up as single tokens; unknown ones made the unknown token a terminator."""
    assert reply(api, "Repeat exactly: k7Qp2x", stop="Qp2") == "k7"
    assert reply(api, "Repeat exactly: k7Qp2x", stop=["nowhere", "p2x"]) == "k7Q"


def test_5_repetition_penalty_is_transformers(api: OpenAI, demo_alone: Any) -> None:
    """Negative logits were divided, so that the penalty made tokens likelier."""
    ids = demo_alone.tokenizer.apply_chat_template(
        user("Count from 1 to 9"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = demo_alone.model.generate(**ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.8)
    expected = demo_alone.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert reply(api, "Count from 1 to 9", max_tokens=12, extra_body={"repetition_penalty": 1.8}) == expected


@pytest.fixture(scope="module")
def demo_alone() -> Any:
    info = load_model_info("model_loaders.demo:load_model", {}, "cpu")
    info.model.eval()
    return info


def test_6_characters_arrive_whole() -> None:
    """Each token was decoded alone: characters of several tokens came as replacement characters."""
    text = "né😀日本"
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def generate(input_ids: Any, max_new_tokens: int, streamer: Any) -> Any:
        for token in ids[0]:
            streamer.put(token[None])
            time.sleep(0.002)
        streamer.end()
        return torch.cat([input_ids, ids], dim=1)

    source = {"model_name": "m", "model": llama(), "tokenizer": tokenizer, "generate": generate}
    with listening(model_app(source)) as address, client(address) as api:
        chunks = ask(api, "x", model="m", max_tokens=64, stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_7_every_terminator_of_the_generation_config() -> None:
    """Only tokenizer.eos_token_id ended a text."""
    model, tokenizer = llama(), byte_tokenizer()
    prompt = tokenizer.apply_chat_template(user("x"), add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    third = int(model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, length + 2])
    model.generation_config = GenerationConfig(eos_token_id=[257, third], pad_token_id=258)
    source = {"model_name": "m", "model": model, "tokenizer": tokenizer}
    with listening(model_app(source)) as address, client(address) as api:
        done = ask(api, "x", model="m", max_tokens=8)
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens <= 3


def test_8_temperature_is_used_and_zero_stays_zero(api: OpenAI) -> None:
    """The seed never passed it on; CalunVier's `or` made 0 into 1.0."""
    hot = {reply(api, "Hello", temperature=5.0, seed=seed) for seed in range(4)}
    assert len(hot) > 1
    assert len({reply(api, "Hello", temperature=0, seed=seed) for seed in range(4)}) == 1


def test_9_without_a_template_every_message_counts(tmp_path: Path) -> None:
    """Only the first message was used."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    source = {"model_name": "m", "model": llama(), "tokenizer": tokenizer}
    messages: list[Any] = [{"role": "system", "content": "Be kind."}, *user("Hi")]
    with listening(model_app({**source, "plain_chat": True})) as address, client(address) as api:
        done: Any = api.chat.completions.create(
            model="m", messages=messages, max_tokens=1, extra_body={"return_prompt_text": True}
        )
        assert done.prompt_text == "System: Be kind.\nUser: Hi\nAssistant:"
    with listening(model_app(source)) as address:
        refused = requests.post(f"{address}/chat/completions", json={"messages": messages}, timeout=60)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "chat_template_error"


def test_10_a_prompt_that_is_too_long_is_a_400(demo: str) -> None:
    answer = requests.post(f"{demo}/chat/completions", json={"messages": user("x" * 9000)}, timeout=60)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose tokenizer ends every text with its end-of-sequence token, as T5's does."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", 257)]
    )
    tokenizer.save_pretrained(folder)
    tiny_t5(bos_token_id=None, initializer_factor=8.0).save_pretrained(folder)
    return folder


def test_11_an_encoder_decoder_chats_like_its_generate(t5: Path) -> None:
    """A static cache returned self-attention keys for the encoder's; `</s>` had to be typed by the user."""
    from deployments.compat.flags import read_flags, serve_config

    environment = {"HF_MODEL": str(t5), "ARCHITECTURE_TYPE": "encoder-decoder", "ACCELERATOR_TYPE": "cpu"}
    config = serve_config(*read_flags([], environment))
    info = load_model_info("model_loaders.auto:load_model", {"model_name": str(t5), "dtype": "float32"}, "cpu")
    texts = ["translate: hello", "sum up: a long and winding road", "x"]
    app = make_app(config["applications"][0]["args"], device="cpu")
    request: Any = {"max_tokens": 6, "extra_body": {"return_token_ids": True}}
    with listening(app) as address, client(address) as api, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda text: ask(api, text, **request), texts))
    for text, done in zip(texts, answers, strict=True):
        ids = info.tokenizer(text, return_tensors="pt")
        assert done.prompt_token_ids == ids["input_ids"][0].tolist()
        assert done.prompt_token_ids[-1] == 257
        output = info.model.generate(**ids, max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        assert done.choices[0].token_ids == output


def test_13_a_failure_leaks_no_place_in_the_queue() -> None:
    """The place of a request that raised was never given back."""
    tokenizer = byte_tokenizer()

    def encode(prompt: str, **kwargs: Any) -> Any:
        if "fail" in prompt:
            raise ValueError("mine")
        return tokenizer(prompt, **kwargs)

    source = {"model_name": "m", "model": llama(), "tokenizer": tokenizer, "encode": encode}
    with listening(model_app(source, engine={"max_batch_size": 1})) as address:
        bodies = [{"messages": user(text), "max_tokens": 2} for text in ["hi", "fail"] * 3]
        answers = [requests.post(f"{address}/chat/completions", json=body, timeout=60) for body in bodies]
    assert [answer.status_code for answer in answers] == [200, 500] * 3


def test_concurrency_is_limited_and_the_rest_waits() -> None:
    """CalunVier answered 429 at once, and lost places on the way."""
    source = {"model_name": "m", "model": llama(), "tokenizer": byte_tokenizer()}
    app = model_app(source, engine={"max_batch_size": 2})
    with listening(app) as address, client(address) as api, ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: ask(api, f"n{i}", model="m", max_tokens=5), range(8)))
    assert [each.usage.completion_tokens for each in done] == [5] * 8


def test_a_disconnect_stops_the_computation_also_without_a_stream() -> None:
    steps = []
    left = threading.Event()

    def generate(input_ids: Any, max_new_tokens: int, streamer: Any) -> Any:
        for _ in range(max_new_tokens):
            streamer.put(torch.tensor([65]))
            steps.append(time.monotonic())
            time.sleep(0.01)
        return input_ids

    source = {"model_name": "m", "model": llama(), "tokenizer": byte_tokenizer(), "generate": generate}
    with listening(model_app(source)) as address:
        for stream in (False, True):
            steps.clear()
            body = {"messages": user("hi"), "max_tokens": 400, "stream": stream}
            with contextlib.suppress(requests.RequestException):
                requests.post(f"{address}/chat/completions", json=body, stream=True, timeout=(5, 0.3)).close()
            left.wait(0.3)
            count = len(steps)
            left.wait(0.5)
            assert 0 < len(steps) < 400
            assert len(steps) <= count + 1


# Quantizations through transformers' own configs


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("config", "layer"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "Linear8bitLt"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "Linear4bit"),
    ],
    ids=["int8", "nf4"],
)
def test_bitsandbytes(tmp_path: Path, config: dict[str, Any], layer: str) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    kwargs = {"model_name": str(tmp_path), "quantization_config": config}
    app = model_app("model_loaders.auto:load_model", kwargs=kwargs, device="cpu", id="m")
    with listening(app) as address, client(address) as api:
        assert ask(api, "hi", model="m", max_tokens=3).usage.completion_tokens == 3
    info = load_model_info("model_loaders.auto:load_model", kwargs, "cpu")
    assert type(info.model.model.layers[0].mlp.gate_proj).__name__ == layer


# The launcher


def scripts_serve(port: int) -> list[str]:
    flags = ["--hf-model", "./model", "--port", str(port), "--accelerator-type", "cpu", "--max-concurrent", "4"]
    return [str(ROOT / "scripts" / "serve"), *flags]


def test_scripts_serve_configures_one_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    command = [*scripts_serve(7088), "--print-config"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    config = yaml.safe_load(printed)
    assert config["http_options"]["port"] == 7088
    (entry,) = config["applications"][0]["args"]["models"]
    assert (entry["id"], entry["aliases"], entry["engine"]) == ("./model", ["model"], {"max_batch_size": 4})


@pytest.mark.long
def test_scripts_serve_serves_one_model(tmp_path: Path) -> None:
    """A local folder, relative to where it is typed. With environment variables: tests/test_dockerfile.py."""
    llama(max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    port = free_port()
    command = scripts_serve(port)
    log = tmp_path / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        body = {"model": "model", "messages": user("hi"), "max_tokens": 3}
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(requests.ConnectionError):
                answer = requests.post(f"http://127.0.0.1:{port}/chat/completions", json=body, timeout=60)
                if answer.status_code == 200 and "  models:    ./model (also model)\n" in log.read_text():
                    break
            time.sleep(0.3)
        assert answer.json()["usage"]["completion_tokens"] == 3
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
