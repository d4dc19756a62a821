"""Images by URL: fetched only where allowed, and never from the server's own network."""

from __future__ import annotations

import base64
import ipaddress
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import ValidationError

from deployments.config.api import ApiOptions
from deployments.core.errors import BadRequest
from deployments.openai.chat.media_urls import inline_media, is_allowed
from deployments.openai.chat.messages import read_messages

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Images(BaseHTTPRequestHandler):
    """A web server that behaves as its paths say."""

    def do_GET(self) -> None:
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/redirect/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/redirect/"))
            self.end_headers()
            return
        status = 404 if self.path == "/missing" else 200
        self.send_response(status)
        types = {"/page": "text/html", "/sound.wav": "audio/x-wav"}
        self.send_header("Content-Type", types.get(self.path, "image/png"))
        self.end_headers()
        if self.path == "/endless":
            while True:
                self.wfile.write(b"x" * 65536)
        if self.path == "/slow":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.1)
        self.wfile.write(PIXEL)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture(scope="module")
def web() -> Iterator[Quiet]:
    server = Quiet(("127.0.0.1", 0), Images)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


OPEN = ApiOptions(
    media_urls=True, media_networks=("127.0.0.0/8", "::1/128"), media_max_bytes=100_000, media_timeout_s=0.5
)


def message(url: str) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


async def inlined(messages: list[Any], options: ApiOptions) -> list[Any]:
    """The messages with the data of what they name by URL."""
    read, media = read_messages(messages)
    await inline_media(media, options)
    return read


async def fetched(url: str, options: ApiOptions = OPEN) -> str:
    (found,) = await inlined(message(url), options)
    return str(found["content"][0]["image_url"]["url"])


def address(web: Quiet, path: str, host: str = "127.0.0.1") -> str:
    return f"http://{host}:{web.server_port}{path}"


def run(work: Any) -> Any:
    import asyncio

    return asyncio.run(work)


def test_an_image_becomes_data(web: Quiet) -> None:
    expected = "data:image/png;base64," + base64.b64encode(PIXEL).decode()
    assert run(fetched(address(web, "/pixel.png"))) == expected
    assert run(fetched(address(web, "/pixel.png", host="localhost"))) == expected
    assert run(fetched(address(web, "/redirect/" + address(web, "/pixel.png")))) == expected
    assert run(fetched(address(web, "/redirect//pixel.png"))) == expected


def test_other_shapes_of_parts(web: Quiet) -> None:
    url = address(web, "/pixel.png")
    parts = [
        {"type": "text", "text": "see"},
        {"type": "input_image", "image_url": url},
        {"type": "image", "url": url},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    (found,) = run(inlined([{"role": "user", "content": parts}], OPEN))
    kinds = [part.get("image_url", {}).get("url", "")[:5] for part in found["content"]]
    assert kinds == ["", "data:", "data:", "data:"]
    assert found["content"][0] == parts[0]
    assert found["content"][3] == parts[3]


def test_a_recording_becomes_data(web: Quiet) -> None:
    url = address(web, "/sound.wav")
    parts = [
        {"type": "audio_url", "audio_url": {"url": url}},
        {"type": "audio", "url": url},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    (found,) = run(inlined([{"role": "user", "content": parts}], OPEN))
    data = "data:audio/x-wav;base64," + base64.b64encode(PIXEL).decode()
    assert found["content"] == [{"type": "audio_url", "audio_url": {"url": data}}] * 2 + [parts[2]]


@pytest.mark.parametrize(
    ("kind", "path", "code"),
    [("audio_url", "/pixel.png", "invalid_audio"), ("image_url", "/sound.wav", "invalid_image_url")],
)
def test_a_picture_is_no_recording(web: Quiet, kind: str, path: str, code: str) -> None:
    part = {"type": kind, kind: {"url": address(web, path)}}
    with pytest.raises(BadRequest, match="is of type") as caught:
        run(inlined([{"role": "user", "content": [part]}], OPEN))
    assert caught.value.code == code


def test_nothing_is_fetched_unless_allowed(web: Quiet) -> None:
    before = len(web.seen)  # type: ignore[attr-defined]
    given = message(address(web, "/pixel.png"))
    assert run(inlined(given, ApiOptions())) == given
    assert len(web.seen) == before  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "status 404"),
        ("/page", "text/html"),
        ("/endless", "media_max_bytes"),
        ("/slow", "media_timeout_s"),
        ("/redirect//redirect//redirect//redirect//redirect//pixel.png", "redirects more"),
        ("/redirect/file:///etc/passwd", "not a plain http"),
        ("/redirect/http://169.254.169.254/latest/meta-data", "not on the public internet"),
        ("/redirect/http://10.0.0.1/x.png", "not on the public internet"),
    ],
)
def test_what_is_refused(web: Quiet, path: str, reason: str) -> None:
    begun = time.monotonic()
    with pytest.raises(BadRequest, match=reason) as error:
        run(fetched(address(web, path)))
    assert error.value.param == "messages[0].content[0]"
    assert time.monotonic() - begun < 3


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x.png",
        "http://localhost/x.png",
        "http://2130706433/x.png",
        "http://0x7f.1/x.png",
        "http://0/x.png",
        "http://[::1]/x.png",
        "http://[::ffff:127.0.0.1]/x.png",
        "http://[::ffff:10.0.0.1]/x.png",
        "http://[64:ff9b::7f00:1]/x.png",
        "http://169.254.169.254/latest",
        "http://user:password@example.com/x.png",
        "http:///x.png",
        "http://host.invalid/x.png",
        "http://example.com:99999/x.png",
        "http://" + "a" * 300 + "/x.png",
    ],
)
def test_the_own_network_is_out_of_reach(url: str) -> None:
    with pytest.raises(BadRequest):
        run(fetched(url, ApiOptions(media_urls=True, media_timeout_s=2)))


@pytest.mark.parametrize(
    "url",
    [
        *("10.1.2.3", "192.168.0.1", "100.64.0.1", "224.0.0.1", "192.88.99.1", "127.0.0.1", "0.0.0.0", "169.254.1.1"),
        *("fe80::1", "fd00::1", "2002:7f00:1::", "::1", "::", "::127.0.0.1", "::93.184.215.14", "::ffff:127.0.0.1"),
        *(
            "::ffff:0:127.0.0.1",
            "::ffff:0:93.184.215.14",
            "64:ff9b::7f00:1",
            "fec0::1",
            "fecf::1",
            "3fff::1",
            "5f00::1",
        ),
    ],
)
def test_addresses(url: str) -> None:
    assert not is_allowed(ipaddress.ip_address(url), ApiOptions())
    assert is_allowed(ipaddress.ip_address("93.184.215.14"), ApiOptions())
    assert is_allowed(ipaddress.ip_address("10.1.2.3"), ApiOptions(media_networks=("10.0.0.0/8",)))


def test_networks_are_checked_at_start() -> None:
    with pytest.raises(ValidationError):
        ApiOptions(media_networks=("home",))
