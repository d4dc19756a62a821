"""Images of a conversation: taken out of its messages, checked and decoded.

In place of each image the template gets `{"type": "image"}`, the part that transformers' own templates know; the
images themselves go to the encoder, in the order of the conversation.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from deployments.errors import BadRequest, UnsupportedParameter
from deployments.messages import ChatPrompt

MAX_PIXELS = 64 * 2**20
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# OpenAI's chat part, OpenAI's responses part, transformers' part.
_KINDS = ("image_url", "input_image", "image")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image comes from, and the request field that says so."""

    url: str
    param: str


def split_images(chat: ChatPrompt) -> tuple[ChatPrompt, list[ImageSource]]:
    """The conversation with a placeholder part for every image, and the images in order.

    Raises:
        BadRequest: an image part has no image.
    """
    sources: list[ImageSource] = []
    messages = []
    for index, message in enumerate(chat.messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [_placeholder(part, f"messages[{index}].content[{i}]", sources) for i, part in enumerate(content)]
            message = {**message, "content": parts}
        messages.append(message)
    return (replace(chat, messages=messages), sources) if sources else (chat, sources)


def decode_image(source: ImageSource) -> Image.Image:
    """The pixels of an image as RGB, turned upright as its EXIF orientation says.

    Raises:
        UnsupportedParameter: it is not in the request itself.
        BadRequest: it is no image in a known format, or larger than `MAX_PIXELS`.
    """
    data = _data(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(image, source)
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise _bad(source, f"it has more than {MAX_PIXELS} pixels") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise _bad(source, f"it is no readable image ({', '.join(_FORMATS)})") from error


def _placeholder(part: Any, place: str, sources: list[ImageSource]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in _KINDS:
        return part
    name = "image_url" if "image_url" in part else next((key for key in ("url", "base64", "image") if key in part), "")
    given = part.get(name)
    url = given.get("url") if isinstance(given, Mapping) else given
    if not isinstance(url, str) or not url:
        raise BadRequest(
            f'Invalid \'{place}\': input should have an image, as {{"type": "image_url", "image_url": {{"url": '
            '"data:image/png;base64,…"}}.',
            param=place,
        )
    if name in ("base64", "image") and not url.startswith(("data:", "http:", "https:", "file:")):
        url = f"data:;base64,{url}"
    sources.append(ImageSource(url, f"{place}.{name}"))
    return {"type": "image"}


def _data(source: ImageSource) -> bytes:
    scheme, _, rest = source.url.partition(":")
    if scheme.lower() != "data":
        raise UnsupportedParameter(
            f"Invalid '{source.param}': this server fetches no images (media_urls is off); send a data: URI with "
            f"the image in it (got {source.url[:60]!r}).",
            param=source.param,
        )
    head, comma, payload = rest.partition(",")
    if not comma:
        raise _bad(source, "it is a data: URI without a comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(payload.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _bad(source, f"its base64 cannot be decoded ({error})") from None


def _check_size(image: Image.Image, source: ImageSource) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _bad(source, f"it has {width} x {height} pixels; this server decodes {MAX_PIXELS}")


def _bad(source: ImageSource, why: str) -> BadRequest:
    return BadRequest(f"Invalid '{source.param}': {why}.", param=source.param, code="invalid_image")
