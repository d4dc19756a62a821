"""Fuyu and PaliGemma through the real API: chats with images answer what the model's own `generate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from transformers import (
    FuyuForCausalLM,
    FuyuProcessor,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)

from model_loaders.examples.fuyu import cut_tensors
from tests.openai.conftest import Serve, serve
from tests.seeds.vision import data_uri, picture, save_fuyu, save_paligemma
from tests.tiny import byte_tokenizer

__all__ = ["serve"]

# transformers' PaliGemmaProcessor, at every call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

QUESTION = "What is it?"


def asked(*images: str, text: str = QUESTION) -> list[Any]:
    """One user message with images before its text."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def answer(client: OpenAI, model: str, messages: list[Any]) -> tuple[str, Any]:
    """A greedy answer of eight tokens, and the ids and text of its prompt."""
    done = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=8,
        extra_body={"return_token_ids": True, "return_prompt_text": True},
    )
    return done.choices[0].message.content or "", done


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vision")
    lender = byte_tokenizer()
    lender.chat_template = "{{ bos_token }}" + lender.chat_template
    lender.save_pretrained(root / "lender")
    return {
        "fuyu": save_fuyu(root / "fuyu"),
        "paligemma": save_paligemma(root / "paligemma"),
        "lender": root / "lender",
    }


@pytest.fixture(scope="module")
def client(serve: Serve, folders: dict[str, Path]) -> OpenAI:
    server = serve(
        [
            {
                "id": "fuyu",
                "loader": "model_loaders.examples.fuyu:load_model",
                "kwargs": {"model_name": str(folders["fuyu"])},
            },
            {
                "id": "paligemma",
                "loader": "model_loaders.examples.paligemma:load_model",
                "kwargs": {"model_name": str(folders["paligemma"]), "template_from": str(folders["lender"])},
            },
            {"id": "text", "loader": "model_loaders.demo:load_model"},
        ]
    )
    return server.client(timeout=120)


@pytest.fixture(scope="module")
def fuyu(folders: dict[str, Path]) -> tuple[Any, Any]:
    processor = FuyuProcessor.from_pretrained(folders["fuyu"])
    cut_tensors(processor.image_processor)
    return FuyuForCausalLM.from_pretrained(folders["fuyu"]), processor


@pytest.fixture(scope="module")
def paligemma(folders: dict[str, Path]) -> tuple[Any, Any]:
    folder = folders["paligemma"]
    return PaliGemmaForConditionalGeneration.from_pretrained(folder), PaliGemmaProcessor.from_pretrained(folder)


def generated(model: Any, inputs: Any) -> list[int]:
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("color", ["red", "blue"])
def test_fuyu_sees_the_image(client: OpenAI, fuyu: tuple[Any, Any], color: str) -> None:
    model, processor = fuyu
    inputs = processor(
        text=f"{QUESTION}\n", images=picture(color), return_tensors="pt", return_legacy_image_output=False
    )
    text, done = answer(client, "fuyu", asked(data_uri(picture(color))))
    assert done.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert done.choices[0].token_ids == generated(model, inputs)
    assert text == processor.tokenizer.decode(done.choices[0].token_ids, skip_special_tokens=True)
    assert done.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_fuyu_answers_a_chat_without_image_or_template(client: OpenAI) -> None:
    _, done = answer(client, "fuyu", [{"role": "system", "content": "Be brief."}, *asked()])
    assert done.prompt_text == f"Be brief.\n{QUESTION}\n"
    assert done.choices[0].finish_reason == "length"


def test_fuyu_refuses_a_second_image(client: OpenAI) -> None:
    url = data_uri(picture())
    with pytest.raises(openai.BadRequestError, match="reads one image; got 2"):
        answer(client, "fuyu", asked(url, url))


@pytest.mark.parametrize("colors", [("red",), ("blue",), ("red", "blue")])
def test_paligemma_sees_the_images(client: OpenAI, paligemma: tuple[Any, Any], colors: tuple[str, ...]) -> None:
    model, processor = paligemma
    written = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    images = [picture(color) for color in colors]
    inputs = processor(text="<image>" * len(images) + written, images=images, return_tensors="pt")
    _, done = answer(client, "paligemma", asked(*map(data_uri, images)))
    assert done.prompt_text == f"<|bos|>{written}"
    assert done.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert done.choices[0].token_ids == generated(model, inputs)


def test_paligemma_encodes_a_text_alone(client: OpenAI, paligemma: tuple[Any, Any]) -> None:
    model, processor = paligemma
    _, done = answer(client, "paligemma", asked())
    inputs = processor.tokenizer(done.prompt_text, add_special_tokens=False, return_tensors="pt")
    assert done.prompt_token_ids == inputs["input_ids"][0].tolist()
    assert done.choices[0].token_ids == generated(model, inputs)


def test_jpeg_and_plain_base64_parts(client: OpenAI) -> None:
    url = data_uri(picture(), "JPEG")
    by_url, _ = answer(client, "paligemma", asked(url))
    part = {"type": "image", "base64": url.partition(",")[2]}
    content = [part, {"type": "text", "text": QUESTION}]
    by_part, _ = answer(client, "paligemma", [{"role": "user", "content": content}])
    assert by_part == by_url


@pytest.mark.parametrize("images", [0, 1])
def test_a_text_with_the_token_of_an_image_is_refused(client: OpenAI, images: int) -> None:
    """The loader's own `encode` cannot tell it from an image."""
    messages = asked(*[data_uri(picture())] * images, text="In HTML, <image> does not exist.")
    with pytest.raises(openai.BadRequestError, match="contains '<image>'") as refused:
        answer(client, "paligemma", messages)
    assert refused.value.param == "messages[0].content"


def test_a_model_without_eyes_says_so(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        answer(client, "text", asked(data_uri(picture())))
    assert refused.value.code == "images_unsupported"
    assert refused.value.param == "messages[0].content[0].image_url"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:9/x.png", "fetches no images"),
        ("file:///etc/passwd", "fetches no images"),
        ("data:image/png;base64,####", "base64"),
        ("data:image/png;base64", "without a comma"),
        ("data:image/png;base64,AAAA", "not a readable image"),
        (data_uri(picture(), "JPEG")[:423], "not a readable image"),
        (data_uri(picture(size=(9000, 9000))), "9000 x 9000 pixels"),
    ],
)
def test_what_is_no_image_is_refused(client: OpenAI, url: str, said: str) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        answer(client, "paligemma", asked(url))
    assert refused.value.param == "messages[0].content[0].image_url"
