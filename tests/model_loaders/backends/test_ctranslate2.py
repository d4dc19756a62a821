from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ctranslate2
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from tokenizers.processors import TemplateProcessing
from transformers import T5ForConditionalGeneration

from deployments.config.engine import EngineOptions
from deployments.core.calls import Capture, Grammar, Intervention, SamplingParams
from deployments.core.errors import (
    BadRequest,
    ContextOverflow,
    ModelLoadFailed,
    Unavailable,
    UnsupportedParameter,
)
from deployments.core.events import Delta, EngineEvent, Failed, PromptScores
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.local import model_app
from model_loaders.backends.ctranslate2 import load_model
from model_loaders.backends.ctranslate2.folder import instruction_chat
from model_loaders.contract import ModelInfo, as_model_info
from model_loaders.prompts.hooks import Hooks
from tests.model_loaders.backends.emitted import Emitted, deltas
from tests.tiny import byte_tokenizer, llama, t5

SCRIPT = Path(__file__).parents[3] / "scripts" / "convert_ctranslate2"
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ["Hello", "What is the capital of France?", "a" * 70, "naïve 🦊", "one two three four five six seven"]


Said = tuple[str, str]
"""What a program prints, and what it prints on stderr."""


def by_command(arguments: list[str]) -> Said:
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def in_process(arguments: list[str]) -> Said:
    """The script without the time that importing torch and transformers takes."""
    printed, said = io.StringIO(), io.StringIO()
    logger = logging.getLogger("transformers")
    level = logger.level
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(said),
    ):
        patch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            logger.setLevel(level)
    return printed.getvalue(), said.getvalue()


def converted(
    folder: Path, model: Any, tokenizer: Any, *options: str, run: Callable[[list[str]], Said] = in_process
) -> Path:
    """The model's folder, and beside it the converted one, made by the script; returns that."""
    source, target = folder / "hf", folder / "ct2"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    printed, said = run([str(source), str(target), *options])
    assert "done" in said
    assert str(target / "model.bin") in printed
    return target


def t5_tokenizer() -> Any:
    """The byte tokenizer, ending every prompt as T5's does."""
    tokenizer = byte_tokenizer(unk_token="<|bos|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|eos|>", special_tokens=[("<|eos|>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = None
    return tokenizer


def flan() -> T5ForConditionalGeneration:
    """With an output layer of its own, as T5 1.1 and Flan-T5 have: its outputs are not scaled."""
    model = t5(vocab_size=264, bos_token_id=None, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(264, 32) * 0.5)
    return model


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("llama"), llama(), byte_tokenizer(), run=by_command)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("--max-tokens", "200", "--prompt-fmt", "Do this: {instruction}")
    return converted(tmp_path_factory.mktemp("t5"), flan(), t5_tokenizer(), *options)


class Running(Emitted):
    """An engine and what it has emitted, by request id."""

    def __init__(self, info: ModelInfo, options: EngineOptions | None = None) -> None:
        super().__init__()
        self.info = info
        self.hooks = Hooks(info)
        assert info.engine is not None
        self.engine: Engine = info.engine(info, options or EngineOptions())

    def submit(self, prompt: str | list[int], params: SamplingParams, request_id: str = "r") -> None:
        ids = self.hooks.encode(prompt).input_ids if isinstance(prompt, str) else prompt
        request = EngineRequest(request_id=request_id, input_ids=ids, sampling=params)
        self.engine.submit(request, self.emit(request_id))

    def run(self, prompt: str | list[int], params: SamplingParams) -> list[EngineEvent]:
        self.submit(prompt, params)
        return self.take()

    def text(self, prompt: str | list[int], params: SamplingParams = GREEDY) -> str:
        return text_of(self.run(prompt, params))


def text_of(events: list[EngineEvent]) -> str:
    return "".join(delta.text for delta in deltas(events))


def ids_of(events: list[EngineEvent]) -> list[int]:
    return [i for delta in deltas(events) for i in delta.token_ids]


def reference(model: Any, ids: list[int], **kwargs: Any) -> list[int]:
    """What transformers generates, greedy unless told otherwise."""
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, **kwargs}
    output = model.generate(torch.tensor([ids]), **settings)[0].tolist()
    return output[1:] if model.config.is_encoder_decoder else output[len(ids) :]


@pytest.fixture(scope="module")
def decoder(llama_folder: Path) -> Iterator[Running]:
    running = Running(load_model(str(llama_folder), intra_threads=1))
    yield running
    running.engine.close()


@pytest.fixture(scope="module")
def seq2seq(t5_folder: Path) -> Iterator[Running]:
    running = Running(load_model(str(t5_folder), intra_threads=1))
    yield running
    running.engine.close()


MODELS = pytest.mark.parametrize("kind", ["decoder", "seq2seq"])


@pytest.fixture
def running(kind: str, request: pytest.FixtureRequest) -> Running:
    found: Running = request.getfixturevalue(kind)
    return found


def original(kind: str) -> Any:
    return llama() if kind == "decoder" else flan()


@MODELS
def test_greedy_text_is_that_of_transformers(kind: str, running: Running) -> None:
    model = original(kind)
    for prompt in PROMPTS:
        ids = running.hooks.encode(prompt).input_ids
        events = running.run(prompt, GREEDY)
        assert ids_of(events) == reference(model, ids)
        assert text_of(events) == running.info.tokenizer.decode(ids_of(events), skip_special_tokens=True)
        assert deltas(events)[-1].finish_reason == "length"


@MODELS
def test_tokens_are_streamed_as_they_come(kind: str, running: Running) -> None:
    ascii_tokens = replace(GREEDY, logprobs=0)
    events = deltas(running.run("Hello", ascii_tokens))
    assert [len(delta.token_ids) for delta in events] == [1] * 24


@MODELS
def test_requests_together_are_computed_as_if_alone(kind: str, running: Running) -> None:
    alone = {prompt: running.text(prompt) for prompt in PROMPTS}
    before = running.engine.stats().steps
    for i in range(20):
        running.submit(PROMPTS[i % 5], replace(GREEDY, max_tokens=10 + i), f"r{i}")
    texts = [text_of(running.take(f"r{i}")) for i in range(20)]
    assert running.engine.stats().steps - before < 20
    for i, text in enumerate(texts):
        ids = ids_of(running.run(PROMPTS[i % 5], replace(GREEDY, max_tokens=10 + i)))
        assert text == running.info.tokenizer.decode(ids, skip_special_tokens=True)
        shorter, longer = sorted((text.rstrip("�"), alone[PROMPTS[i % 5]].rstrip("�")), key=len)
        assert longer.startswith(shorter)


@MODELS
def test_different_settings_do_not_mix(kind: str, running: Running) -> None:
    settings = [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.8),
        replace(GREEDY, logprobs=2),
        replace(GREEDY, num_beams=3),
        replace(GREEDY, extra={"no_repeat_ngram_size": 1}),
    ]
    alone = [ids_of(running.run("mixed", params)) for params in settings]
    for i, params in enumerate(settings * 3):
        running.submit("mixed", params, f"m{i}")
    assert [ids_of(running.take(f"m{i}")) for i in range(15)] == alone * 3
    assert len({tuple(ids) for ids in alone}) > 2


@MODELS
def test_repetition_penalty_and_beams_are_those_of_transformers(kind: str, running: Running) -> None:
    model, ids = original(kind), running.hooks.encode("aaab").input_ids
    # The library knows every token of a prompt but the first, so let that come twice.
    penalised = replace(GREEDY, repetition_penalty=1.5)
    assert ids_of(running.run(ids, penalised)) == reference(model, ids, repetition_penalty=1.5)
    assert reference(model, ids, repetition_penalty=1.5) != reference(model, ids)
    beams = replace(GREEDY, num_beams=3, max_tokens=6)
    assert ids_of(running.run(ids, beams)) == reference(model, ids, num_beams=3, max_new_tokens=6)


@MODELS
def test_stops_end_the_text_and_only_its_own_row(kind: str, running: Running) -> None:
    tokenizer = running.info.tokenizer
    ids = ids_of(running.run("Hello", GREEDY))
    sixth = ids[5]
    first = ids.index(sixth)
    running.submit("Hello", replace(GREEDY, stop_token_ids=(sixth,)), "stopped")
    running.submit("Hello", GREEDY, "whole")
    stopped = deltas(running.take("stopped"))
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", sixth)
    assert ids_of(list(stopped)) == ids[: first + 1]
    assert ids_of(running.take("whole")) == ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    word = text[2:4]
    events = running.run("Hello", replace(GREEDY, stop=(word,)))
    assert text_of(events) == text[: text.index(word)]
    assert deltas(events)[-1].stop_reason == word


@MODELS
def test_terminators_and_min_tokens(kind: str, running: Running) -> None:
    model = original(kind)
    ids = running.hooks.encode("end").input_ids
    end = reference(model, ids)[3]
    expected = reference(model, ids, eos_token_id=end)
    ending = replace(GREEDY, stop_token_ids=(end,))
    assert ids_of(running.run(ids, ending)) == expected
    longer = ids_of(running.run(ids, replace(ending, min_tokens=10)))
    assert longer == reference(model, ids, eos_token_id=end, min_new_tokens=10)
    assert len(longer) >= 10
    assert end not in longer[:9]
    both = ids_of(running.run(ids, replace(ending, min_tokens=10, repetition_penalty=1.01)))
    assert end not in both[:9]


@MODELS
def test_logprobs_are_the_models_own(kind: str, running: Running) -> None:
    model, ids = original(kind), running.hooks.encode("scores").input_ids
    others = ["scored", "hidden"]
    for other in others:
        running.submit(other, replace(GREEDY, logprobs=3, max_tokens=4), other)
    entries = [
        entry
        for delta in deltas(running.run(ids, replace(GREEDY, logprobs=3, temperature=0.0)))
        for entry in delta.logprobs or ()
    ]
    for other in others:
        running.take(other)
    generated = [entry.token_id for entry in entries]
    if kind == "decoder":
        logits = model(torch.tensor([ids + generated])).logits[0, len(ids) - 1 : -1]
    else:
        decoded = torch.tensor([[258, *generated[:-1]]])
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoded).logits[0]
    expected = logits.log_softmax(-1)
    for entry, row in zip(entries, expected, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        assert entry.rank == 1
        assert [top.token_id for top in entry.top] == row.topk(3).indices.tolist()
        assert [top.logprob for top in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_prompt_logprobs_are_those_of_a_plain_forward(decoder: Running) -> None:
    model = llama()
    asked = replace(GREEDY, max_tokens=0, prompt_logprobs=2)
    for i, prompt in enumerate(PROMPTS):
        decoder.submit(prompt, asked, f"p{i}")
    for i, prompt in enumerate(PROMPTS):
        ids = decoder.hooks.encode(prompt).input_ids
        scores, last = decoder.take(f"p{i}")
        assert isinstance(scores, PromptScores)
        assert isinstance(last, Delta)
        assert (last.finish_reason, last.token_ids) == ("length", ())
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert scores.scores[0] is None
        for place, entry in enumerate(scores.scores[1:]):
            assert entry is not None
            assert entry.token_id == ids[place + 1]
            assert entry.logprob == pytest.approx(expected[place, entry.token_id].item(), abs=1e-4)
            assert [top.token_id for top in entry.top] == expected[place].topk(2).indices.tolist()


def choice(*texts: str, **kwargs: Any) -> SamplingParams:
    grammar = Grammar(kind="choice", source=json.dumps(texts))
    return SamplingParams(**{"temperature": 0, "max_tokens": 24, "grammar": grammar, **kwargs})


@MODELS
def test_the_likeliest_of_a_closed_set_is_chosen(kind: str, running: Running) -> None:
    model, ids = original(kind), running.hooks.encode("Is it?").input_ids
    texts = ["yes", "no", "perhaps", "q"]
    scores, ends = {}, {}
    for text in texts:
        tokens = [*running.info.tokenizer(text, add_special_tokens=False)["input_ids"], 257]
        if kind == "decoder":
            logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        else:
            decoded = torch.tensor([[258, *tokens[:-1]]])
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=decoded).logits[0]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        scores[text], ends[text] = sum(logprobs), logprobs[-1]
    events = running.run("Is it?", choice(*texts, logprobs=0))
    assert text_of(events) == max(scores, key=scores.__getitem__)
    assert deltas(events)[-1].finish_reason == "stop"
    tokens = [entry.logprob for delta in deltas(events) for entry in delta.logprobs or ()]
    assert sum(tokens) == pytest.approx(scores[text_of(events)] - ends[text_of(events)], abs=1e-3)
    drawn = [running.text("Is it?", choice(*texts, temperature=30.0, seed=seed)) for seed in range(20)]
    assert len(set(drawn)) > 1
    assert drawn == [running.text("Is it?", choice(*texts, temperature=30.0, seed=seed)) for seed in range(20)]


@MODELS
def test_sampling_follows_the_distribution(kind: str, running: Running) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.7, top_k=3, ignore_eos=True)
    model, ids = original(kind), running.hooks.encode("dice").input_ids
    if kind == "decoder":
        logits = model(torch.tensor([ids])).logits[0, -1]
    else:
        logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([[258]])).logits[0, -1]
    top = logits.topk(3)
    weights = (top.values / 0.7).softmax(-1).tolist()
    for i in range(400):
        running.submit("dice", params, f"d{i}")
    drawn = [ids_of(running.take(f"d{i}"))[0] for i in range(400)]
    for token_id, weight in zip(top.indices.tolist(), weights, strict=True):
        assert drawn.count(token_id) / 400 == pytest.approx(weight, abs=0.09)
    assert set(drawn) <= set(top.indices.tolist())
    first = ids_of(running.run("dice", replace(params, top_p=0.0)))
    assert first == top.indices.tolist()[:1]


@MODELS
def test_a_cancelled_request_ends_and_spares_its_neighbors(kind: str, running: Running) -> None:
    expected = ids_of(running.run("Hello", replace(GREEDY, max_tokens=150)))
    long = replace(GREEDY, max_tokens=150)
    for name in ("gone", "stays"):
        running.submit("Hello", long, name)
    running.answers["gone"].next()
    running.engine.cancel("gone")
    running.engine.cancel("never heard of")
    seen = running.answers["gone"].events.qsize()
    assert ids_of(running.take("stays")) == expected
    assert running.answers["gone"].events.qsize() == seen < 149
    running.submit("Hello", replace(GREEDY, max_tokens=2), "after")
    assert ids_of(running.take("after")) == expected[:2]
    assert running.engine.stats().waiting == 0


@MODELS
@pytest.mark.parametrize(
    "changed",
    [
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"logit_bias": {1: 1.0}},
        {"min_p": 0.1},
        {"typical_p": 0.5},
        {"bad_words": ("x",)},
        {"allowed_token_ids": (1,)},
        {"processed_logprobs": True},
        {"grammar": Grammar(kind="regex", source="a")},
        {"seed": 1, "temperature": 1.0},
        {"logprobs": 1, "repetition_penalty": 1.2},
        {"logprobs": 1, "num_beams": 2},
        {"logprobs": 1, "min_tokens": 1},
        {"capture": Capture(modules=("**",))},
        {"interventions": (Intervention(module="lm_head", op="zero"),)},
    ],
    ids=str,
)
def test_what_the_library_cannot_do_is_refused(kind: str, running: Running, changed: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as refused:
        running.submit("Hello", replace(GREEDY, **changed))
    assert refused.value.param in {*changed, "response_format"}


def test_an_encoders_prompt_has_no_scores(seq2seq: Running) -> None:
    with pytest.raises(UnsupportedParameter, match="prompt_logprobs"):
        seq2seq.submit("Hello", replace(GREEDY, prompt_logprobs=1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [({"nope": 1}, "has no 'nope'"), ({"patience": "x"}, "patience is 'x'"), ({"no_repeat_ngram_size": True}, "True")],
)
def test_wrong_options_of_the_library_are_named(decoder: Running, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        decoder.submit("Hello", replace(GREEDY, extra=extra))


def test_requests_that_cannot_be_served_are_refused(decoder: Running) -> None:
    with pytest.raises(ContextOverflow):
        decoder.submit("x" * 600, GREEDY)
    with pytest.raises(BadRequest, match="Token id 400 does not exist"):
        decoder.submit([1, 400], GREEDY)
    with pytest.raises(BadRequest, match="empty"):
        decoder.submit([], GREEDY)


def test_a_library_failure_is_the_requests_error(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(ctranslate2.Generator):  # type: ignore[misc]
        def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
            self.unload_model()
            return super().generate_batch(*args, **kwargs)

    monkeypatch.setattr(ctranslate2, "Generator", Broken)
    running = Running(load_model(str(llama_folder), intra_threads=1))
    (failed,) = running.run("Hello", GREEDY)
    assert isinstance(failed, Failed)
    assert failed.error.status == 500
    assert "CTranslate2 failed" in failed.error.message
    running.engine.check()
    running.engine.close()


def test_closing_fails_what_is_left(llama_folder: Path) -> None:
    running = Running(load_model(str(llama_folder), intra_threads=1), EngineOptions(max_batch_size=1))
    for i in range(30):
        running.submit("Hello", replace(GREEDY, max_tokens=400), f"c{i}")
    running.engine.close(timeout=0.05)
    ends = [running.take(f"c{i}")[-1] for i in range(30)]
    failed = [end.error for end in ends if isinstance(end, Failed)]
    assert failed
    assert all(isinstance(error, Unavailable) for error in failed)
    with pytest.raises(Unavailable):
        running.submit("Hello", GREEDY)


def test_bootstrap_config_says_how_to_prompt(t5_folder: Path, seq2seq: Running) -> None:
    given = json.loads((t5_folder / "bootstrap_config.json").read_text())
    assert given == {
        "name": "hf",
        "params": sum(p.numel() for p in flan().parameters()),
        "max_tokens": 200,
        "prompt_fmt": "Do this: {instruction}",
    }
    assert seq2seq.engine.max_model_len == 400
    assert seq2seq.info.model_name == "hf"
    encoded = seq2seq.hooks.encode("{instruction} sing").input_ids
    assert seq2seq.info.tokenizer.decode(encoded) == "Do this: {instruction} sing<|eos|>"


def test_quantization_and_path_may_come_from_elsewhere(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    target = converted(tmp_path, llama(), tokenizer, "--quantization", "int8")
    assert (target / "model.bin").stat().st_size < 0.5 * (llama_folder / "model.bin").stat().st_size
    given = json.loads((target / "bootstrap_config.json").read_text())
    params = sum(p.numel() for p in llama().parameters())
    assert given == {"name": "hf", "params": params, "quantization": "int8", "max_tokens": 256}
    monkeypatch.setenv("LLM_ARTIFACT_DIR", str(target))
    opened: list[str] = []

    class Noted(ctranslate2.Generator):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            opened.append(self.compute_type)

    monkeypatch.setattr(ctranslate2, "Generator", Noted)
    running = Running(as_model_info(load_model(), "loader"))
    assert set(opened) == {"int8_float32"}
    assert len(ids_of(running.run("Hello", GREEDY))) == 24
    running.engine.close()


def test_folders_of_older_versions_are_read(t5_folder: Path, tmp_path: Path) -> None:
    """A vocabulary as text, and nothing but tokenizer.json to make a tokenizer of."""
    old = tmp_path / "old"
    old.mkdir()
    (old / "model.bin").symlink_to(t5_folder / "model.bin")
    for name in ("config.json", "tokenizer.json"):
        (old / name).write_text((t5_folder / name).read_text())
    tokens = json.loads((t5_folder / "shared_vocabulary.json").read_text())
    (old / "shared_vocabulary.txt").write_text("\n".join(tokens) + "\n")
    running = Running(load_model(str(old), intra_threads=1, max_model_len=300))
    assert ids_of(running.run("Hello", GREEDY)) == reference(flan(), running.hooks.encode("Hello").input_ids)
    assert running.info.stop_token_ids == [257]
    running.engine.close()


def broken(folder: Path, **changed: str) -> Path:
    for name, text in changed.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_faulty_folders_are_explained(llama_folder: Path, tmp_path: Path) -> None:
    def copy(name: str, **changed: str) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file in llama_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return str(broken(folder, **changed))

    with pytest.raises(ModelLoadFailed, match=r"has no model\.bin"):
        load_model(str(tmp_path))
    with pytest.raises(ModelLoadFailed, match="LLM_ARTIFACT_DIR"):
        load_model()
    with pytest.raises(ModelLoadFailed, match="unknown key 'nam'"):
        load_model(copy("a", bootstrap_config='{"nam": "x"}'))
    with pytest.raises(ModelLoadFailed, match="max_tokens is 'x'"):
        load_model(copy("b", bootstrap_config='{"max_tokens": "x"}'))
    with pytest.raises(ModelLoadFailed, match="is not JSON"):
        load_model(copy("c", bootstrap_config="{"))
    with pytest.raises(ModelLoadFailed, match="The tokenizer is not this model's"):
        load_model(copy("d", vocabulary=json.dumps(["a", "b"])))
    with pytest.raises(ModelLoadFailed, match="chat_template file nowhere does not exist"):
        load_model(str(llama_folder), chat_template="nowhere")
    info = load_model(str(llama_folder), compute_type="int3")
    assert info.engine is not None
    with pytest.raises(ModelLoadFailed, match="CTranslate2 cannot load"):
        info.engine(info, EngineOptions())


def test_conversations_without_a_template() -> None:
    user = {"role": "user", "content": "What's a nice reptile?"}
    assert instruction_chat([user]) == "What's a nice reptile?"
    assert instruction_chat([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == "Hi"
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "A snake."}
    assert instruction_chat([system, user, answer, user]) == (
        "Be kind.\n\nQuestion: What's a nice reptile?\n\nAssistant: A snake.\n\n"
        "Question: What's a nice reptile?\n\nAssistant:"
    )
    with pytest.raises(ValueError, match="got a content part of type 'image_url'"):
        instruction_chat([{"role": "user", "content": [{"type": "image_url"}]}])


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, Any]:
    return {"loader": "model_loaders.backends.ctranslate2:load_model", "id": "tiny"}


def test_the_whole_api_over_it(t5_folder: Path, llama_folder: Path, entry: dict[str, Any]) -> None:
    """Chats, completions, streams, logprobs, errors: what clients see of any model."""
    with TestClient(model_app(kwargs={"model_path": str(t5_folder)}, model_info_from=entry["loader"], id="t5")) as web:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web)
        messages: list[Any] = [{"role": "user", "content": "Hello"}]
        chat = client.chat.completions.create(model="t5", messages=messages, temperature=0, max_tokens=20)
        assert chat.choices[0].message.content
        stream = client.chat.completions.create(
            model="t5", messages=messages, temperature=0, max_tokens=20, stream=True
        )
        pieces = [c.choices[0].delta.content or "" for c in stream if c.choices]
        assert "".join(pieces) == chat.choices[0].message.content
        plain = client.completions.create(model="t5", prompt="Hello", temperature=0, max_tokens=20)
        assert plain.choices[0].text == chat.choices[0].message.content
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == len("Do this: Hello") + 1
        with pytest.raises(openai.BadRequestError, match="presence_penalty"):
            client.completions.create(model="t5", prompt="Hello", presence_penalty=1.0)
        inside: Any = {"capture": {"modules": ["**"]}, "interventions": [{"module": "**", "op": "zero"}]}
        for name, value in inside.items():
            with pytest.raises(openai.BadRequestError) as refused:
                client.completions.create(model="t5", prompt="Hello", extra_body={name: value})
            assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)
    with TestClient(
        model_app(kwargs={"model_path": str(llama_folder)}, model_info_from=entry["loader"], id="llama")
    ) as web:
        client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=web)
        scored = client.completions.create(
            model="llama", prompt="Hello", temperature=0, max_tokens=0, echo=True, logprobs=1
        )
        assert scored.choices[0].logprobs is not None
        assert len(scored.choices[0].logprobs.token_logprobs or ()) == 5
        guided = client.completions.create(
            model="llama", prompt="Hello", temperature=0, extra_body={"guided_choice": ["left", "right"]}
        )
        assert guided.choices[0].text in ("left", "right")
        assert guided.choices[0].finish_reason == "stop"
