"""Loads a model, given the loader's name in the configuration."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError

from deployments.core.errors import ConfigError, ModelLoadFailed, TroupeError, last_line
from model_loaders.contract import ModelInfo, as_model_info
from model_loaders.loader_imports import imports_of
from model_loaders.loader_name import is_file, new_place, parts
from model_loaders.local_folder import check_folders, unreadable_weights
from model_loaders.weights.adapter_folder import note_adapter
from model_loaders.weights.load_report import reported

logger = logging.getLogger("troupe.loader")


def load_model_info(loader: str, kwargs: Mapping[str, Any], device: str) -> ModelInfo:
    """Import a loader, call it and check what it returns. Slow: run it in a thread.

    Args:
        loader: `module:function`, `path/to/file.py:function`, or either without `:function` for a module-level
            `model_info` (a `ModelInfo`, a dict, or a function).
        kwargs: passed to the function; a `device` among them wins over the next.
        device: such as "cuda:0" or "cpu", passed where the function has a parameter of that name.

    Raises:
        ConfigError: the loader has a new place.
        ModelLoadFailed: with the loader's name and the last line of what went wrong.
    """
    started = time.monotonic()
    logger.info("loading %s on %s", loader, device)
    try:
        with reported(loader):
            check_folders(kwargs)
            target = _find(loader)
            returned = _call(target, loader, kwargs, device) if inspect.isroutine(target) else target
        info = as_model_info(returned, loader)
        note_adapter(info.model)
    except (ConfigError, TroupeError):
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # the user's, and not the loader's
        logger.exception("loader %s failed", loader)
        reason = unreadable_weights(kwargs) if isinstance(error, SafetensorError) else None
        raise ModelLoadFailed(f"Loader {loader} failed: {reason or _reason(error)}") from error
    logger.info("loaded %s in %.1f s", loader, time.monotonic() - started)
    return info


def _reason(error: BaseException) -> str:
    """The exception as one line, with the line of the loader that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    here = [f for f in frames if Path(f.filename) != Path(__file__) and "importlib" not in f.filename]
    place = f" ({Path(here[-1].filename).name}, line {here[-1].lineno})" if here else ""
    return last_line(error) + place


def _find(loader: str) -> Any:
    """The function or `model_info` of a loader's name."""
    if new := new_place(loader):
        raise ConfigError(f"Loader {loader} is now {new}.")
    place, name = parts(loader)
    module = _module_from_file(place) if is_file(place) else _module(place, loader)
    if not hasattr(module, name):
        raise ModelLoadFailed(f"Loader {loader}: {place} has no {name!r}.")
    return getattr(module, name)


def _module(name: str, loader: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelLoadFailed(f"Loader {loader}: write module:function, or path/to/file.py:function.")
    with contextlib.suppress(ValueError):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            raise ModelLoadFailed(
                f"Loader {loader}: no module named {name!r}. Write module:function, or path/to/file.py:function."
            )
    return importlib.import_module(name)


def _module_from_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ModelLoadFailed(f"Loader file {path} does not exist (looked at {file}).")
    name = f"troupe_loader_{file.stem}_{hashlib.sha1(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ModelLoadFailed(f"Loader file {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    imports_of(file.parent).enter(module)
    spec.loader.exec_module(module)
    return module


def _call(function: Callable[..., Any], loader: str, kwargs: Mapping[str, Any], device: str) -> Any:
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    arguments = dict(kwargs)
    if "device" in parameters or takes_any:
        arguments.setdefault("device", device)
    unknown = [key for key in arguments if key not in parameters]
    if unknown and not takes_any:
        known = ", ".join(parameters) or "none"
        raise ModelLoadFailed(f"Loader {loader} takes no {unknown[0]!r}; its arguments: {known}.")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in arguments
    ]
    if missing:
        raise ModelLoadFailed(f"Loader {loader} needs {missing[0]!r}; give it under kwargs.")
    return function(**arguments)
