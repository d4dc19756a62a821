"""Sends the lines of a batch to a server, several at a time, and writes what comes of each."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2

from deployments.batches.client import LineAnswer, LineCall
from deployments.batches.computing import LineSender
from deployments.batches.lines import Place, by_model, index_of, read_line
from deployments.batches.results import ResultFile, refused_line, request_id, result_line
from deployments.cli.batches.progress import Progress
from deployments.core.errors import ConfigError

_TRIES = 8
_FIRST_TRIES = 3
_LONGEST_WAIT_S = 30.0


class Server:
    """A `Compute` over a server. It raises ConfigError for what no line can be answered with: the key, or the model.

    Args:
        client: its base URL ends with /v1.
        model: asked in place of the lines' own; None keeps it.
    """

    def __init__(self, client: httpx2.AsyncClient, model: str | None) -> None:
        self._client = client
        self._model = model
        self._answered = False

    async def __call__(self, call: LineCall) -> LineAnswer:
        body = {**call.body, "model": self._model} if self._model is not None else call.body
        response = await self._post(call.url.removeprefix("/v1"), body)
        self._answered = True
        answer = LineAnswer.of(response.status_code, response.headers, response.content)
        message = answer.error.get("message") or f"status {answer.status}"
        if answer.status in (401, 403):
            raise ConfigError(f"{self._client.base_url} refuses the key. Give another with --api-key. ({message})")
        if self._model is not None and answer.error.get("code") == "model_not_found":
            raise ConfigError(f"--ask {self._model}: {message}")
        return answer

    async def _post(self, route: str, body: object) -> httpx2.Response:
        tries = 0
        while True:
            try:
                return await self._client.post(route, json=body)
            except httpx2.TransportError as error:
                tries += 1
                if tries >= (_TRIES if self._answered else _FIRST_TRIES):
                    raise ConfigError(f"{self._client.base_url} does not answer: {str(error).rstrip('.')}.") from None
            await asyncio.sleep(min(_LONGEST_WAIT_S, 2.0**tries / 4))


class Sending:
    """The lines of a file that have no result yet.

    Args:
        source: the file.
        output: has the results.
        again: lines that failed are sent once more.

    Attributes:
        failed: lines of the output that have an error.

    Raises:
        ConfigError: a file cannot be read or written or has no requests, or `output` has the results of another file.
    """

    def __init__(self, source: Path, output: Path, *, again: bool = False) -> None:
        self._source = source
        self._results = ResultFile(output)
        try:
            self._key = hashlib.sha256(source.read_bytes()).hexdigest()[:24]
            index = index_of(source, None)
            done = dict(self._results.recover(self._key))
            if again and any(done.values()):
                self._results.leave_out_failed()
                done = {number: failed for number, failed in done.items() if not failed}
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be read: {error.strerror}.") from None
        except ValueError:
            raise ConfigError(f"{output} has results of another file; name another one with -o.") from None
        if not index.total:
            raise ConfigError(f"{source} has no requests.")
        self.total, self.done, self.failed = index.total, len(done), sum(done.values())
        self._places = [place for place in by_model(index.places) if place.number not in done]
        self._refused = {number: line for number, line in index.refused.items() if number not in done}

    async def run(self, server: Server, at_once: int, progress: Progress) -> None:
        """Send all lines.

        Raises:
            ConfigError: nobody answers, or the results cannot be written.
        """
        places, sender = iter(self._places), LineSender(server)
        progress.show(self.done, self.failed)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(self._each(places, sender, progress))
        except* ConfigError as errors:
            raise errors.exceptions[0] from None
        else:
            if self._refused:
                self._write([refused_line(self._key, number, line) for number, line in self._refused.items()], True)
        finally:
            self._results.close()

    async def _each(self, places: Iterator[Place], sender: LineSender, progress: Progress) -> None:
        for place in places:
            line = read_line(place.read(self._source), None)
            named = request_id(self._key, place.number)
            call = LineCall(url=line.url, body=line.body, owner="", request_id=named)
            answer = await sender.answer(call)
            self._write([result_line(self._key, place.number, line.custom_id, answer)], answer.status != 200)
            progress.show(self.done, self.failed)

    def _write(self, lines: Sequence[bytes], failed: bool) -> None:
        try:
            self._results.append(lines)
        except OSError as error:
            raise ConfigError(f"{self._results.path} cannot be written: {error.strerror}.") from None
        self.done += len(lines)
        self.failed += len(lines) if failed else 0
