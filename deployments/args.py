"""The `args` of an application, checked whole: schema, default parameters, names of parsers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.compat.legacy import GenerateBody
from deployments.config.api import ApiOptions
from deployments.config.app import AppArgs, parse_args
from deployments.config.explain import config_error, nearest
from deployments.config.model import ModelEntry
from deployments.core.errors import ConfigError
from deployments.openai.default_params import default_faults
from deployments.openai.parsing.format import parser_faults
from deployments.registry.adapter_check import AdapterCheck
from model_loaders.local_folder import found, missing


def check_adapter_folders(args: AppArgs, base: Path) -> None:
    """Refuse adapters of the configuration whose folders do not exist.

    Args:
        base: the folder that relative paths start from.

    Raises:
        ConfigError: it names the model and the path.
    """
    for index, entry in enumerate(args.models):
        if entry.adapter is not None and not found(entry.adapter, base).is_dir():
            raise ConfigError(f"models[{index}].adapter: {entry.adapter}: {missing(entry.adapter, base)}")


def refused_adapters(args: AppArgs, base: Path) -> list[str]:
    """What the log says of adapters of the configuration that their own files refuse. Blocks: it reads them.

    Args:
        base: the folder that relative paths start from.
    """
    check = AdapterCheck()
    reasons = [(entry.id, check.reason(entry, base)) for entry in args.models]
    return [
        f"The adapter {name!r} cannot be served: {reason} The server starts without it, and answers requests for it "
        "with 404."
        for name, reason in reasons
        if reason is not None
    ]


def entry_faults(entry: ModelEntry, api: ApiOptions) -> list[str]:
    """What its schema does not see of a model, of the configuration or posted: each fault after its key."""
    faults = [
        f"api.{fault}"
        for fault in (*default_faults(entry.api.default_params, api, more=(GenerateBody,)), *parser_faults(entry.api))
    ]
    return faults + [
        f"variants.{name}.{fault.removeprefix('default_params.')}"
        for name in entry.variants
        for fault in default_faults(entry.defaults(name), api, more=(GenerateBody,))
    ]


def read_args(args: Mapping[str, Any] | AppArgs, source: str = "args") -> AppArgs:
    """The arguments, checked as far as one can without loading a model.

    Args:
        source: where they come from, for the message.

    Raises:
        ConfigError: something is wrong; every fault is listed with its place and the fix.
    """
    checked = parse_args(args, source)
    faults = [
        f"models[{index}].{fault}"
        for index, entry in enumerate(checked.models)
        for fault in entry_faults(entry, checked.api)
    ]
    default = checked.api.default_model
    if default is not None and default not in checked.by_name():
        faults.append(f"api.default_model: there is no model {default!r}{nearest(default, checked.by_name())}")
    if faults:
        raise config_error(faults, source)
    return checked
