"""Checking a loader's name and arguments by the text of its module; nothing of it is imported."""

from __future__ import annotations

import ast
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

from deployments.config.explain import nearest
from deployments.config.model import ModelEntry
from deployments.core.errors import ConfigError
from model_loaders.loader_name import is_file, parts

_CONSTANTS = (ast.Constant, ast.List, ast.Tuple, ast.Set, ast.JoinedStr)


def check_loader(loader: str, folder: Path) -> None:
    """Refuse a loader whose file, module or function does not exist, or that is a constant.

    Raises:
        ConfigError: it names the loader and what is wrong with it.
    """
    place, function = parts(loader)
    file = _file(loader, folder)
    names = None if file is None else _bindings(file)
    if names is None:
        return
    if function not in names and ":" not in loader:
        raise ConfigError(f"loader {loader}: name the function, such as {loader}:{_likely_function(names)}.")
    if function not in names:
        raise ConfigError(f"loader {loader}: {place} has no {function!r}{nearest(function, sorted(names))}")
    if all(isinstance(bound, _CONSTANTS) for bound in names[function]):
        text = ast.unparse(names[function][-1])
        raise ConfigError(f"loader {loader}: {function} is {text[:40]}; name a function that returns a model_info.")


def _likely_function(names: dict[str, list[ast.AST]]) -> str:
    functions = [name for name, bound in names.items() if isinstance(bound[-1], ast.FunctionDef)]
    return next((name for name in functions if "load" in name), functions[0] if functions else "load_model")


def check_arguments(entry: ModelEntry, folder: Path) -> None:
    """Refuse arguments that a model's loader does not have, and a call without those that it needs.

    Raises:
        ConfigError: it names the model and the argument.
    """
    file = _file(entry.loader, folder)
    names = None if file is None else _bindings(file)
    match (names or {}).get(parts(entry.loader)[1]):
        case [ast.FunctionDef(decorator_list=[]) | ast.AsyncFunctionDef(decorator_list=[]) as function]:
            _check_signature(function.args, entry)


def _check_signature(takes: ast.arguments, entry: ModelEntry) -> None:
    named = [argument.arg for argument in (*takes.args, *takes.kwonlyargs)]
    for name in entry.kwargs:
        if name not in named and takes.kwarg is None:
            raise ConfigError(
                f"model {entry.id!r}, kwargs.{name}: loader {entry.loader} does not have this argument"
                f"{nearest(name, named) if named else ''}"
            )
    # Defaults belong to the last of the parameters that have a position.
    count = len(takes.args) - len(takes.defaults)
    needed = [argument.arg for argument in takes.args[: max(0, count)]]
    needed += [a.arg for a, default in zip(takes.kwonlyargs, takes.kw_defaults, strict=True) if default is None]
    for name in needed:
        if name not in entry.kwargs and name != "device":
            raise ConfigError(f"model {entry.id!r}, kwargs: loader {entry.loader} needs {name!r}; add it.")


def _file(loader: str, folder: Path) -> Path | None:
    """The file that a loader is in; None if it is not the text of a module."""
    place, _ = parts(loader)
    if is_file(place):
        file = folder / Path(place).expanduser()
        if not file.is_file():
            raise ConfigError(f"loader {loader}: there is no file {file.resolve()}.")
        return file
    first, _, rest = place.partition(".")
    if not first.isidentifier():
        raise ConfigError(f"loader {loader}: write module:function, or path/to/file.py:function.")
    if importlib.util.find_spec(first) is not None:
        spec = _spec(place, loader)
        return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None
    if not rest and (folder / f"{first}.py").is_file():
        return folder / f"{first}.py"
    if (folder / first).is_dir() and rest:
        return None
    raise ConfigError(f"loader {loader}: there is no module named {place!r}.")


def _spec(module: str, loader: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        raise ConfigError(f"loader {loader}: {error}.") from None
    if spec is None:
        raise ConfigError(f"loader {loader}: there is no module named {module!r}.")
    return spec


def _bindings(file: Path) -> dict[str, list[ast.AST]] | None:
    """What each name of a module is bound to outside of its functions; None if its text does not show it.

    A name's plain assignment gives the value, a definition itself, anything else the place of the name.

    Raises:
        ConfigError: the text is not Python.
    """
    try:
        nodes: list[ast.AST] = [ast.parse(file.read_bytes())]
    except SyntaxError as error:
        raise ConfigError(f"{file.resolve()}, line {error.lineno}: SyntaxError: {error.msg}.") from None
    except (OSError, ValueError):
        return None
    names: dict[str, list[ast.AST]] = {}
    while nodes:
        node = nodes.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.setdefault(node.name, []).append(node)
                continue
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ):
                names.setdefault(name, []).append(value)
                nodes.append(value)
                continue
            case ast.alias():
                names.setdefault((node.asname or node.name).split(".")[0], []).append(node)
            case ast.Name(ctx=ast.Store()):
                names.setdefault(node.id, []).append(node)
        nodes.extend(ast.iter_child_nodes(node))
    return None if {"*", "__getattr__"} & names.keys() else names
