"""The server that a command asks: one that runs already, or one that it starts from a configuration."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.cli.endpoint.options import server_of
from deployments.cli.endpoint.processes import end_of, free_port, running
from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from httpx2 import Response

_ADDRESS = re.compile(r"^Troupe answers at (\S+)/v1,", re.MULTILINE)
_PATIENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An OpenAI API.

    Attributes:
        url: without `/v1`.
        key: empty for none.
    """

    url: str
    key: str = ""

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` lists: ids, aliases, variants, adapters.

        Raises:
            ConfigError: the server cannot be reached, or it does not answer this.
        """
        answer = self.request("GET", "/v1/models")
        if answer.status_code != 200:
            raise ConfigError(f"{self.url}/v1/models: status {answer.status_code}: {answer.text[:500]}")
        found: list[dict[str, Any]] = answer.json()["data"]
        return found

    @property
    def authorization(self) -> dict[str, str]:
        """The header with the key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def request(
        self,
        method: str,
        path: str,
        body: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> Response:
        """Send a request.

        Raises:
            ConfigError: the server cannot be reached.
        """
        import httpx2

        sent = {"Content-Type": "application/json", **self.authorization, **(headers or {})}
        try:
            return httpx2.request(
                method, f"{self.url}{path}", content=body, params=parameters, headers=sent, timeout=_PATIENCE_S
            )
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ConfigError(f"{self.url} does not answer: {type(error).__name__}: {error}") from None


@contextlib.contextmanager
def endpoint(
    url: str | None, config: str | None, key: str, log: Path, options: Sequence[str] = ()
) -> Iterator[Endpoint]:
    """The server at a URL, or one for a configuration until the block ends.

    Args:
        url: with or without `/v1`.
        config: what `troupe serve` takes.
        log: file for what the started server prints.
        options: of `troupe serve`, beside the configuration.

    Raises:
        ConfigError: both or none are given, or it cannot be started.
    """
    if (url is None) == (config is None):
        raise ConfigError("Give either --url or --config.")
    if url is not None:
        yield Endpoint(server_of(url), key)
        return
    with _started(str(config), key, log, options) as found:
        yield found


@contextlib.contextmanager
def _started(config: str, key: str, log: Path, options: Sequence[str]) -> Iterator[Endpoint]:
    port, began = free_port(), time.monotonic()
    command = [sys.executable, "-m", "deployments.cli.main", "serve", config, "--host", "127.0.0.1", *options]
    print(f"Starting {config}", file=sys.stderr)
    log.unlink(missing_ok=True)
    with running([*command, "--port", str(port)], log) as process:
        url = _announced(process, log)
        if url is None:
            raise ConfigError(f"{config} could not be served; the end of {log}:\n{end_of(log)}")
        print(f"{config} is served at {url} ({time.monotonic() - began:.1f} s)", file=sys.stderr)
        yield Endpoint(url, key)


def _announced(process: subprocess.Popen[bytes], log: Path) -> str | None:
    """The address that `troupe serve` prints when its first application answers; None if it ends before that."""
    while process.poll() is None:
        if found := _ADDRESS.search(log.read_text(encoding="utf-8", errors="replace")):
            return found[1]
        time.sleep(0.2)
    return None


def as_json(value: object) -> str:
    """The JSON of a body."""
    return json.dumps(value, ensure_ascii=False)
