"""One medium by its URL: an HTTP GET to addresses that were checked, within one deadline.

Every address a name resolves to is checked before anything connects to it, the connection goes to the checked address,
and a redirect is checked like the URL that led to it; so no request can make the server call its own network.

Fetches run in an event loop of their own, and look-ups of names in threads of their own: however slow the other side
is, nothing else of the server waits for it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import h11

from deployments.config.api import ApiOptions
from deployments.host.worker import LoopThread, Workers

_REDIRECTS = (301, 302, 303, 307, 308)
_MAX_REDIRECTS = 3
_CHUNK = 64 * 1024
_CONTENT_TYPE = re.compile(r"[\w.+-]+/[\w.+-]+")
# Networks that carry addresses of other networks inside theirs, and some that Python takes for public: translated and
# compatible IPv4 addresses, NAT64, 6to4 with its relays, Teredo, old site-local ones, documentation, segment routing.
# https://www.iana.org/assignments/iana-ipv6-special-registry
_CLOSED = [
    ipaddress.ip_network(network)
    for network in (
        *("::/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "192.88.99.0/24", "2001::/32"),
        *("fec0::/10", "3fff::/20", "5f00::/16"),
    )
]

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_LOOP = LoopThread("media")
_LOOKUPS = Workers("media-names", 32)


class FetchRefused(Exception):
    """Why a URL's content is not to be had, for the client."""


@dataclass(slots=True)
class Allowance:
    """Bytes that the URLs of one request may still bring, together."""

    left: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a URL should hold.

    Attributes:
        name: for people.
        types: prefixes of the content types it may have.
        allowance: of the request.
    """

    name: str
    types: tuple[str, ...]
    allowance: Allowance


async def fetch(url: str, wanted: Wanted, options: ApiOptions) -> str:
    """The data: URI of what a URL gives, `media_timeout_s` after the call at the latest.

    Raises:
        FetchRefused: it cannot be fetched in time, must not be, or holds something else.
    """
    return await _LOOP.run(lambda: _fetch_in_time(url, wanted, options))


async def _fetch_in_time(url: str, wanted: Wanted, options: ApiOptions) -> str:
    try:
        async with asyncio.timeout(options.media_timeout_s):
            return await _follow(url, wanted, options)
    except TimeoutError:
        raise FetchRefused(f"{url[:200]} takes longer than {options.media_timeout_s:g} s (media_timeout_s)") from None
    except (OSError, h11.ProtocolError, ValueError) as error:
        raise FetchRefused(f"{url[:200]} cannot be fetched ({type(error).__name__}: {str(error)[:200]})") from None


async def _follow(url: str, wanted: Wanted, options: ApiOptions) -> str:
    begun = url
    for _ in range(_MAX_REDIRECTS + 1):
        target = urlsplit(url)
        if target.scheme not in ("http", "https") or not target.hostname or target.username or target.password:
            raise FetchRefused(f"{url[:200]} is not a plain http or https URL")
        async with _connection(target, options) as (reader, writer):
            answer = _Answer(reader, wanted, options)
            writer.write(answer.ask(target))
            location = await answer.begin(url)
            if location is None:
                return await answer.read()
        url = urljoin(url, location)
    raise FetchRefused(f"{begun[:200]} redirects more than {_MAX_REDIRECTS} times")


class _Answer:
    """What a server says to one request."""

    def __init__(self, reader: asyncio.StreamReader, wanted: Wanted, options: ApiOptions) -> None:
        self._reader = reader
        self._wanted = wanted
        self._options = options
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_CHUNK)
        self._type = ""

    def ask(self, target: SplitResult) -> bytes:
        """The bytes of the request."""
        path = quote((target.path or "/") + (f"?{target.query}" if target.query else ""), safe="%/:=&?~+!$,;'@()*[]|")
        headers = [
            ("Host", _authority(target)),
            ("User-Agent", "troupe"),
            ("Accept", self._wanted.types[0] + "*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = self._http.send(h11.Request(method="GET", target=path, headers=headers))
        return (request or b"") + (self._http.send(h11.EndOfMessage()) or b"")

    async def begin(self, url: str) -> str | None:
        """Where the server redirects to; None if its answer has what is wanted."""
        while not isinstance(event := await self._next(), h11.Response):
            pass
        headers = {name: _text(value) for name, value in event.headers}
        if event.status_code in _REDIRECTS and headers.get(b"location"):
            return headers[b"location"]
        if event.status_code != 200:
            raise FetchRefused(f"{url[:200]} answers with status {event.status_code}")
        self._type = headers.get(b"content-type", "text/plain").partition(";")[0].strip().lower()
        if not self._type.startswith(self._wanted.types) or not _CONTENT_TYPE.fullmatch(self._type):
            raise FetchRefused(f"{url[:200]} is of type {self._type[:100]}, no {self._wanted.name}")
        declared = headers.get(b"content-length", "")
        self._check_size(int(declared) if declared.isdecimal() else 0)
        return None

    async def read(self) -> str:
        """The body as a data: URI."""
        body = bytearray()
        while isinstance(event := await self._next(), h11.Data):
            body += event.data
            self._wanted.allowance.left -= len(event.data)
            self._check_size(len(body))
        return f"data:{self._type};base64,{base64.b64encode(body).decode('ascii')}"

    async def _next(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(_CHUNK))
        if not isinstance(event, h11.Event):
            raise FetchRefused("the server ends the connection")
        return event

    def _check_size(self, size: int) -> None:
        if size > self._options.media_max_bytes:
            raise FetchRefused(f"it is larger than {self._options.media_max_bytes} bytes (media_max_bytes)")
        if self._wanted.allowance.left < 0:
            raise FetchRefused(
                "with it the media that this request names by URL have more than "
                f"{self._options.max_body_bytes} bytes together (max_body_bytes)"
            )


@contextlib.asynccontextmanager
async def _connection(
    target: SplitResult, options: ApiOptions
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to an address that was checked, under the name that was asked for."""
    secure = target.scheme == "https"
    host = target.hostname or ""
    port = target.port or (443 if secure else 80)
    tls = {"ssl": _tls(), "server_hostname": _ascii(host)} if secure else {}
    failure: OSError | None = None
    for address in await _checked_addresses(host, port, options):
        try:
            reader, writer = await asyncio.open_connection(str(address), port, **tls)  # type: ignore[arg-type]
        except OSError as error:
            failure = error
            continue
        try:
            yield reader, writer
        finally:
            writer.transport.abort()
        return
    assert failure is not None
    raise failure


async def _checked_addresses(host: str, port: int, options: ApiOptions) -> list[_Address]:
    """The addresses of a host, looked up once; each may be connected to."""
    try:
        addresses = [ipaddress.ip_address(host)]
    except ValueError:
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.wrap_future(_LOOKUPS.submit(look_up))
        addresses = list(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in found))
    if not addresses or not all(is_allowed(address, options) for address in addresses):
        raise FetchRefused(f"the host {host[:200]} is not on the public internet")
    return addresses


def is_allowed(address: _Address, options: ApiOptions) -> bool:
    """Whether the server may connect to an address: a public one, or one in `media_networks`."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if any(address in ipaddress.ip_network(network) for network in options.media_networks):
        return True
    return address.is_global and not address.is_multicast and not any(address in network for network in _CLOSED)


def _authority(target: SplitResult) -> str:
    host = target.hostname or ""
    host = f"[{host}]" if ":" in host else _ascii(host)
    return host if target.port is None else f"{host}:{target.port}"


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _ascii(host: str) -> str:
    return host if host.isascii() else host.encode("idna").decode("ascii")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
