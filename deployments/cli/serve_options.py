"""The options of `troupe serve`, and the key of a configuration that each of them sets."""

from __future__ import annotations

import inspect
import typing
from dataclasses import dataclass, fields
from typing import Annotated

import typer


class Key(str):
    """The place of an option's value in a configuration, such as `args.api.record_dir` or `models[].kwargs.dtype`."""

    __slots__ = ()


def _option(text: str, **more: typing.Any) -> typing.Any:
    return typer.Option(help=text, show_default=False, **more)


def _switch(name: str, text: str) -> typing.Any:
    return typer.Option(name, help=text, show_default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a command line says; None and an empty list stand for what it does not say."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG.yaml | FOLDER | ORG/NAME | LOADER.py:FUNCTION",
            help="What to serve. Default: serve_config.yaml in the current folder, or else the demo model.",
            show_default=False,
        ),
    ] = None
    host: Annotated[
        str | None,
        _option("Address to listen on; 127.0.0.1 if nothing says otherwise."),
        Key("http_options.host"),
    ] = None
    port: Annotated[
        int | None,
        _option("Port to listen on; 8000 if nothing says otherwise.", min=1, max=65535),
        Key("http_options.port"),
    ] = None
    replicas: Annotated[
        int | None, _option("Copies of the server's model process. Default: one for each GPU.", min=1)
    ] = None
    gpus: Annotated[
        int | None, _option("GPUs to use, shared equally by the replicas; 0 is the CPU. Default: every GPU.", min=0)
    ] = None
    max_models: Annotated[
        int | None,
        _option("Models that a replica holds at the same time."),
        Key("args.max_models_per_replica"),
    ] = None
    api_keys_file: Annotated[
        str | None, _option("File with the keys of the API, one per line."), Key("args.api.api_keys_file")
    ] = None
    record_dir: Annotated[
        str | None, _option("Folder for a record of every request and its answer."), Key("args.api.record_dir")
    ] = None
    state_dir: Annotated[
        str | None, _option("Folder for files and batches, and added models."), Key("args.state_dir")
    ] = None
    resume: Annotated[
        bool,
        _switch("--resume", "Answer calls that the record has from the record."),
        Key("args.api.resume"),
    ] = False
    id: Annotated[str | None, _option("Name that clients send as `model`."), Key("models[].id")] = None
    alias: Annotated[
        list[str] | None,
        _option("A further name; can be given several times.", metavar="NAME"),
        Key("models[].aliases"),
    ] = None
    dtype: Annotated[str | None, _option("Such as bfloat16."), Key("models[].kwargs.dtype")] = None
    revision: Annotated[
        str | None, _option("Branch, tag or commit of a Hub repository."), Key("models[].kwargs.revision")
    ] = None
    trust_remote_code: Annotated[
        bool,
        _switch("--trust-remote-code", "Run code that comes with the checkpoint."),
        Key("models[].kwargs.trust_remote_code"),
    ] = False
    chat_template: Annotated[
        str | None, _option("Jinja template, or the path of its file."), Key("models[].kwargs.chat_template")
    ] = None
    kwargs: Annotated[
        str | None, _option("Further arguments of the loader, as YAML or JSON."), Key("models[].kwargs")
    ] = None
    max_batch_size: Annotated[
        int | None, _option("Requests computed together; more wait."), Key("models[].engine.max_batch_size")
    ] = None
    max_model_len: Annotated[
        int | None, _option("Tokens of a request, prompt and answer."), Key("models[].engine.max_model_len")
    ] = None
    deterministic: Annotated[
        bool,
        _switch("--deterministic", "The bits of an answer do not depend on other requests."),
        Key("models[].engine.deterministic"),
    ] = False
    tool_parser: Annotated[
        str | None, _option("Format of the model's tool calls."), Key("models[].api.tool_parser")
    ] = None
    reasoning_parser: Annotated[
        str | None, _option("Format of the model's reasoning."), Key("models[].api.reasoning_parser")
    ] = None
    fast: Annotated[bool, _switch("--fast", "Use HAProxy and fewer hops in Ray Serve.")] = False
    verbose: Annotated[bool, _switch("--verbose", "Leave Ray's output on the terminal, and not in the log folder.")] = (
        False
    )
    check: Annotated[bool, _switch("--check", "Check the configuration and exit.")] = False
    print_config: Annotated[
        bool,
        _switch("--print-config", "Print the configuration that would be served, and exit."),
    ] = False


def signature() -> inspect.Signature:
    """The signature of the command: a parameter for every option."""
    return inspect.signature(ServeOptions, eval_str=True)


def keys() -> dict[str, Key]:
    """The options that set a key, by their field."""
    hints = typing.get_type_hints(ServeOptions, include_extras=True)
    return {
        field.name: key
        for field in fields(ServeOptions)
        for key in getattr(hints[field.name], "__metadata__", ())
        if isinstance(key, Key)
    }


def flag(field: str) -> str:
    """An option as it is typed."""
    return f"--{field.replace('_', '-')}"
