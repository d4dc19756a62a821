"""Images of a conversation: found in its messages, checked and decoded."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from deployments.core.calls import ChatPrompt
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.media.parts import MediaSource, from_base64, split_media

MAX_PIXELS = 64 * 2**20
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# OpenAI's chat part, OpenAI's responses part, transformers' part.
_KINDS = ("image_url", "input_image", "image")


def split_images(chat: ChatPrompt) -> tuple[ChatPrompt, list[MediaSource]]:
    """The conversation with a placeholder part for every image, and the images in order.

    Raises:
        BadRequest: an image part has no image.
    """
    return split_media(chat, "image", _source)


def decode_image(source: MediaSource) -> Image.Image:
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


def _source(part: Mapping[str, Any], place: str) -> MediaSource | None:
    if part.get("type") not in _KINDS:
        return None
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
    return MediaSource(url, f"{place}.{name}")


def _data(source: MediaSource) -> bytes:
    scheme, _, rest = source.text.partition(":")
    if scheme.lower() != "data":
        raise UnsupportedParameter(
            f"Invalid '{source.param}': this server fetches no images (media_urls is off); send a data: URI with "
            f"the image in it (got {source.text[:60]!r}).",
            param=source.param,
        )
    head, comma, payload = rest.partition(",")
    if not comma:
        raise _bad(source, "it is a data: URI without a comma")
    if not head.lower().endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return from_base64(payload)
    except ValueError as error:
        raise _bad(source, f"its base64 cannot be decoded ({error})") from None


def _check_size(image: Image.Image, source: MediaSource) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _bad(source, f"it has {width} x {height} pixels; this server decodes {MAX_PIXELS}")


def _bad(source: MediaSource, why: str) -> BadRequest:
    return BadRequest(f"Invalid '{source.param}': {why}.", param=source.param, code="invalid_image")
