"""`troupe check`: loads one model as the server would, and shows what is right and wrong with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.core.errors import ConfigError

if TYPE_CHECKING:
    from deployments.cli.doctor.checkup import Checkup
    from deployments.config.app import AppArgs
    from deployments.config.model import ModelEntry


def check(
    loader: Annotated[
        str,
        typer.Argument(
            metavar="LOADER.py:FUNCTION | FOLDER | ORG/NAME | CONFIG.yaml",
            help="What to check: all that `troupe serve` takes.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Id of the model, if a configuration has several.")] = None,
    kwargs: Annotated[str | None, typer.Option(help="Arguments of the loader, as YAML or JSON.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    message: Annotated[str, typer.Option(help="What the model is asked.")] = "Hello",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0. Default: the first GPU, or else cpu.")] = None,
    image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Image in place of the test image.")
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Recording in place of the test tone.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="STEP", help="Leave out a step; can be given several times.")
    ] = None,
    modules: Annotated[
        bool, typer.Option("--modules", help="List what requests can capture and change inside the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    show_traceback: Annotated[
        bool, typer.Option("--traceback", help="Print the traceback of what failed, on stderr.")
    ] = False,
) -> None:
    """Load a model as the server would, and show what is right and wrong with it, each finding with its fix.

    The exit status is 0 if all is well, 3 if there are warnings, and 1 if there are errors.
    """
    args, entry = _checked(loader, kwargs, model, trust_remote_code=trust_remote_code)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from deployments.cli.doctor.checkup import NEEDED, STEPS, Checkup
    from deployments.cli.doctor.subject import Trial
    from deployments.logs import enter_folder

    _refuse_unknown(skip or (), [step for step in STEPS if step not in NEEDED])
    files = [None if file is None else file.absolute() for file in (image, audio)]
    trial = Trial(
        message=message, max_tokens=max_tokens, image=files[0], audio=files[1], modules=modules, device=device
    )
    enter_folder(args.folder)
    checkup = Checkup(args, entry, trial, skip or ())
    raise typer.Exit(asyncio.run(_run(checkup, loader, as_json=as_json, show_traceback=show_traceback)))


def _checked(
    loader: str, kwargs: str | None, model: str | None, *, trust_remote_code: bool
) -> tuple[AppArgs, ModelEntry]:
    """The configuration and the entry of the model in it, checked as far as one can without loading it.

    Raises:
        ConfigError: it is wrong, or has several models and none is chosen.
    """
    from deployments.args import check_adapter_folders, read_args
    from deployments.cli.serve_file import troupe_applications
    from deployments.cli.serve_options import ServeOptions
    from deployments.cli.serve_source import written_config
    from deployments.config.loader_file import check_arguments, check_loader

    written = written_config(ServeOptions(model=loader, kwargs=kwargs, trust_remote_code=trust_remote_code))
    applications = [
        read_args(app.get("args") or {}, source=f"{written.name}, args") for app in troupe_applications(written.config)
    ]
    found = [(args, entry) for args in applications for entry in args.models if _is_meant(entry, model)]
    if len(found) != 1:
        ids = ", ".join(entry.id for args in applications for entry in args.models)
        asked = "choose one of its models with --model" if model is None else f"it has no model {model!r}"
        raise ConfigError(f"{written.name}: {asked}: {ids or 'it has none'}.")
    (args, entry), folder = found[0], written.folder.absolute()
    folder /= args.folder or ""
    check_adapter_folders(args, folder)
    if entry.base is not None:  # A model is checked with the adapters over it, here with this one alone.
        base = args.by_name()[entry.base]
        args, entry = args.model_copy(update={"models": [base, entry]}), base
    check_loader(entry.loader, folder)
    check_arguments(entry, folder)
    return args.model_copy(update={"folder": str(folder)}), entry


def _is_meant(entry: ModelEntry, model: str | None) -> bool:
    """Whether an entry is the model that is asked for; if none is, it is a model and not an adapter over one."""
    return entry.base is None if model is None else model in entry.names


def _refuse_unknown(names: Collection[str], known: Collection[str]) -> None:
    from deployments.config.explain import nearest

    for name in names:
        if name not in known:
            raise ConfigError(f"--skip {name}: there is no such step{nearest(name, known)}.")


async def _run(checkup: Checkup, loader: str, *, as_json: bool, show_traceback: bool) -> int:
    """Make the checks, print the report, and return the exit status."""
    from deployments.cli.doctor.display import Display
    from deployments.cli.doctor.finding import exit_status, report
    from deployments.cli.output.process_end import named_end

    out, steps = sys.stdout, []
    display = Display(out, sys.stderr, checkup.thread_name)
    about = {"loader": loader, "model": checkup.entry.id, "device": checkup.device}
    # What a loader prints must not get into the JSON.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if not as_json:
            print(f"Model {checkup.entry.id} of {checkup.entry.loader} on {checkup.device}\n", file=out, flush=True)
        async with display.signs_of_life():
            with named_end(lambda: display.step):
                async for step in checkup.steps(display.begin):
                    steps.append(step)
                    if not as_json:
                        display.show(step)
    if as_json:
        print(json.dumps(report(steps, **about), indent=2, ensure_ascii=False), file=out)
    else:
        display.summary(steps)
    if show_traceback:
        print(*checkup.traces, sep="\n", file=sys.stderr)
    return exit_status(steps)
