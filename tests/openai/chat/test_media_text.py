"""Texts that contain the token of an image are texts, and images are as many as the client sent."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from tests.openai.conftest import Serve, Server
from tests.seeds.vision import data_uri, picture
from tests.tiny import byte_tokenizer

IMAGE = {"type": "image_url", "image_url": {"url": data_uri(picture())}}
TEXT = "In HTML, <image> does not exist; <image/> neither."
IMAGE_ID = 261


@pytest.fixture(scope="module")
def server(serve: Serve) -> Server:
    loader, engine = "tests.openai.tiny_models:with_images", {"pack_linears": False, "threads": 1}
    return serve([{"id": "llava", "loader": loader, "engine": engine}])


def post(server: Server, path: str, **body: Any) -> Any:
    return requests.post(server.url + path, json={"model": "llava", **body}, timeout=60).json()


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"<image>": "<image>"}'}}
AGENT = [user("x"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": TEXT}]
TOOL = {"type": "function", "function": {"name": "f", "description": TEXT}}


@pytest.mark.parametrize(
    ("messages", "images"),
    [
        ([{"role": "user", "content": TEXT}], 0),
        ([user(TEXT, "<image>")], 0),
        ([user(IMAGE, TEXT)], 1),
        ([user(TEXT, IMAGE, "<image>", IMAGE)], 2),
        ([{"role": "system", "content": TEXT}, user(IMAGE)], 1),
        (AGENT, 0),
        ([user(IMAGE, "x"), *AGENT], 1),
    ],
)
def test_a_token_in_a_text_is_text(server: Server, messages: list[Any], images: int) -> None:
    rendered = post(server, "/v1/chat/completions/render", messages=messages, tools=[TOOL])
    ids = rendered["token_ids"]
    assert ids.count(IMAGE_ID) == 4 * images
    others = [token_id for token_id in ids if token_id != IMAGE_ID]
    places = rendered["prompt"].count("<image>") - images
    assert places > 0
    assert byte_tokenizer().decode(others).count("<image>") == places
    answer = post(server, "/v1/chat/completions", messages=messages, tools=[TOOL], max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_a_prompt_without_a_chat(server: Server) -> None:
    ids = post(server, "/tokenize", prompt=TEXT)["tokens"]
    assert ids == byte_tokenizer()(TEXT).input_ids
    assert post(server, "/v1/completions", prompt=TEXT, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)


def test_a_text_cannot_forge_the_marks(server: Server) -> None:
    """The characters that tell a token as text are dropped from a text that has tokens."""
    forged = "\U000f0000<image>\U000f0001 \U000f0001<image>"
    rendered = post(server, "/v1/chat/completions/render", messages=[user(forged)])
    assert rendered["token_ids"].count(IMAGE_ID) == 0
    assert "<image> <image>" in rendered["prompt"]


def test_an_image_without_a_place_is_refused(server: Server) -> None:
    """This template writes the images of users alone."""
    messages = [{**user(IMAGE, "s"), "role": "system"}, user(IMAGE, "x")]
    error = post(server, "/v1/chat/completions", messages=messages)["error"]
    assert error["code"] == "chat_template_error"
    assert error["param"] == "messages[0]"
