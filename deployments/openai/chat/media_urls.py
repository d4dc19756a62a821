"""Media that a message names by URL: fetched where the server allows it, and put into the message as a data: URI."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from deployments.config.api import ApiOptions
from deployments.core.errors import BadRequest
from deployments.openai.chat.messages import Media, Message
from deployments.openai.http.fetch import Allowance, FetchRefused, Wanted, fetch
from deployments.openai.http.fetch import is_allowed as is_allowed


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a URL should hold.

    Attributes:
        name: for people.
        types: prefixes of the content types it may have.
        part: type and field of the part that the data: URI goes into.
        code: of the error where it cannot be had.
    """

    name: str
    types: tuple[str, ...]
    part: str
    code: str


_IMAGE = _Kind("image", ("image/",), "image_url", "invalid_image_url")
_AUDIO = _Kind("recording", ("audio/", "application/ogg"), "audio_url", "invalid_audio")
# The part's type, the field of its URL.
_PARTS = {
    "image_url": ("image_url", _IMAGE),
    "input_image": ("image_url", _IMAGE),
    "image": ("url", _IMAGE),
    "audio_url": ("audio_url", _AUDIO),
    "audio": ("url", _AUDIO),
}


@dataclass(frozen=True, slots=True)
class _Named:
    """A URL, where the request has it, and what it should hold."""

    place: str
    part: Message
    url: str
    kind: _Kind

    async def data(self, allowance: Allowance, options: ApiOptions) -> str:
        """The data: URI of what it gives.

        Raises:
            BadRequest: it cannot be fetched.
        """
        try:
            return await fetch(self.url, Wanted(self.kind.name, self.kind.types, allowance), options)
        except FetchRefused as why:
            raise BadRequest(f"Invalid '{self.place}': {why}.", param=self.place, code=self.kind.code) from None


async def inline_media(media: Media, options: ApiOptions) -> None:
    """Replace every http(s) URL of an image or recording by its data, in the parts themselves, if that is allowed.

    Raises:
        BadRequest: a URL cannot be fetched, must not be, or holds something else; or there are too many.
    """
    if not options.media_urls:
        return
    named = list(_named(media))
    if len(named) > options.media_max_parts:
        place = named[options.media_max_parts].place
        raise BadRequest(
            f"Invalid '{place}': the request names {len(named)} images and recordings by URL; this server reads at "
            f"most {options.media_max_parts} (media_max_parts).",
            param=place,
        )
    for each, uri in zip(named, await _fetched(named, options), strict=True):
        each.part.clear()
        each.part.update({"type": each.kind.part, each.kind.part: {"url": uri}})


async def _fetched(named: list[_Named], options: ApiOptions) -> list[str]:
    """What each URL gives; once one of them fails, the others are not waited for."""
    # As much as the request could hold itself.
    allowance = Allowance(options.max_body_bytes)
    tasks = [asyncio.ensure_future(each.data(allowance, options)) for each in named]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _named(media: Media) -> Iterator[_Named]:
    """The parts that an http(s) URL stands in."""
    for place, part in media:
        if part["type"] not in _PARTS:
            continue
        field, kind = _PARTS[part["type"]]
        given = part.get(field)
        url = given.get("url") if isinstance(given, dict) else given
        if isinstance(url, str) and url.lower().startswith(("http://", "https://")):
            yield _Named(place, part, url, kind)
