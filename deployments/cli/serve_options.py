"""The options of `troupe serve`, and the key of a configuration that each of them sets."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, field, fields

import typer


def _option(text: str, key: str = "", *flag: str, default: typing.Any = None, **more: typing.Any) -> typing.Any:
    """An option.

    Args:
        key: the place of its value in a configuration; empty if it sets none.
        flag: how it is typed, if it is a switch.
    """
    return field(default=default, metadata={"key": key, "parameter": typer.Option(*flag, help=text, **more)})


def _switch(flag: str, text: str, key: str = "") -> typing.Any:
    return _option(text, key, flag, default=False, show_default=False)


_SOURCE = typer.Argument(
    metavar="CONFIG.yaml | FOLDER | ORG/NAME | LOADER.py:FUNCTION",
    help="What to serve. Default: serve_config.yaml in the current folder, or else the demo model.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a command line says; None and an empty list stand for what it does not say."""

    model: str | None = field(default=None, metadata={"key": "", "parameter": _SOURCE})
    host: str | None = _option("Address to listen on; 127.0.0.1 if nothing says otherwise.", "http_options.host")
    port: int | None = _option(
        "Port to listen on; 8000 if nothing says otherwise.", "http_options.port", min=1, max=65535
    )
    replicas: int | None = _option("Copies of the server's model process. Default: one for each GPU.", min=1)
    gpus: int | None = _option("GPUs to use, shared equally by the replicas; 0 is the CPU. Default: every GPU.", min=0)
    max_models: int | None = _option("Models that a replica holds at the same time.", "args.max_models_per_replica")
    api_keys_file: str | None = _option("File with the keys of the API, one per line.", "args.api.api_keys_file")
    record_dir: str | None = _option("Folder for a record of every request and its answer.", "args.api.record_dir")
    state_dir: str | None = _option("Folder for files and batches, and added models.", "args.state_dir")
    resume: bool = _switch("--resume", "Answer calls that the record has from the record.", "args.api.resume")
    id: str | None = _option("Name that clients send as `model`.", "models[].id")
    alias: list[str] | None = _option(  # noqa: RUF009 (a list in the annotation alone: the default is None)
        "A further name; can be given several times.", "models[].aliases", metavar="NAME"
    )
    dtype: str | None = _option("Such as bfloat16.", "models[].kwargs.dtype")
    revision: str | None = _option("Branch, tag or commit of a Hub repository.", "models[].kwargs.revision")
    trust_remote_code: bool = _switch(
        "--trust-remote-code", "Run code that comes with the checkpoint.", "models[].kwargs.trust_remote_code"
    )
    chat_template: str | None = _option("Jinja template, or the path of its file.", "models[].kwargs.chat_template")
    kwargs: str | None = _option("Further arguments of the loader, as YAML or JSON.", "models[].kwargs")
    max_batch_size: int | None = _option("Requests computed together; more wait.", "models[].engine.max_batch_size")
    max_model_len: int | None = _option("Tokens of a request, prompt and answer.", "models[].engine.max_model_len")
    deterministic: bool = _switch(
        "--deterministic", "The bits of an answer do not depend on other requests.", "models[].engine.deterministic"
    )
    tool_parser: str | None = _option("Format of the model's tool calls.", "models[].api.tool_parser")
    reasoning_parser: str | None = _option("Format of the model's reasoning.", "models[].api.reasoning_parser")
    fast: bool = _switch("--fast", "Use HAProxy and fewer hops in Ray Serve.")
    verbose: bool = _switch("--verbose", "Leave Ray's output on the terminal, and not in the log folder.")
    check: bool = _switch("--check", "Check the configuration and exit.")
    print_config: bool = _switch("--print-config", "Print the configuration that would be served, and exit.")


def signature() -> inspect.Signature:
    """The signature of the command: a parameter for every option."""
    hints = typing.get_type_hints(ServeOptions)
    parameters = [
        inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=each.default,
            annotation=typing.Annotated[hints[each.name], each.metadata["parameter"]],
        )
        for each in fields(ServeOptions)
    ]
    return inspect.Signature(parameters)


def keys() -> dict[str, str]:
    """The options that set a key of a configuration, by their field: `args.api.record_dir`, `models[].kwargs.dtype`."""
    return {each.name: each.metadata["key"] for each in fields(ServeOptions) if each.metadata["key"]}


def flag(field: str) -> str:
    """An option as it is typed."""
    return f"--{field.replace('_', '-')}"
