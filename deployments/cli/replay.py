"""`troupe replay`: sends recorded calls again, and shows which answers are no longer the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.endpoint.options import SOURCE, ApiKey, AtOnce, Url, server_of
from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from httpx2 import AsyncClient


_PATIENCE_S = 10.0


def replay(
    record: Annotated[
        list[Path],
        typer.Argument(metavar="RECORD.jsonl | FOLDER", help="Files that api.record_dir has, or the folder."),
    ],
    url: Url = None,
    model: Annotated[
        str | None, typer.Option(metavar=SOURCE, help="Model to load in this process in place of a server.")
    ] = None,
    ask: Annotated[str | None, typer.Option(metavar="ID", help="Model to ask in place of the recorded one.")] = None,
    api_key: ApiKey = None,
    concurrency: AtOnce = 16,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a line of JSON for each call, then a summary.")
    ] = False,
) -> None:
    """Send recorded calls again, and show which answers are no longer the same.

    Chats and completions that are greedy or have a seed are compared token by token. The exit status is 0 if all
    answers are equal, and 1 if one differs or fails.
    """
    if (url is None) == (model is None):
        raise ConfigError("Give either --url or --model.")
    asked = Asked(url=url, source=model, model=ask, api_key=api_key or os.environ.get("OPENAI_API_KEY"))
    raise typer.Exit(asyncio.run(_replay([place.absolute() for place in record], asked, concurrency, as_json)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who is asked.

    Attributes:
        source: of a model of this process, if there is no URL; None is what `troupe serve` serves by itself.
        model: asked in place of the recorded one.
    """

    url: str | None
    source: str | None
    model: str | None
    api_key: str | None


async def _replay(places: list[Path], asked: Asked, concurrency: int, as_json: bool) -> int:
    """Print what comes of each call and the summary; return the exit status."""
    from deployments.cli.records.calls import recorded_calls
    from deployments.cli.records.replayer import Replayer
    from deployments.cli.records.report import Report

    report = Report(sys.stdout, as_json=as_json)
    async with asked_client(asked, as_json) as (client, only):
        if asked.url is not None:
            await _check_key(client)
        replayer = Replayer(client, model=asked.model or only, at_once=concurrency)
        async with aclosing(replayer.outcomes(recorded_calls(places))) as outcomes:
            async for outcome in outcomes:
                report.add(outcome)
    return report.end()


async def _check_key(client: AsyncClient) -> None:
    """Refuse to send recorded calls to a server that takes none of them.

    Raises:
        ConfigError: it refuses the key.
    """
    from httpx2 import HTTPError

    with contextlib.suppress(HTTPError):  # Each call says it then.
        if (await client.get("/models", timeout=_PATIENCE_S)).status_code in (401, 403):
            raise ConfigError(f"{client.base_url} refuses the key. Give another with --api-key.")


@asynccontextmanager
async def asked_client(asked: Asked, quiet: bool) -> AsyncIterator[tuple[AsyncClient, str | None]]:
    """A client of who is asked; and the only model that there is, if that is known.

    Args:
        quiet: what a loader prints goes to standard error.
    """
    if asked.url is not None:
        async with _server(asked.url, asked.api_key) as client:
            yield client, None
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        async with _own_model(asked.source) as (client, only):
            yield client, only


@asynccontextmanager
async def _server(url: str, api_key: str | None) -> AsyncIterator[AsyncClient]:
    """A client of a server.

    Args:
        url: with or without /v1 at its end.
    """
    from httpx2 import AsyncClient, Limits, Timeout

    base = f"{server_of(url)}/v1"
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    limits, timeout = Limits(max_connections=None), Timeout(None, connect=_PATIENCE_S)
    async with AsyncClient(base_url=base, headers=headers, timeout=timeout, limits=limits) as client:
        yield client


@asynccontextmanager
async def _own_model(source: str | None) -> AsyncIterator[tuple[AsyncClient, str | None]]:
    """A client of models that this process loads; and the id of the model, if there is one alone.

    Args:
        source: what `troupe serve` takes.

    Raises:
        ConfigError: it cannot be served.
    """
    from httpx2 import ASGITransport, AsyncClient

    from deployments.args import read_args
    from deployments.cli.serve_file import troupe_applications
    from deployments.cli.serve_options import ServeOptions
    from deployments.cli.serve_source import written_config
    from deployments.config.api import BatchOptions
    from deployments.local import make_app
    from deployments.logs import enter_folder

    written = written_config(ServeOptions(model=source))
    (app, *others) = troupe_applications(written.config)
    if others:
        raise ConfigError(f"{written.name} has {1 + len(others)} applications of Troupe; name one with --url.")
    args = read_args(app.get("args") or {}, source=f"{written.name}, args")
    # The models are asked here alone: nobody needs a key, and nothing of this is recorded.
    open_api = args.api.model_copy(
        update={
            "api_keys": (),
            "api_keys_file": None,
            "record_dir": None,
            "resume": False,
            "max_logprobs": -1,
            "batches": BatchOptions(enabled=False),
        }
    )
    args = args.model_copy(update={"folder": str(written.folder.absolute() / (args.folder or "")), "api": open_api})
    enter_folder(args.folder)
    served = make_app(args)
    async with served.router.lifespan_context(served):
        transport = ASGITransport(app=served, raise_app_exceptions=False)
        async with AsyncClient(base_url="http://troupe/v1", transport=transport, timeout=None) as client:
            alone = len(args.models) == 1 and not args.models[0].variants
            yield client, args.models[0].id if alone else None
