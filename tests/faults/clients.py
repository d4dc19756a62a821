"""Clients of the faults: many at once on one loop, each with what it got and when."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlparse

import requests

KEY = "operator"
API = {"api_keys": [KEY], "admin_keys": [KEY]}


@dataclass
class Reply:
    """What one request got.

    Attributes:
        chunks: the data of server-sent events, `[DONE]` included.
        first: seconds to the first event with text; None without one.
        seconds: to the end of the answer, or to when the client left.
        ended: when that was, by `time.monotonic()`.
        complete: the body ended as HTTP says it should.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    chunks: list[str] = field(default_factory=list)
    first: float | None = None
    seconds: float = 0.0
    ended: float = 0.0
    complete: bool = False

    @property
    def text(self) -> str:
        """The answer's text, streamed or not."""
        if not self.chunks:
            return str(json.loads(self.body)["choices"][0]["message"]["content"])
        events = [json.loads(chunk) for chunk in self.chunks if chunk != "[DONE]"]
        return "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e.get("choices"))

    @property
    def json(self) -> dict[str, Any]:
        """The body of an answer that is not a stream."""
        return dict(json.loads(self.body))

    @property
    def error(self) -> dict[str, Any] | None:
        """The error, in the body or as an event."""
        for source in [*self.chunks, self.body.decode(errors="replace")]:
            if source.startswith("{") and "error" in (value := json.loads(source)):
                return dict(value["error"])
        return None


async def ask(
    url: str,
    model: str,
    text: str = "hi",
    *,
    leave_after: int | None = None,
    on_first: asyncio.Event | None = None,
    headers: dict[str, str] | None = None,
    path: str = "/v1/chat/completions",
    **fields: Any,
) -> Reply:
    """One request over a connection of its own.

    Args:
        leave_after: number of events after which the connection is closed.
        on_first: set when the first event with text is there.
        fields: of the request, besides model, messages and temperature 0.
    """
    target = urlparse(url)
    assert target.hostname
    reply, began = Reply(), time.monotonic()
    reader, writer = await asyncio.open_connection(target.hostname, target.port, limit=2**24)
    try:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        data = json.dumps(body).encode()
        sent = {
            "Host": target.netloc,
            "Authorization": f"Bearer {KEY}",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
        }
        lines = [f"POST {target.path}{path} HTTP/1.1", *(f"{k}: {v}" for k, v in {**sent, **(headers or {})}.items())]
        writer.write("\r\n".join([*lines, "Connection: close", "", ""]).encode() + data)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        reply.status = int(head[0].split()[1])
        reply.headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:]) if k}
        async for part in _body(reader, reply):
            reply.body += part
            if reply.headers.get("content-type", "").startswith("text/event-stream"):
                _events(reply, began, on_first)
                if leave_after is not None and len(reply.chunks) >= leave_after:
                    return reply
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        reply.ended = time.monotonic()
        reply.seconds = reply.ended - began
        writer.close()
    return reply


async def read_stream(url: str, model: str, text: str, pause: float = 0.0) -> None:
    """Read a stream of 2,000 tokens and forget it.

    Args:
        pause: seconds after every byte; the few that this side's socket holds are read one by one, the rest waits at
            the server.
    """
    target, loop = urlparse(url), asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await loop.sock_connect(connection, (str(target.hostname), int(target.port or 80)))
        message = {"role": "user", "content": text}
        data = json.dumps({"model": model, "messages": [message], "stream": True, "max_tokens": 2000}).encode()
        head = (
            f"POST {target.path}/v1/chat/completions HTTP/1.1\r\nHost: {target.netloc}\r\nAuthorization: Bearer {KEY}"
            f"\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        await loop.sock_sendall(connection, head.encode() + data)
        while await loop.sock_recv(connection, 1 if pause else 65536):  # noqa: ASYNC110
            await asyncio.sleep(pause)


async def _body(reader: asyncio.StreamReader, reply: Reply) -> Any:
    """The parts of a body, chunked or counted."""
    if "content-length" in reply.headers:
        yield await reader.readexactly(int(reply.headers["content-length"]))
        reply.complete = True
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    reply.complete = True


def _events(reply: Reply, began: float, on_first: asyncio.Event | None) -> None:
    whole = reply.body.rpartition(b"\n\n")[0].decode().split("\n\n")
    reply.chunks = [line.removeprefix("data: ") for line in whole if line.startswith("data: ")]
    if reply.first is None and any('"content":"' in c and '"content":""' not in c for c in reply.chunks):
        reply.first = time.monotonic() - began
        if on_first is not None:
            on_first.set()


def p(share: float, values: list[float]) -> float:
    """A quantile."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def replicas(url: str) -> list[dict[str, Any]]:
    """What every replica says of itself."""
    answer = requests.get(f"{url}/v1/admin/replicas", headers={"Authorization": f"Bearer {KEY}"}, timeout=10)
    return list(answer.json()["data"])


def total(url: str, name: str) -> int:
    """A counter over all replicas."""
    return sum(int(replica[name]) for replica in replicas(url))


async def until(true: Any, seconds: float) -> float:
    """Seconds until `true()` was; more than `seconds` if it never was."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        if await asyncio.to_thread(true):
            break
        await asyncio.sleep(0.02)
    return time.monotonic() - began
