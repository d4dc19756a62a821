"""`troupe batch`: sends the requests of a file to a server or a model, and writes the answers to another."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.endpoint.options import SOURCE, ApiKey, AtOnce, Url
from deployments.cli.replay import Asked, asked_client
from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from deployments.cli.batches.sending import Sending

_INTERRUPTED = 130


def batch(
    lines: Annotated[Path, typer.Argument(metavar="IN.jsonl", help="Requests as for /v1/batches.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File for the answers. Default: IN.out.jsonl.")
    ] = None,
    url: Url = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar=SOURCE,
            help="Models to load in this process in place of a server. Default: those of `troupe serve`.",
        ),
    ] = None,
    ask: Annotated[str | None, typer.Option(metavar="ID", help="Model to ask in place of the lines' own.")] = None,
    api_key: ApiKey = None,
    concurrency: AtOnce = 16,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an output file: no line that it has is sent again.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--retry-failed", help="Go on as with --resume, and send lines again that have an error.")
    ] = False,
) -> None:
    """Send the requests of a file, and write the answers as OpenAI's batches have them.

    The exit status is 0 if all requests were answered, 1 if the file has an error, and 130 after Ctrl-C.
    """
    if url is not None and model is not None:
        raise ConfigError("Give --url or --model, not both.")
    source = lines.absolute()
    place = source.with_suffix(".out.jsonl") if output is None else output.absolute()
    if place == source:
        raise ConfigError(f"-o {place} is the input itself; name another file.")
    if place.exists() and not (resume or again):
        raise ConfigError(f"{place} exists; continue it with --resume, or name another file with -o.")
    asked = Asked(url=url, source=model, model=ask, api_key=api_key or os.environ.get("OPENAI_API_KEY"))
    from deployments.cli.batches.sending import Sending

    raise typer.Exit(_send(Sending(source, place, again=again), place, asked, concurrency))


def _send(sending: Sending, place: Path, asked: Asked, at_once: int) -> int:
    """Send all lines and print a summary; the exit status."""
    before = sending.done
    try:
        asyncio.run(_sent(sending, asked, at_once))
    except KeyboardInterrupt:
        done = (
            f"{_summary(sending, before, place)} Continue with --resume." if sending.done else "no line was answered."
        )
        print(f"Interrupted: {done}", file=sys.stderr)
        return _INTERRUPTED
    except ConfigError as error:
        if not sending.done:
            raise
        raise ConfigError(f"{error} {_summary(sending, before, place)} Continue with --resume.") from None
    again = " Send these again with --retry-failed." if sending.failed else ""
    print(f"{_summary(sending, before, place)}{again}")
    return 1 if sending.failed else 0


async def _sent(sending: Sending, asked: Asked, at_once: int) -> None:
    from deployments.cli.batches.progress import shown_progress
    from deployments.cli.batches.sending import Server

    async with asked_client(asked, quiet=True) as (client, _):
        with shown_progress(sending.total, sending.done) as progress:
            await sending.run(Server(client, asked.model), at_once, progress)


def _summary(sending: Sending, before: int, place: Path) -> str:
    earlier = f", {before} of them before" if before else ""
    failed = "1 has an error" if sending.failed == 1 else f"{sending.failed} have errors"
    return f"{sending.done} of {sending.total} lines are in {place}{earlier}; {failed}."
