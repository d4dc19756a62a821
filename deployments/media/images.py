"""Images of a conversation: found in its messages, checked and decoded."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageOps, UnidentifiedImageError

from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.media.parts import MediaSource, from_base64

MAX_PIXELS = 64 * 2**20
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
# OpenAI's chat part, OpenAI's responses part, transformers' part.
IMAGE_PARTS = ("image_url", "input_image", "image")


def image_source(part: Mapping[str, Any], place: str) -> MediaSource:
    """The image of a content part.

    Raises:
        BadRequest: the part has none.
    """
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


def open_images(sources: Sequence[MediaSource], *, max_pixels: int) -> list[Image.Image]:
    """The images with nothing but their headers read. Of an animated one the first frame is decoded, and counts.

    Args:
        max_pixels: of all images together.

    Raises:
        UnsupportedParameter: one is not in the request itself.
        BadRequest: one is not an image in a known format, is larger than `MAX_PIXELS`, or exceeds what is left of
            `max_pixels`.
    """
    opened = []
    pixels = 0
    for source in sources:
        image = _opened(source)
        width, height = image.size
        pixels += width * height
        if pixels > max_pixels:
            raise _bad(
                source,
                f"it has {width} x {height} pixels, with which the images of this request have {pixels}; this server "
                f"decodes {max_pixels} (media_max_pixels)",
            )
        opened.append(image)
    return opened


def decode_image(image: Image.Image, source: MediaSource) -> Image.Image:
    """The pixels of an opened image as RGB, turned upright as its EXIF orientation says.

    Raises:
        BadRequest: it cannot be decoded.
    """
    with _readable(source):
        return _upright(image).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _OF_DECODERS:
        return image  # Its EXIF cannot be read; its pixels may be.


def _opened(source: MediaSource) -> Image.Image:
    data = _data(source)
    with _readable(source):
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image, source)
        return image


# What decoders raise about broken files, beside OSError.
_OF_DECODERS = (ValueError, SyntaxError, TypeError, ArithmeticError, LookupError, struct.error, EOFError)


@contextlib.contextmanager
def _readable(source: MediaSource) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except Image.DecompressionBombError:
        raise _bad(source, f"it has more than {MAX_PIXELS} pixels") from None
    except (UnidentifiedImageError, OSError, *_OF_DECODERS) as error:
        raise _bad(source, f"it is not a readable image ({', '.join(_FORMATS)})") from error


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
