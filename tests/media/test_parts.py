"""Images and recordings taken out of a conversation."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import pytest

from deployments.core.calls import ChatPrompt
from deployments.media.parts import Kind, MediaSource, Read, from_base64, split_media


def _read(part: Mapping[str, Any], place: str) -> MediaSource:
    return MediaSource(part["url"], place)


READERS: dict[str, tuple[Kind, Read]] = {"picture": ("image", _read), "sound": ("audio", _read)}


def test_media_give_way_to_placeholders_in_order_of_the_conversation() -> None:
    first = [{"type": "picture", "url": "a"}, {"type": "text", "text": "and"}, {"type": "picture", "url": "b"}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": first},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": [{"type": "sound", "url": "d"}, {"type": "picture", "url": "c"}, "bare"]},
    ]
    chat, sources = split_media(ChatPrompt(messages=messages), READERS)
    assert [(source.text, source.param) for source in sources["image"]] == [
        ("a", "messages[0].content[0]"),
        ("b", "messages[0].content[2]"),
        ("c", "messages[2].content[1]"),
    ]
    assert sources["audio"] == [MediaSource("d", "messages[2].content[0]")]
    assert chat.messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    last = [{"type": "audio"}, {"type": "image"}, "bare"]
    assert chat.messages[1:] == [messages[1], {"role": "user", "content": last}]
    assert first[0]["type"] == "picture", "the client's own messages stay as they were"


def test_a_conversation_without_media_is_left_alone() -> None:
    chat = ChatPrompt(messages=[{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}])
    assert split_media(chat, READERS) == (chat, {"image": [], "audio": []})


def test_base64_of_both_alphabets() -> None:
    data = bytes(range(256))
    assert from_base64(base64.b64encode(data).decode()) == data
    assert from_base64(base64.urlsafe_b64encode(data).decode()) == data
    with pytest.raises(ValueError, match=r"base64|padding"):
        from_base64("no base64!")
