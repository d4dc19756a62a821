"""Media that a message names by URL: fetched where the server allows it, and put into the message as a data: URI.

Every address a name resolves to is checked before anything connects to it, the connection goes to the checked address,
and a redirect is checked like the URL that led to it; so no request can make the server call its own network.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

from deployments.errors import BadRequest
from deployments.openai.options import ApiOptions

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_MAX_URLS = 64
_CHUNK = 64 * 1024
# Networks that carry addresses of other networks inside theirs, and some that Python takes for public: translated and
# compatible IPv4 addresses, NAT64, 6to4 with its relays, Teredo, old site-local ones, documentation, segment routing.
# https://www.iana.org/assignments/iana-ipv6-special-registry
_CLOSED = tuple(
    map(
        ipaddress.ip_network,
        (
            "::/96",
            "::ffff:0:0:0/96",
            "64:ff9b::/96",
            "64:ff9b:1::/48",
            "2002::/16",
            "192.88.99.0/24",
            "2001::/32",
            "fec0::/10",
            "3fff::/20",
            "5f00::/16",
        ),
    )
)

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


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
class _Wanted:
    """A URL, where the request has it, and what it should hold."""

    place: str
    url: str
    kind: _Kind

    def refuse(self, why: str) -> NoReturn:
        raise BadRequest(f"Invalid '{self.place}': {why}.", param=self.place, code=self.kind.code)


async def inline_media(messages: list[Any], options: ApiOptions) -> list[Any]:
    """The messages with every http(s) URL of an image or recording replaced by its data; unchanged where not allowed.

    Raises:
        BadRequest: a URL cannot be fetched, must not be, or holds something else.
    """
    if not options.media_urls:
        return messages
    wanted = list(_wanted(messages))
    if len(wanted) > _MAX_URLS:
        raise BadRequest(f"Invalid 'messages': at most {_MAX_URLS} URLs; got {len(wanted)}.", param="messages")
    found = await asyncio.gather(*(asyncio.to_thread(_fetch, each, options) for each in wanted))
    data = {
        each.place: {"type": each.kind.part, each.kind.part: {"url": uri}}
        for each, uri in zip(wanted, found, strict=True)
    }
    return [_replaced(message, index, data) for index, message in enumerate(messages)] if data else messages


def _wanted(messages: list[Any]) -> Iterator[_Wanted]:
    """The http(s) URLs of the messages."""
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(content if isinstance(content, list) else ()):
            if not isinstance(part, dict) or part.get("type") not in _PARTS:
                continue
            field, kind = _PARTS[part["type"]]
            given = part.get(field)
            url = given.get("url") if isinstance(given, dict) else given
            if isinstance(url, str) and url.lower().startswith(("http://", "https://")):
                yield _Wanted(f"messages[{index}].content[{number}]", url, kind)


def _replaced(message: Any, index: int, data: dict[str, Any]) -> Any:
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return message
    parts = [data.get(f"messages[{index}].content[{number}]", part) for number, part in enumerate(content)]
    return {**message, "content": parts}


def _fetch(wanted: _Wanted, options: ApiOptions) -> str:
    """The data: URI of what a URL gives. Blocks."""
    url = wanted.url
    deadline, redirects = time.monotonic() + options.media_timeout_s, 0
    while redirects <= _MAX_REDIRECTS:
        try:
            answer = _request(url, wanted, options, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            wanted.refuse(f"{url[:200]} cannot be fetched ({type(error).__name__}: {str(error)[:200]})")
        if isinstance(answer, bytes):
            return answer.decode("ascii")
        url, redirects = urljoin(url, answer), redirects + 1
    return wanted.refuse(f"{url[:200]} redirects more than {_MAX_REDIRECTS} times")


def _request(url: str, wanted: _Wanted, options: ApiOptions, deadline: float) -> bytes | str:
    """One request: the data: URI, or where it redirects to."""
    target = urlsplit(url)
    if target.scheme not in ("http", "https") or not target.hostname or target.username or target.password:
        wanted.refuse(f"{url[:200]} is no plain http or https URL")
    connection = _connection(target, wanted, options, deadline)
    try:
        path = (target.path or "/") + (f"?{target.query}" if target.query else "")
        connection.request("GET", path, headers={"Accept": wanted.kind.types[0] + "*", "User-Agent": "troupe"})
        with contextlib.closing(connection.getresponse()) as response:
            location = response.headers.get("location")
            if response.status in _REDIRECTS and location:
                return str(location)
            if response.status != 200:
                wanted.refuse(f"{url[:200]} answers with status {response.status}")
            kind = response.headers.get_content_type()
            if not kind.startswith(wanted.kind.types):
                wanted.refuse(f"{url[:200]} is of type {kind[:100]}, no {wanted.kind.name}")
            body = _read(response, wanted, options, deadline)
            return b"data:" + kind.encode("ascii") + b";base64," + base64.b64encode(body)
    finally:
        connection.close()


def _read(response: http.client.HTTPResponse, wanted: _Wanted, options: ApiOptions, deadline: float) -> bytes:
    body = bytearray()
    while chunk := response.read1(_CHUNK):
        body += chunk
        if len(body) > options.media_max_bytes:
            wanted.refuse(f"it is larger than {options.media_max_bytes} bytes (media_max_bytes)")
        if time.monotonic() > deadline:
            wanted.refuse(f"it takes longer than {options.media_timeout_s:g} s (media_timeout_s)")
    return bytes(body)


def _connection(
    target: SplitResult, wanted: _Wanted, options: ApiOptions, deadline: float
) -> http.client.HTTPConnection:
    """A connection to an address that was checked, under the name that was asked for."""
    secure = target.scheme == "https"
    port = target.port or (443 if secure else 80)
    host = target.hostname or ""
    timeout = deadline - time.monotonic()
    if timeout <= 0:
        wanted.refuse(f"it takes longer than {options.media_timeout_s:g} s (media_timeout_s)")
    address = _checked_address(host, port, wanted, options)
    connection = http.client.HTTPConnection(host, port, timeout=timeout)
    plain = socket.create_connection((str(address), port), timeout=timeout)
    try:
        connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
    except BaseException:
        plain.close()
        raise
    return connection


def _checked_address(host: str, port: int, wanted: _Wanted, options: ApiOptions) -> _Address:
    found = [ipaddress.ip_address(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not found or not all(is_allowed(address, options) for address in found):
        wanted.refuse(f"the host {host[:200]} is not on the public internet")
    return found[0]


def is_allowed(address: _Address, options: ApiOptions) -> bool:
    """Whether the server may connect to an address: a public one, or one in `media_networks`."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in ipaddress.ip_network(network) for network in options.media_networks):
        return True
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOSED)
