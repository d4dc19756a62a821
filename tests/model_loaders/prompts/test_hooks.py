"""The way of messages through the hooks: what templates read, what encoders return, what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.core.calls import ChatPrompt
from deployments.core.errors import ModelError, TemplateFailed, UnsupportedParameter
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks
from tests.tiny import byte_tokenizer

PARTS_ONLY = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'image' %}<img>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<img>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
TEXT_ONLY = "{% for m in messages %}{{ m.content }}{% endfor %}"
WITH_IMAGE = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]


def hooks(template: str | None = None, **fields: Any) -> Hooks:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return Hooks(ModelInfo(**{"model": object(), "model_name": "m", "tokenizer": tokenizer, **fields}))


def said(text: str) -> ChatPrompt:
    return ChatPrompt(messages=[{"role": "user", "content": text}])


@pytest.mark.parametrize("template", [PARTS_ONLY, EITHER, TEXT_ONLY], ids=["parts", "either", "text"])
def test_a_text_reaches_every_kind_of_template(template: str) -> None:
    """A template that reads parts alone would lose a plain text without a word."""
    assert hooks(template).render(said("hi")) == "hi"


@pytest.mark.parametrize("template", [PARTS_ONLY, EITHER], ids=["parts", "either"])
def test_an_image_has_its_place(template: str) -> None:
    assert hooks(template).render(ChatPrompt(messages=WITH_IMAGE)) == "<img>hi"


def test_a_template_of_texts_has_no_place_for_an_image() -> None:
    with pytest.raises(TemplateFailed, match="writes texts only"):
        hooks(TEXT_ONLY).render(ChatPrompt(messages=WITH_IMAGE))


def test_parts_of_other_types_are_refused_by_name() -> None:
    message = {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}
    with pytest.raises(UnsupportedParameter, match="'input_audio'"):
        hooks(EITHER).render(ChatPrompt(messages=[message]))


def test_a_hook_of_the_loader_gets_the_messages_as_they_are() -> None:
    seen = []
    own = hooks(apply_chat_template=lambda messages: seen.append(messages) or "x")
    assert own.render(ChatPrompt(messages=WITH_IMAGE)) == "x"
    assert seen == [WITH_IMAGE]


def test_a_hook_is_tried_out_once() -> None:
    """Plain texts need no trial; a history with calls does once, and its later turns do not."""
    calls: list[Any] = []

    def write(messages: list[Any]) -> str:
        calls.append(messages)
        return "".join(f"{message.get('content')}{message.get('tool_calls', '')}" for message in messages)

    own = hooks(apply_chat_template=write)
    own.render(said("hi"))
    assert len(calls) == 1
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turn = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "12:00"}]
    history: list[Any] = [{"role": "user", "content": "go"}, *turn, *turn, *turn]
    own.render(ChatPrompt(messages=history))
    calls.clear()
    for _ in range(3):
        history += turn
        own.render(ChatPrompt(messages=history))
    assert len(calls) == 3
    assert "12:00" in own.render(ChatPrompt(messages=history))


def test_a_requests_template_is_looked_at_by_itself() -> None:
    own = hooks(TEXT_ONLY)
    chat = ChatPrompt(messages=[{"role": "user", "content": "hi"}], chat_template=PARTS_ONLY)
    assert own.render(chat) == "hi"
    assert own.render(said("hi")) == "hi"


def test_a_loader_may_leave_the_assistants_turn_closed() -> None:
    template = "{% if add_generation_prompt %}open{% else %}closed{% endif %}{{ messages[0].content }}"
    assert hooks(template).render(said("!")) == "open!"
    assert hooks(template, apply_chat_template_kwargs={"add_generation_prompt": False}).render(said("!")) == "closed!"


def encoder(**returned: Any) -> Hooks:
    return hooks(encode=lambda prompt: returned)


def test_hidden_positions_are_left_out() -> None:
    encoded = encoder(
        input_ids=torch.tensor([[9, 9, 5, 6]]),
        attention_mask=torch.tensor([[0, 0, 1, 1]]),
        token_type_ids=torch.tensor([[0, 0, 1, 0]]),
        pixel_values=torch.ones(1, 3, 4, 4),
    ).encode("x")
    assert encoded.input_ids == [5, 6]
    assert encoded.model_inputs["token_type_ids"].tolist() == [[1, 0]]
    assert encoded.model_inputs["pixel_values"].shape == (1, 3, 4, 4)


def test_what_is_no_tensor_is_named_and_not_dropped() -> None:
    assert encoder(input_ids=[1, 2], spans=[[1, 2]]).encode("x").model_inputs["spans"].tolist() == [[1, 2]]
    with pytest.raises(ModelError, match="image_patches=list"):
        encoder(input_ids=[1, 2], image_patches=[torch.ones(2), torch.ones(3)]).encode("x")


def test_labels_are_no_input() -> None:
    assert encoder(input_ids=[1], labels=torch.tensor([[-100]]), nothing=None).encode("x").model_inputs == {}


def test_images_of_different_pixels_have_different_salts() -> None:
    salts = {encoder(input_ids=[1], pixel_values=torch.full((1, 2), i)).encode("x").content_key for i in range(3)}
    assert len(salts) == 3


def test_images_need_an_encoder_that_takes_them() -> None:
    with pytest.raises(UnsupportedParameter, match="takes no images") as refused:
        hooks(EITHER).encode("x", images=[object()])
    assert refused.value.code == "images_unsupported"
    seen: list[Any] = []
    seeing = hooks(encode=lambda prompt, images=(): seen.extend(images) or {"input_ids": [1]})
    seeing.encode("x", images=["picture"])
    assert seen == ["picture"]


class EncoderDecoder:
    """A model by its config alone."""

    class config:
        is_encoder_decoder = True


def test_an_encoders_text_ends_as_its_tokenizer_ends_it() -> None:
    kwargs: list[dict[str, Any]] = []

    def encode(prompt: str, **given: Any) -> Any:
        kwargs.append(given)
        return {"input_ids": [1]}

    own = hooks(model=EncoderDecoder(), encode=encode)
    own.encode("hello")
    own.encode("hello<|eos|>")
    assert [given["add_special_tokens"] for given in kwargs] == [True, False]
    hooks(encode=encode).encode("hello")
    assert kwargs[-1]["add_special_tokens"] is False


def test_a_processor_that_only_decodes() -> None:
    class Processor:
        def decode(self, token_ids: Any, **kwargs: Any) -> str:
            return f"{len(token_ids)} tokens"

    own = Hooks(ModelInfo(model=object(), processor=Processor()))
    assert own.decode([1, 2]) == "2 tokens"
