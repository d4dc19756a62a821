"""Images and recordings of a conversation, taken out of its messages.

In place of each one the template gets `{"type": "image"}` or `{"type": "audio"}`, the parts that transformers' own
templates know; they themselves go to the encoder, in the order of the conversation.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from deployments.core.calls import ChatPrompt
from deployments.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class MediaSource:
    """An image or a recording as the client sent it (a URI or base64), and the request field that holds it."""

    text: str
    param: str


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What the media of one request may have together.

    Attributes:
        parts: images and recordings.
        pixels: of the images.
        seconds: of the recordings.
        samples: of the recordings' files, over all channels.
    """

    parts: int = 256
    pixels: int = 256 * 2**20
    seconds: float = 3600.0
    samples: int = 512 * 2**20

    def check_parts(self, sources: Sequence[MediaSource]) -> None:
        """Refuse a request of too many parts.

        Raises:
            BadRequest: `param` is the first that is one too many.
        """
        if len(sources) > self.parts:
            place = sources[self.parts].param
            raise BadRequest(
                f"Invalid '{place}': the request has {len(sources)} images and recordings; this server reads at most "
                f"{self.parts} (media_max_parts).",
                param=place,
            )


Kind = Literal["image", "audio"]
Read = Callable[[Mapping[str, Any], str], MediaSource]


def split_media(
    chat: ChatPrompt, readers: Mapping[str, tuple[Kind, Read]]
) -> tuple[ChatPrompt, dict[Kind, list[MediaSource]]]:
    """The conversation with a placeholder part for every medium, and the media of each kind in order.

    Args:
        readers: by the type of a content part, the kind of its medium and what reads it, given the part and its place
            in the request.
    """
    sources: dict[Kind, list[MediaSource]] = {"image": [], "audio": []}

    def placed(part: Any, place: str) -> Any:
        known = readers.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        if known is None:
            return part
        kind, read = known
        sources[kind].append(read(part, place))
        return {"type": kind}

    messages = []
    for index, message in enumerate(chat.messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [placed(part, f"messages[{index}].content[{i}]") for i, part in enumerate(content)]
            message = {**message, "content": parts}
        messages.append(message)
    return (replace(chat, messages=messages) if any(sources.values()) else chat), sources


def from_base64(text: str) -> bytes:
    """The bytes of base64 in its common or its URL-safe alphabet.

    Raises:
        ValueError: it is neither.
    """
    return base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
