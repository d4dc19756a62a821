"""URLs whose other side is slow: each step is within one deadline, and nothing else of the server waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.config.api import ApiOptions
from deployments.core.errors import BadRequest
from tests.openai.chat.test_media_urls import PIXEL, inlined
from tests.openai.conftest import Server

Serve = Callable[..., Server]
LOCAL = {"media_urls": True, "media_networks": ["127.0.0.0/8", "::1/128"]}
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n"


class Peer:
    """A server on a socket: one handler for each connection, until `over` is set."""

    def __init__(self, handle: Callable[[socket.socket, Peer], None], host: str = "127.0.0.1") -> None:
        self.over = threading.Event()
        self.connections = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self._handle = handle
        self._socket = socket.create_server((host, 0), backlog=512)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://{host}:{self.port}/x.png"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self.connections.release()
        with connection, contextlib.suppress(OSError):
            self._handle(connection, self)
        self.ended.release()

    def close(self) -> None:
        self.over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def drip(connection: socket.socket, peer: Peer, data: bytes) -> None:
    """A byte at a time, for ever the last one."""
    for byte in data:
        connection.sendall(bytes([byte]))
        if peer.over.wait(0.02):
            return
    while not peer.over.wait(0.02):
        connection.sendall(data[-1:])


def silent(connection: socket.socket, peer: Peer) -> None:
    while connection.recv(4096) and not peer.over.is_set():
        pass


def slow_head(connection: socket.socket, peer: Peer) -> None:
    drip(connection, peer, HEAD + b"x-more: a")


def slow_body(connection: socket.socket, peer: Peer) -> None:
    drip(connection, peer, HEAD + b"\r\na")


def slow_chunks(connection: socket.socket, peer: Peer) -> None:
    connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
    drip(connection, peer, b"1;extension")


def slow_promises(connection: socket.socket, peer: Peer) -> None:
    while not peer.over.wait(0.02):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")


class Peers:
    """Starts them, and ends them with the test."""

    def __init__(self) -> None:
        self._started: list[Peer] = []

    def __call__(self, handle: Callable[[socket.socket, Peer], None], host: str = "127.0.0.1") -> Peer:
        self._started.append(Peer(handle, host))
        return self._started[-1]

    def close(self) -> None:
        for each in self._started:
            each.close()


@pytest.fixture
def peer() -> Iterator[Peers]:
    peers = Peers()
    yield peers
    peers.close()


def conversation(*urls: str) -> list[Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": parts}]


def refusal(url: str, **options: Any) -> BadRequest:
    given = ApiOptions.model_validate({**LOCAL, "media_timeout_s": 0.5, **options})
    with pytest.raises(BadRequest) as caught:
        asyncio.run(asyncio.wait_for(inlined(conversation(url), given), 60))
    assert caught.value.param == "messages[0].content[0]"
    return caught.value


@pytest.mark.parametrize("handle", [silent, slow_head, slow_body, slow_chunks, slow_promises])
def test_what_drips_ends_at_the_deadline(peer: Peers, handle: Callable[[socket.socket, Peer], None]) -> None:
    server = peer(handle)
    assert "media_timeout_s" in refusal(server.url).message
    assert server.ended.acquire(timeout=30), "the connection is closed"


def test_a_handshake_of_tls_that_does_not_end(peer: Peers) -> None:
    server = peer(silent)
    assert "media_timeout_s" in refusal(server.url.replace("http:", "https:")).message
    assert server.ended.acquire(timeout=30), "the connection is closed"


def test_redirects_share_the_deadline(peer: Peers) -> None:
    def slow(connection: socket.socket, peer: Peer) -> None:
        connection.recv(4096)
        if not peer.over.wait(0.3):
            connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {peer.url}\r\n\r\n".encode())

    assert "media_timeout_s" in refusal(peer(slow).url).message


def test_a_connection_that_is_not_taken(peer: Peers) -> None:
    """The queue of a listener that never accepts is full, so the handshake of TCP does not end."""
    with socket.socket() as listener, contextlib.ExitStack() as held:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        assert "media_timeout_s" in refusal(f"http://127.0.0.1:{listener.getsockname()[1]}/x.png").message


class Names:
    """In place of the system's resolver: names of `.test`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.threads: set[str] = set()
        self.answers: dict[str, list[str]] = {}
        self.over = threading.Event()
        self._system = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if not str(host).endswith(".test"):
            return self._system(host, port, *args, **kwargs)
        self.asked.append(host)
        self.threads.add(threading.current_thread().name)
        if host.startswith("hangs"):
            self.over.wait()
            raise OSError("no answer")
        answers = self.answers[host]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    found = Names()
    monkeypatch.setattr(socket, "getaddrinfo", found)
    yield found
    found.over.set()


def answer_pixel(connection: socket.socket, peer: Peer) -> None:
    connection.recv(4096)
    connection.sendall(HEAD + f"Content-Length: {len(PIXEL)}\r\n\r\n".encode() + PIXEL)


def test_a_name_that_is_never_found(names: Names, peer: Peers) -> None:
    assert "media_timeout_s" in refusal("http://hangs.test/x.png").message
    assert "media_timeout_s" in refusal("https://hangs.test/x.png").message
    names.answers["good.test"] = ["127.0.0.1"]
    url = f"http://good.test:{peer(answer_pixel).port}/x.png"
    (message,) = asyncio.run(inlined(conversation(url), ApiOptions.model_validate(LOCAL)))
    assert message["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert not any(name.startswith(("asyncio_", "MainThread")) for name in names.threads)


def test_the_address_that_was_checked_is_the_one_connected_to(names: Names, peer: Peers) -> None:
    """A name that leads to the server's own network when it is asked for the second time."""
    server = peer(answer_pixel)
    names.answers["rebinding.test"] = ["192.0.2.1", "127.0.0.1"]
    url = f"http://rebinding.test:{server.port}/x.png"
    options = {"media_networks": ["192.0.2.0/24"]}
    assert "cannot be fetched" in (why := refusal(url, **options).message) or "media_timeout_s" in why
    assert names.asked == ["rebinding.test"]
    assert "not on the public internet" in refusal(url, **options).message
    assert not server.connections.acquire(blocking=False)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "64:ff9b::a00:1", "2002:7f00::"]
)
def test_a_name_of_the_own_network(names: Names, address: str) -> None:
    names.answers["inner.test"] = [address]
    assert "not on the public internet" in refusal("http://inner.test/x.png", media_networks=[]).message


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "[::ffff:127.0.0.1]", "inner.test", "[64:ff9b::7f00:1]", "2130706433"]
)
def test_a_redirect_into_the_own_network(names: Names, peer: Peers, address: str) -> None:
    """Its first server is the only one that is allowed."""
    names.answers["inner.test"] = ["127.0.0.1"]
    inner = peer(answer_pixel)

    def redirect(connection: socket.socket, peer: Peer) -> None:
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 307 x\r\nLocation: http://{address}:{inner.port}/x.png\r\n\r\n".encode())

    names.answers["outer.test"] = ["127.0.0.2"]
    outer = peer(redirect, "127.0.0.2")
    url = f"http://outer.test:{outer.port}/x.png"
    assert "not on the public internet" in refusal(url, media_networks=["127.0.0.2/32"]).message
    assert not inner.connections.acquire(blocking=False)


def test_other_schemes_and_broken_places_of_redirects(peer: Peers) -> None:
    for place in ("file:///etc/passwd", "gopher://127.0.0.1/", "http://[", "//user:word@127.0.0.1/", "http:///x"):

        def redirect(connection: socket.socket, peer: Peer, place: str = place) -> None:
            connection.recv(4096)
            connection.sendall(f"HTTP/1.1 302 x\r\nLocation: {place}\r\n\r\n".encode())

        assert refusal(peer(redirect).url).code == "invalid_image_url"


def test_a_request_names_so_many_and_so_much(peer: Peers) -> None:
    urls = [peer(answer_pixel).url] * 4
    options = ApiOptions.model_validate({**LOCAL, "media_max_parts": 3})
    with pytest.raises(BadRequest, match=r"names 4 images.*media_max_parts") as caught:
        asyncio.run(inlined(conversation(*urls), options))
    assert caught.value.param == "messages[0].content[3]"

    def large(connection: socket.socket, peer: Peer) -> None:
        connection.recv(4096)
        connection.sendall(HEAD + b"Content-Length: 600\r\n\r\n" + bytes(600))

    urls = [peer(large).url] * 2
    options = ApiOptions.model_validate({**LOCAL, "max_body_bytes": 1024})
    with pytest.raises(BadRequest, match="max_body_bytes"):
        asyncio.run(inlined(conversation(*urls), options))
    assert asyncio.run(inlined(conversation(urls[0]), options))


def test_a_declared_size_is_refused_before_the_body(peer: Peers) -> None:
    def declares(connection: socket.socket, peer: Peer) -> None:
        connection.recv(4096)
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
        peer.over.wait()

    assert "media_max_bytes" in refusal(peer(declares).url, media_timeout_s=60).message


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    file = tmp_path / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=good.test", "-days", "2"]
    with contextlib.suppress(FileNotFoundError):
        subprocess.run(
            [
                *command,
                "-addext",
                "subjectAltName=DNS:good.test",
                "-keyout",
                str(file),
                "-out",
                str(tmp_path / "c.pem"),
            ],
            check=True,
            capture_output=True,
        )
        file.write_text(file.read_text() + (tmp_path / "c.pem").read_text())
        return file
    pytest.skip("needs openssl")


def test_the_certificate_is_that_of_the_name(names: Names, peer: Peers, certificate: Path) -> None:
    """Although the connection goes to an address; one that nobody vouches for is refused."""
    heard: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _socket, name, _context: heard.append(name)

    def secure(connection: socket.socket, peer: Peer) -> None:
        with context.wrap_socket(connection, server_side=True) as encrypted:
            answer_pixel(encrypted, peer)

    names.answers["good.test"] = ["127.0.0.1"]
    url = f"https://good.test:{peer(secure).port}/x.png"
    assert "CERTIFICATE_VERIFY_FAILED" in refusal(url, media_timeout_s=30).message
    assert heard == ["good.test"]


def test_large_bodies_do_not_wait_for_slow_urls(serve: Serve, peer: Peers, names: Names) -> None:
    """Many more slow URLs and names than any executor of asyncio has threads."""
    model = {"id": "any", "loader": "tests.openai.scripted:load_model"}
    server = serve([model], media_timeout_s=20, **LOCAL)
    slow = peer(silent)
    urls = [slow.url] * 40 + ["http://hangs.test/x.png"] * 24
    answers: list[int] = []

    def ask(messages: list[Any]) -> requests.Response:
        body = json.dumps({"model": "any", "messages": messages, "max_tokens": 1})
        headers = {"content-type": "application/json"}
        return requests.post(server.url + "/v1/chat/completions/render", data=body, headers=headers, timeout=60)

    asking = [
        threading.Thread(target=lambda: answers.append(ask(conversation(*urls)).status_code), daemon=True)
        for _ in range(3)
    ]
    for each in asking:
        each.start()
    for _ in range(40 * len(asking)):
        assert slow.connections.acquire(timeout=30)
    text = "a" * 1000 + "\n"
    for _ in range(3):
        answer = ask([{"role": "user", "content": "long"}, {"role": "assistant", "content": text}] * 300)
        assert answer.status_code == 200, answer.text[:300]
    good = peer(answer_pixel).url
    assert "takes no images" in ask(conversation(good)).json()["error"]["message"]
    assert answers == []
    slow.close()
    names.over.set()
    for each in asking:
        each.join(60)
    assert answers == [400] * len(asking)
