"""The client of `troupe bench`, a process of its own: `python -m deployments.cli.bench.client` reads a job as JSON from
stdin and writes what it has measured as JSON to stdout."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from deployments.cli.bench.workloads import WORKLOADS, Workload, long_message, messages, picture, texts

_LONG_SEED = 1 << 30
_SCORED = 2
"""Tokens of a text at least: the first one has no log-probability."""
Message = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of a workload.

    Attributes:
        url: of an OpenAI API, with `/v1`.
        models: the conversations take turns through them.
        concurrency: conversations at a time.
        conversations: how many there are in all.
        seed: of the prompts.
        timeout_s: of an answer's next bytes.
    """

    url: str
    models: Sequence[str]
    workload: str
    concurrency: int
    conversations: int
    seed: int
    key: str = ""
    timeout_s: float = 600.0


@dataclass(slots=True)
class Asked:
    """One request, in seconds.

    Attributes:
        first: until the first piece of text, or the answer of a request without a stream.
        gaps: between two pieces.
        tokens: of the answer, as the server counts them, or else its pieces; those of the prompts if they are scored.
        long: it is one of the long prompts beside the conversations.
    """

    first: float = 0.0
    whole: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    long: bool = False
    error: str = ""


class Connection:
    """A connection of one conversation, opened again if the server has closed it."""

    def __init__(self, job: Job, workload: Workload, number: int = 0) -> None:
        parts = urlsplit(job.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=job.timeout_s)
        self._path = parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if job.key:
            self._headers["Authorization"] = f"Bearer {job.key}"
        if workload.reconnects:
            self._headers["Connection"] = "close"
        self._model = job.models[number % len(job.models)]

    def ask(self, history: Sequence[Message], tokens: int) -> tuple[Asked, str]:
        """Send a streamed chat; what was measured, and its text."""
        asked = Asked()
        pieces: list[str] = []
        body = {"messages": history, "max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}}
        with self._timed(asked) as begun:
            last = begun
            for event in self._events(body):
                now = time.perf_counter()
                usage = event.get("usage") or {}
                asked.tokens = usage.get("completion_tokens", asked.tokens)
                asked.prompt_tokens = usage.get("prompt_tokens", asked.prompt_tokens)
                text = _text(event)
                if not text:
                    continue
                if pieces:
                    asked.gaps.append(now - last)
                else:
                    asked.first = now - begun
                pieces.append(text)
                last = now
        asked.tokens = asked.tokens or len(pieces)
        return asked, "".join(pieces)

    def score(self, prompts: Sequence[str]) -> Asked:
        """Ask for the log-probabilities of texts."""
        asked = Asked()
        body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1}
        with self._timed(asked) as begun:
            answer = json.loads(self._response("completions", body).read())
            found = [choice["logprobs"]["token_logprobs"] for choice in answer["choices"]]
            if len(found) != len(prompts) or min(map(len, found)) < _SCORED:
                raise ValueError("the answer does not have the log-probabilities of every text")
            asked.first = time.perf_counter() - begun
            asked.tokens = asked.prompt_tokens = answer["usage"]["prompt_tokens"]
        return asked

    @contextlib.contextmanager
    def _timed(self, asked: Asked) -> Iterator[float]:
        begun = time.perf_counter()
        try:
            yield begun
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            asked.error = f"{type(error).__name__}: {error}"
            self.close()
        asked.whole = time.perf_counter() - begun

    def _sent(self, route: str, text: str) -> http.client.HTTPResponse:
        self._connection.request("POST", f"{self._path}/{route}", text, self._headers)
        return self._connection.getresponse()

    def _response(self, route: str, body: dict[str, Any]) -> http.client.HTTPResponse:
        text = json.dumps({"model": self._model, "temperature": 0, **body})
        is_kept = self._connection.sock is not None
        try:
            response = self._sent(route, text)
        except ConnectionError:
            # The server has closed it since the last answer, whatever it said of keeping it.
            if not is_kept:
                raise
            self.close()
            response = self._sent(route, text)
        if response.status != http.client.OK:
            raise ValueError(f"status {response.status}: {response.read(500).decode(errors='replace')}")
        return response

    def _events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for line in self._response("chat/completions", body):
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"])[:500])
            yield event

    def close(self) -> None:
        self._connection.close()


def _text(event: dict[str, Any]) -> str:
    delta = (event.get("choices") or [{}])[0].get("delta") or {}
    return delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""


def _converse(job: Job, workload: Workload, number: int) -> list[Asked]:
    """A conversation, until its last turn or its first error."""
    seed = job.seed + number
    with contextlib.closing(Connection(job, workload, number)) as connection:
        if workload.scored:
            return [connection.score(texts(workload, seed))]
        return list(_turns(connection, workload, seed))


def _turns(connection: Connection, workload: Workload, seed: int) -> Iterator[Asked]:
    history: list[Message] = []
    for message in messages(workload, seed):
        content: Any = message
        if workload.image and not history:
            shown = {"type": "image_url", "image_url": {"url": picture(workload.image, seed)}}
            content = [shown, {"type": "text", "text": message}]
        history.append({"role": "user", "content": content})
        asked, text = connection.ask(history, workload.tokens)
        yield asked
        if asked.error:
            break
        history.append({"role": "assistant", "content": text})


def _long_prompts(job: Job, workload: Workload, over: threading.Event) -> list[Asked]:
    """Long prompts, one after the other, until the conversations are over."""
    connection = Connection(job, workload)
    found: list[Asked] = []
    while not over.is_set():
        text = long_message(workload, job.seed + _LONG_SEED + len(found))
        asked, _ = connection.ask([{"role": "user", "content": text}], 4)
        asked.long = True
        found.append(asked)
        if asked.error:
            break
    connection.close()
    return found


def run(job: Job) -> dict[str, Any]:
    """Everything that was measured: `seconds` in all, and `requests`."""
    workload = WORKLOADS[job.workload]
    over = threading.Event()
    with ThreadPoolExecutor(job.concurrency + 1) as pool:
        beside = pool.submit(_long_prompts, job, workload, over) if workload.long_words else None
        # A thread of its own is left for the long prompts: no more conversations than `concurrency` run.
        places = threading.Semaphore(job.concurrency)

        def one(number: int) -> list[Asked]:
            with places:
                return _converse(job, workload, number)

        begun = time.perf_counter()
        found = [asked for each in pool.map(one, range(job.conversations)) for asked in each]
        seconds = time.perf_counter() - begun
        over.set()
        if beside is not None:
            found += beside.result()
    return {"seconds": seconds, "requests": [asdict(asked) for asked in found]}


if __name__ == "__main__":
    json.dump(run(Job(**json.load(sys.stdin))), sys.stdout)
