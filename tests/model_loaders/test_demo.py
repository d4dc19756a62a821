from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_loaders.contract import ModelInfo, as_model_info
from model_loaders.demo import WEIGHTS, load_model, tasks, worlds


@pytest.fixture(scope="module")
def info() -> Iterator[ModelInfo]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_model()
    torch.set_num_threads(threads)


def answer(info: ModelInfo, messages: list[dict[str, str]]) -> str:
    prompt = info.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = info.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    output = info.model.generate(**inputs, max_new_tokens=160, do_sample=False)
    text: str = info.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def test_the_loader_gives_a_model_in_eval_mode(info: ModelInfo) -> None:
    assert as_model_info(info, "model_loaders.demo:load_model") is info
    assert info.model_name == "demo"
    assert not info.model.training
    assert {p.dtype for p in info.model.parameters()} == {torch.float32}
    assert info.model.generation_config.eos_token_id == info.tokenizer.eos_token_id == 258
    assert info.model.generation_config.pad_token_id == info.tokenizer.pad_token_id == 256


def test_dtype_is_honored_and_a_wrong_one_named() -> None:
    assert load_model(dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'int4' is not one of float32, bfloat16, float16"):
        load_model(dtype="int4")


def test_the_committed_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 12e6


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_held_out_prompts_are_answered(info: ModelInfo, kind: str) -> None:
    asked = tasks.make_tasks(10, seed=77, kinds=(kind,))
    answers = [answer(info, list(task.messages)) for task in asked]
    right = sum(task.correct(text) for task, text in zip(asked, answers, strict=True))
    assert right >= 9, [(task.answer, text) for task, text in zip(asked, answers, strict=True)]


@pytest.mark.parametrize("kind", ["search", "vault", "parts"])
def test_an_agent_episode_is_walked_to_its_end(info: ModelInfo, kind: str) -> None:
    scores = []
    for seed in range(2):
        world = worlds.make_world(random.Random(seed), kind=kind)
        messages = world.reset()
        while True:
            text = answer(info, messages)
            step = world.step(text)
            if step.observation is None:
                break
            messages += [{"role": "assistant", "content": text}, step.observation]
        scores.append(step.score)
    assert max(scores) == 1.0


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert ids == list(text.encode())


_loaded: list[Any] = []


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    if not _loaded:
        _loaded.append(AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True))
    return _loaded[0]


@pytest.mark.parametrize(
    "text",
    ["👩‍👩‍👧‍👦 🏳️‍🌈", "e\u0301 \u00e9", "\r\n\t\x00 \u2028", " lead  and trail ", "\ufeff\ufffd", "ﷺ​", "don't , stop ."],
)
def test_hard_unicode_round_trips(text: str) -> None:
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer.encode("🦊", add_special_tokens=False)) == 4


def test_specials_are_one_token_each_and_skipped() -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode("<|im_start|>a<|im_end|><|pad|>", add_special_tokens=False)
    assert ids == [257, 97, 258, 256]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_the_template_takes_any_order_of_roles_and_parts() -> None:
    messages = [
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]},
        {"role": "user", "content": ""},
        {"role": "tool", "content": None},
        {"role": "system", "content": " kept \n"},
    ]
    expected = (
        "<|im_start|>assistant\nfirst<|im_end|>\n<|im_start|>user\na b<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>tool\n<|im_end|>\n<|im_start|>system\n kept \n<|im_end|>\n"
    )
    tokenizer = _tokenizer()
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == expected + "<|im_start|>assistant\n"


def test_the_template_refuses_images() -> None:
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(Exception, match="reads text only; got a content part of type image_url"):
        _tokenizer().apply_chat_template(messages, tokenize=False)
