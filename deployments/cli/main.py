"""The command `troupe`.

Each command imports what it needs when it runs, so that `troupe --help` answers at once.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from deployments.cli.agentbench.command import agentbench
from deployments.cli.batch import batch
from deployments.cli.bench.command import bench
from deployments.cli.check import check
from deployments.cli.replay import replay
from deployments.cli.serve_options import ServeOptions, signature
from deployments.cli.sweep.command import evaluate
from deployments.core.errors import ConfigError, TroupeError
from deployments.core.installed import server_version

if TYPE_CHECKING:
    from deployments.cli.serve_file import ServeConfig

SCRIPT = "scripts/serve"
"""In place of a command: scripts/serve runs this one."""


_OF_OTHERS = {"doctor": " Did you mean 'check'?", **dict.fromkeys(("run", "start", "up"), " Did you mean 'serve'?")}
"""What commands of other programs are called here."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"troupe {server_version()}")
        raise typer.Exit


app = typer.Typer(
    name="troupe", add_completion=False, rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]}
)


@app.callback()
def _troupe(
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Any Hugging Face model with the OpenAI API."""


def _serve(**given: Any) -> None:
    """Serve a model, or the models of a configuration file.

    Options of the server win over a configuration file. Options of a model need a model that is named here.

    \b
    troupe serve                                     the serve_config.yaml of this folder, or the demo model
    troupe serve org/name --dtype bfloat16           a model of the Hub
    troupe serve my-checkpoint --port 8001           a folder
    troupe serve my_loader.py:load_model --kwargs '{path: my-checkpoint}'
    troupe serve org/name --print-config > my.yaml   the configuration of the same, to change and keep
    """
    from deployments.cli.serve_source import written_config

    options = ServeOptions(**given)
    for name, value in (("TROUPE_HOST", options.host), ("TROUPE_PORT", options.port)):
        if value is not None:
            os.environ.pop(name, None)
    _run(written_config(options), options)


_serve.__signature__ = signature()  # type: ignore[attr-defined]
app.command("serve")(_serve)


@app.command(
    "serve-compat", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def _serve_compat(
    context: typer.Context,
    fast: Annotated[bool, typer.Option("--fast")] = False,
    verbose: Annotated[bool, typer.Option("--verbose")] = False,
    print_config: Annotated[bool, typer.Option("--print-config")] = False,
) -> None:
    """Serve a model by the flags and variables of other servers."""
    from deployments.cli.serve_file import ServeConfig
    from deployments.compat.flags import config_from_flags

    written = ServeConfig(config_from_flags(context.args, os.environ), "the given flags", Path.cwd())
    _run(written, ServeOptions(fast=fast, verbose=verbose, print_config=print_config))


def _run(written: ServeConfig, options: ServeOptions) -> None:
    if options.check or options.print_config:
        from deployments.args import refused_adapters
        from deployments.cli.serve_file import as_yaml, check_config

        _, args = check_config(written)
        if options.print_config:
            print(as_yaml(written), end="")
        if options.check:
            refused = refused_adapters(args, written.folder / (args.folder or ""))
            for line in refused or [f"{written.name}: no mistake was found."]:
                # The standard output can be the configuration.
                print(line, file=sys.stderr if refused or options.print_config else sys.stdout)
        return
    from deployments.cli.launch import serve

    raise typer.Exit(serve(written, fast=options.fast, verbose=options.verbose))


app.command("check")(check)
app.command("batch")(batch)
app.command("replay")(replay)
app.command("bench")(bench)
app.command("agentbench")(agentbench)
app.command("eval")(evaluate)


@app.command("fast-environment")
def _fast_environment() -> None:
    """Print the settings of the fast mode, for `eval` before `ray start` on each node of a cluster."""
    from deployments.cli.fast_mode import fast_environment

    for name, value in fast_environment(os.environ).items():
        print(f"export {name}={shlex.quote(value)}")


def _open_standard_streams() -> None:
    """Give a process that was started without a standard stream /dev/null in its place."""
    while (lowest := os.open(os.devnull, os.O_RDWR)) <= 2:  # the lowest number that is free
        os.set_inheritable(lowest, True)
    os.close(lowest)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. A mistake of the user is one line on stderr, and the exit status 2."""
    _open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if given[0] == SCRIPT:
        given = [_command_of_script(given[1:]), *given[1:]]
    try:
        status = typer.main.get_command(app).main(given, prog_name="troupe", standalone_mode=False)
    except typer.TyperException as error:
        _refuse(error.format_message() + _OF_OTHERS.get(given[0], ""))
    except (ConfigError, TroupeError) as error:
        _refuse(str(error))
    sys.exit(status)


def _command_of_script(arguments: Sequence[str]) -> str:
    """The command that scripts/serve stands for: it also takes the flags and variables of other servers."""
    from deployments.compat.flags import are_meant

    return "serve-compat" if are_meant(arguments, os.environ) else "serve"


def _refuse(message: str) -> NoReturn:
    print(f"troupe: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
