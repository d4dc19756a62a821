from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from fastapi.testclient import TestClient

from deployments.cli.endpoint.processes import free_port
from deployments.config.engine import EngineOptions
from deployments.core.calls import Grammar, SamplingParams
from deployments.core.errors import (
    BadRequest,
    ContextOverflow,
    ModelError,
    ModelLoadFailed,
    Overloaded,
    Unavailable,
    UnsupportedParameter,
)
from deployments.core.events import EngineEvent, Failed
from deployments.engine.base.admission import request_field
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.local import model_app
from model_loaders.backends.triton import load_model
from model_loaders.contract import as_model_info
from model_loaders.prompts.hooks import Hooks
from tests.model_loaders.backends.emitted import Emitted, deltas
from tests.model_loaders.backends.tritonserver import TritonServer, make_repository
from tests.tiny import byte_tokenizer, llama

pytestmark = pytest.mark.flaky(reruns=1, only_rerun=["cannot be reached"])  # see _server_is_up

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["Hello", "naïve 🦊", "one two three"]
IDS = ("tensorrt_llm", "older", "accumulating")
TEXTS = ("ensemble", "ensemble_whole")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Llama that the server has; its tokenizer is ours, too."""
    found = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(found)
    byte_tokenizer().save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def repository(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_repository(tmp_path_factory.mktemp("repository"), folder)


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[TritonServer]:
    running = TritonServer(repository, free_port(), *IDS, *TEXTS, "slow", "other")
    running.start()
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def _server_is_up(request: pytest.FixtureRequest) -> None:
    """Triton's binary has crashed under load; one crash is one test's, and that one is tried again."""
    if "server" in request.fixturenames:
        request.getfixturevalue("server").start_again_if_it_died()


class Running(Emitted):
    """An engine over one model of the server, and what it has emitted, by request id."""

    def __init__(self, server: TritonServer, folder: Path, model: str, rows: int = 16, **kwargs: Any) -> None:
        super().__init__()
        info = load_model(server.url, triton_model=model, tokenizer_name=str(folder), **kwargs)
        self.info = as_model_info(info, "loader")
        self.hooks = Hooks(info)
        assert info.engine is not None
        self.engine: Engine = info.engine(info, EngineOptions(max_batch_size=rows))
        self.record = server.repository / f"{model}.jsonl"

    def submit(self, prompt: str, params: SamplingParams, request_id: str = "r", **inputs: torch.Tensor) -> None:
        ids = self.hooks.encode(prompt).input_ids
        request = EngineRequest(
            request_id=request_id, input_ids=ids, sampling=params, prompt_text=prompt, model_inputs=inputs
        )
        self.engine.submit(request, self.emit(request_id))

    def run(self, prompt: str, params: SamplingParams, **inputs: torch.Tensor) -> list[EngineEvent]:
        self.submit(prompt, params, **inputs)
        return self.take()

    def ids(self, prompt: str, params: SamplingParams = GREEDY) -> list[int]:
        return [i for delta in deltas(self.run(prompt, params)) for i in delta.token_ids]

    def text(self, prompt: str, params: SamplingParams = GREEDY) -> str:
        return "".join(delta.text for delta in deltas(self.run(prompt, params)))

    def recorded(self) -> dict[str, Any]:
        """The tensors of the last request, as the model has seen them."""
        found: dict[str, Any] = json.loads(self.record.read_text().splitlines()[-1])
        return found


def error_of(events: list[EngineEvent]) -> Exception:
    assert isinstance(events[-1], Failed), events
    return events[-1].error


TOKENIZER = byte_tokenizer()
MODEL = llama()


@cache
def reference(prompt: str, **kwargs: Any) -> list[int]:
    """What transformers generates with the same model, greedy unless told otherwise."""
    ids = TOKENIZER(prompt)["input_ids"]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 258, **kwargs}
    output: list[int] = MODEL.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
    return output


@pytest.fixture(scope="module")
def engines(server: TritonServer, folder: Path) -> Iterator[dict[str, Running]]:
    found = {name: Running(server, folder, name) for name in (*IDS[:2], *TEXTS, "slow")}
    found["accumulating"] = Running(server, folder, "accumulating", accumulated=True)
    yield found
    for running in found.values():
        running.engine.close()


@pytest.mark.parametrize("model", [*IDS, *TEXTS])
def test_greedy_text_is_that_of_transformers(engines: dict[str, Running], model: str) -> None:
    """Ids or text, in a stream or whole, the prompt repeated or not."""
    for prompt in PROMPTS:
        expected = reference(prompt)
        text = TOKENIZER.decode(expected, skip_special_tokens=True)
        events = deltas(engines[model].run(prompt, GREEDY))
        if model == "ensemble":
            # This server decodes each token by itself.
            text = "".join(TOKENIZER.decode([i], skip_special_tokens=True) for i in expected)
        assert "".join(delta.text for delta in events) == text
        if model in IDS:
            assert [i for delta in events for i in delta.token_ids] == expected
            assert events[-1].finish_reason == "length"


@pytest.mark.parametrize("model", [*IDS, *TEXTS])
def test_requests_at_once_do_not_mix(engines: dict[str, Running], model: str) -> None:
    running = engines[model]
    alone = [running.text(prompt) for prompt in PROMPTS]
    for i in range(9):
        running.submit(PROMPTS[i % 3], GREEDY, f"r{i}")
    texts = ["".join(delta.text for delta in deltas(running.take(f"r{i}"))) for i in range(9)]
    assert texts == alone * 3


def test_tokens_are_streamed_as_they_come(engines: dict[str, Running]) -> None:
    started = time.monotonic()
    slow = replace(GREEDY, max_tokens=20, logprobs=0)
    engines["slow"].submit("Hello", slow)
    engines["slow"].answers["r"].next()
    first = time.monotonic() - started
    rest = deltas(engines["slow"].take())
    assert first < (time.monotonic() - started) / 2
    assert [len(delta.token_ids) for delta in rest] == [1] * 19


@pytest.mark.parametrize("model", IDS)
def test_sampling_parameters_arrive(engines: dict[str, Running], model: str) -> None:
    running = engines[model]
    penalised = replace(GREEDY, repetition_penalty=1.7)
    assert running.ids("aaa", penalised) == reference("aaa", repetition_penalty=1.7) != reference("aaa")
    sampled = replace(GREEDY, temperature=0.8, top_k=20, top_p=0.9, max_tokens=8)
    first = running.ids("dice", replace(sampled, seed=7))
    assert running.ids("dice", replace(sampled, seed=7)) == first
    seeds = [running.ids("dice", replace(sampled, seed=seed, temperature=5.0, top_k=0, top_p=1.0)) for seed in (1, 2)]
    assert seeds[0] != seeds[1]
    everything = replace(sampled, seed=-1, presence_penalty=0.5, frequency_penalty=-0.25, extra={"length_penalty": 2})
    running.text("dice", everything)
    names = {"older": "random_seed"}
    seen = running.recorded()
    assert {key: pytest.approx(seen[key][0]) for key in seen if key != "prompt"} == {
        "input_lengths": 4,
        "request_output_len": 8,
        "end_id": -1,
        "pad_id": 258,
        "temperature": 0.8,
        "runtime_top_k": 20,
        "runtime_top_p": 0.9,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "beam_width": 1,
        names.get(model, "seed"): 2**64 - 1,
        "streaming": model != "older",
        **({} if model == "older" else {"exclude_input_in_output": True}),
        "len_penalty": 2,
    }


def test_text_models_get_the_same_by_their_names(engines: dict[str, Running]) -> None:
    params = SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        max_tokens=5,
        seed=4,
        stop=("zz",),
        bad_words=("x",),
        repetition_penalty=1.5,
    )
    engines["ensemble"].text("Hi", params)
    seen = engines["ensemble"].recorded()
    assert seen["text_input"] == ["Hi"]
    assert seen["stop_words"] == ["zz"]
    assert seen["bad_words"] == ["x"]
    assert (seen["top_k"], seen["max_tokens"], seen["seed"], seen["stream"]) == ([3], [5], [4], [True])
    assert seen["end_id"] == [257]


@pytest.mark.parametrize("model", [*IDS, *TEXTS])
def test_stop_strings_end_the_text(engines: dict[str, Running], model: str) -> None:
    whole = engines[model].text("Hello")
    stop = whole[3:5]
    events = deltas(engines[model].run("Hello", replace(GREEDY, stop=(stop,))))
    assert "".join(delta.text for delta in events) == whole[: whole.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)
    kept = replace(GREEDY, stop=(stop,), include_stop_str_in_output=True)
    assert engines[model].text("Hello", kept) == whole[: whole.index(stop) + len(stop)]


def test_the_server_stops_where_it_can(engines: dict[str, Running]) -> None:
    """What the model ends by itself need not be cut off."""
    running = engines["tensorrt_llm"]
    expected = reference("Hello")
    end = expected[4]
    events = deltas(running.run("Hello", replace(GREEDY, stop_token_ids=(end,), stop=("never", "é"), ignore_eos=False)))
    assert [i for delta in events for i in delta.token_ids] == expected[: expected.index(end) + 1]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", end)
    never, accent = (TOKENIZER(text)["input_ids"] for text in ("never", "é"))
    ids = [end, 260, *never, *accent] if end < 260 else [260, end, *never, *accent]
    assert running.recorded()["stop_words_list"] == [ids, [1, 2, 7, 9, *[-1] * 5]]
    assert running.recorded()["end_id"] == [257]


def test_min_tokens_keeps_the_end_away(engines: dict[str, Running]) -> None:
    running = engines["tensorrt_llm"]
    end = reference("Hello")[2]
    ending = replace(GREEDY, stop_token_ids=(end,), min_tokens=6)
    assert running.ids("Hello", ending)[:5] == reference("Hello")[:5]
    assert "stop_words_list" not in running.recorded()
    assert running.recorded()["min_tokens"] == [6]


def test_bad_words_are_listed_in_their_forms(engines: dict[str, Running]) -> None:
    running = engines["tensorrt_llm"]
    first = reference("Hello")[0]
    word = TOKENIZER.decode([first])
    assert first not in running.ids("Hello", replace(GREEDY, bad_words=(word,)))
    space = TOKENIZER(" ")["input_ids"]
    ids, ends = running.recorded()["bad_words_list"]
    assert sorted((ids[:1], ids[1:])) == sorted(([first], [*space, first])) or ids == [first, *space, first]
    assert ends in ([1, 3, -1], [2, 3, -1])


@pytest.mark.parametrize("model", IDS)
def test_logprobs_are_those_of_the_tokens(engines: dict[str, Running], model: str) -> None:
    tokens = TOKENIZER("Hello")["input_ids"]
    entries = [e for d in deltas(engines[model].run("Hello", replace(GREEDY, logprobs=0))) for e in d.logprobs or ()]
    generated = [entry.token_id for entry in entries]
    assert generated == reference("Hello")
    expected = MODEL(torch.tensor([tokens + generated])).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-3)


def test_images_become_the_tensor_of_the_model(engines: dict[str, Running]) -> None:
    pixels = torch.tensor([[[0.5, 1.0], [0.0, 2.0], [3.0, 4.0]]])
    other = torch.zeros(1, 5, dtype=torch.long)
    deltas(engines["tensorrt_llm"].run("Hello", GREEDY, pixel_values=pixels, token_type_ids=other))
    assert engines["tensorrt_llm"].recorded()["image_input"] == pixels[0].tolist()
    error = error_of(engines["older"].run("Hello", GREEDY, pixel_values=pixels))
    assert isinstance(error, UnsupportedParameter)
    assert error.code == "images_unsupported"


def test_a_cancelled_request_ends_on_the_server(engines: dict[str, Running]) -> None:
    running = engines["slow"]
    running.submit("Bye", replace(GREEDY, max_tokens=150), "gone")
    running.submit("Hello", GREEDY, "stays")
    running.answers["gone"].next()
    assert running.engine.stats().sequences == 2
    running.engine.cancel("gone")
    seen = running.answers["gone"].events.qsize()
    assert [i for delta in deltas(running.take("stays")) for i in delta.token_ids] == reference("Hello")
    assert running.answers["gone"].events.qsize() == seen
    expected = {"cancelled": TOKENIZER("Bye")["input_ids"]}
    end = time.monotonic() + 10
    while not (last := running.recorded()).get("cancelled"):
        assert time.monotonic() < end, last
        time.sleep(0.05)
    assert last["cancelled"] == expected["cancelled"]
    assert last["after"] < 100
    while running.engine.stats().sequences:
        assert time.monotonic() < end
        time.sleep(0.05)
    running.engine.cancel("never heard of")


def test_no_more_are_sent_at_once_than_allowed(server: TritonServer, folder: Path) -> None:
    running = Running(server, folder, "slow", rows=2)
    for i in range(4):
        running.submit("Hello", replace(GREEDY, max_tokens=4), f"q{i}")
    running.answers["q0"].next()
    assert (running.engine.stats().sequences, running.engine.stats().waiting) == (2, 2)
    for i in range(4):
        deltas(running.take(f"q{i}"))
    stats = running.engine.stats()
    assert (stats.prompt_tokens, stats.kind) == (20, "triton")
    running.engine.close()
    assert stats.generated_tokens >= 12


@pytest.mark.parametrize(
    ("model", "changed"),
    [
        ("older", {"min_tokens": 3}),
        ("older", {"bad_words": ("x",)}),
        ("tensorrt_llm", {"min_p": 0.1}),
        ("tensorrt_llm", {"typical_p": 0.1}),
        ("tensorrt_llm", {"logit_bias": {1: 1.0}}),
        ("tensorrt_llm", {"allowed_token_ids": (1,)}),
        ("tensorrt_llm", {"logprobs": 2}),
        ("tensorrt_llm", {"prompt_logprobs": 0}),
        ("tensorrt_llm", {"processed_logprobs": True}),
        ("tensorrt_llm", {"grammar": Grammar(kind="regex", source="a")}),
        ("ensemble", {"logprobs": 0}),
        ("ensemble", {"stop_token_ids": (3,)}),
    ],
    ids=str,
)
def test_what_the_model_does_not_take_is_refused(
    engines: dict[str, Running], model: str, changed: dict[str, Any]
) -> None:
    params = replace(GREEDY, **changed)
    with pytest.raises(UnsupportedParameter) as refused:
        engines[model].submit("Hello", params)
    assert refused.value.param == request_field(next(iter(changed)), params)


def test_faults_of_a_request_are_explained(engines: dict[str, Running], server: TritonServer, folder: Path) -> None:
    running = engines["tensorrt_llm"]
    for model in ("tensorrt_llm", "older"):
        error = error_of(engines[model].run("x" * 220, GREEDY))
        assert isinstance(error, ContextOverflow)
        assert "maximum context length is 200 tokens" in str(error)
    with pytest.raises(ContextOverflow):
        running.submit("x" * 600, GREEDY)
    request = EngineRequest(request_id="r", input_ids=[1, 2, 3], sampling=GREEDY)
    running.engine.submit(request, running.emit("r"))
    assert isinstance(error_of(running.take()), Overloaded)
    for extra, message in (({"nope": 1}, "has no 'nope'; it has length_penalty"), ({"length_penalty": "x"}, "number")):
        error = error_of(running.run("Hello", replace(GREEDY, extra=extra)))
        assert isinstance(error, BadRequest)
        assert message in str(error)
    engines["ensemble"].engine.submit(request, running.emit("r"))
    assert "takes texts" in str(error_of(running.take()))
    with pytest.raises(ModelError, match="takes neither input_ids nor text_input but x"):
        Running(server, folder, "other")
    with pytest.raises(ModelError, match="unknown model"):
        Running(server, folder, "missing")


def test_a_server_that_sends_nothing_is_given_up(server: TritonServer, folder: Path) -> None:
    running = Running(server, folder, "slow", response_timeout_s=0.02)
    error = error_of(running.run("Hello", GREEDY))
    assert isinstance(error, Unavailable)
    assert "has sent nothing for 0.02 s" in str(error)
    running.engine.close()


def test_closing_fails_what_is_left(server: TritonServer, folder: Path) -> None:
    running = Running(server, folder, "slow")
    running.submit("Hello", replace(GREEDY, max_tokens=400))
    running.answers["r"].next()
    running.engine.close(timeout=0.05)
    assert isinstance(error_of(running.take()), Unavailable)
    with pytest.raises(Unavailable):
        running.submit("Hello", GREEDY)


def test_parameters_left_alone_come_from_the_generation_config(
    server: TritonServer, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    given = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05, "eos_token_id": [260, 257, 5]}
    (tmp_path / "generation_config.json").write_text(json.dumps(given))
    running = Running(server, tmp_path, "tensorrt_llm", generation_defaults=True)
    running.text("Hello", SamplingParams(max_tokens=3, top_k=5))
    seen = running.recorded()
    names = ("temperature", "runtime_top_k", "runtime_top_p", "repetition_penalty")
    assert [seen[name][0] for name in names] == pytest.approx([0.7, 5, 0.8, 1.05])
    assert seen["stop_words_list"] == [[5, 260], [1, 2]]
    running.text("Hello", GREEDY)
    assert running.recorded()["runtime_top_k"] == [1]
    running.engine.close()
    plain = Running(server, tmp_path, "tensorrt_llm")
    plain.text("Hello", SamplingParams(max_tokens=3))
    assert "repetition_penalty" not in plain.recorded()
    assert plain.recorded()["temperature"] == [1.0]
    (tmp_path / "generation_config.json").write_text('{"do_sample": false}')
    plain.engine.close()
    greedy = Running(server, tmp_path, "tensorrt_llm", generation_defaults=True)
    assert greedy.ids("Hello", SamplingParams(max_tokens=12, ignore_eos=True)) == reference("Hello")
    greedy.engine.close()


def test_the_environment_names_server_and_tokenizer(
    server: TritonServer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelLoadFailed, match="TOKENIZER_PATH"):
        load_model(server.url)
    host, port = server.url.split(":")
    monkeypatch.setenv("TOKENIZER_PATH", str(folder))
    monkeypatch.setenv("TRITON_SERVER_HOST", host)
    monkeypatch.setenv("TRITON_SERVER_PORT", port)
    info = load_model()
    assert (info.max_model_len, info.model_name) == (512, "tensorrt_llm")
    assert info.engine is not None
    engine = info.engine(info, EngineOptions())
    assert "min_tokens" in engine.supports
    assert "min_p" not in engine.supports
    engine.close()


def test_the_whole_api_over_it_and_its_recovery(repository: Path, folder: Path) -> None:
    """The server is down, comes up, goes down while it answers, and comes back: no restart on our side."""
    server = TritonServer(repository, free_port(), "slow")
    kwargs = {"server_url": server.url, "triton_model": "slow", "tokenizer_name": str(folder)}
    app = model_app("model_loaders.backends.triton:load_model", id="remote", kwargs=kwargs)
    with TestClient(app) as web:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web, max_retries=0)
        chat: Any = {
            "model": "remote",
            "messages": [{"role": "user", "content": "Hello"}],
            "temperature": 0,
            "max_tokens": 8,
        }

        def refused() -> openai.APIStatusError:
            with pytest.raises(openai.APIStatusError) as error:
                client.chat.completions.create(**chat)
            return error.value

        assert refused().status_code == 503
        assert "cannot be reached or is not ready" in str(refused())
        try:
            server.start()
            answered(client, chat)
            with pytest.raises(openai.BadRequestError, match="min_p"):
                client.chat.completions.create(**chat, extra_body={"min_p": 0.1})
            whole = client.chat.completions.create(**chat).choices[0].message.content
            pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**chat, stream=True)]
            assert "".join(pieces) == whole
            stream = client.chat.completions.create(**{**chat, "max_tokens": 200}, stream=True)
            next(stream)
            server.stop()
            with pytest.raises(openai.APIError, match="Triton server"):
                list(stream)
            assert refused().status_code == 503
            server.start()
            assert answered(client, chat) == whole
        finally:
            server.stop()


def answered(client: openai.OpenAI, chat: dict[str, Any]) -> str:
    """The answer, once the server is found again."""
    end = time.monotonic() + 10
    while True:
        try:
            return client.chat.completions.create(**chat).choices[0].message.content or ""
        except openai.InternalServerError:
            assert time.monotonic() < end
            time.sleep(0.1)
