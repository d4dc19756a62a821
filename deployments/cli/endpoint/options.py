"""Options that commands share which ask a server."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from deployments.core.errors import ConfigError

SOURCE = "CONFIG.yaml | FOLDER | ORG/NAME | LOADER.py:FUNCTION"
"""What `troupe serve` takes."""

Url: TypeAlias = Annotated[str | None, typer.Option(help="Server to ask, such as http://127.0.0.1:8000.")]
ApiKey: TypeAlias = Annotated[str | None, typer.Option(help="Key of the server. Default: $OPENAI_API_KEY.")]
AtOnce: TypeAlias = Annotated[int, typer.Option(min=1, help="Requests at the same time.")]


def server_of(url: str) -> str:
    """A server's address as `--url` has it, without `/v1`.

    Raises:
        ConfigError: it is not a URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url {url!r} should be a URL such as http://127.0.0.1:8000.")
    return url.rstrip("/").removesuffix("/v1")
