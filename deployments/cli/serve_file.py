"""Reading and checking a Ray Serve configuration file with a Troupe application."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import os
from collections.abc import Iterable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import yaml

from deployments.args import read_args
from deployments.config.app import IMPORT_PATH, AppArgs
from deployments.config.model import ModelEntry
from deployments.core.errors import ConfigError, ModelLoadFailed
from deployments.openai.http.keys import as_digests
from model_loaders.local_folder import check_folders

HOST, PORT = "127.0.0.1", 8000
# Ray Serve ignores a key that it does not know.
TOP_KEYS = (
    "proxy_location",
    "http_options",
    "grpc_options",
    "controller_options",
    "logging_config",
    "tracing_config",
    "applications",
    "target_capacity",
)
HTTP_KEYS = (
    "host",
    "port",
    "root_path",
    "request_timeout_s",
    "keep_alive_timeout_s",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_keyfile_password",
    "ssl_ca_certs",
)


def read_config(path: Path) -> tuple[dict[str, Any], AppArgs]:
    """A Serve configuration file, and the checked arguments of its Troupe application.

    The environment variables TROUPE_HOST and TROUPE_PORT win over the file's `http_options`, as a container needs. A
    host that both leave open is 127.0.0.1: Ray Serve's own default is every address of the machine.

    Raises:
        ConfigError: the file is not such a configuration; it names the file, the key and the nearest known one.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from None
    applications = config.get("applications") if isinstance(config, dict) else None
    if not isinstance(applications, list):
        raise ConfigError(f"{path}: expected a mapping with the key 'applications'.")
    ours = [app for app in applications if isinstance(app, dict) and app.get("import_path") == IMPORT_PATH]
    if not ours:
        raise ConfigError(f"{path}: no application has import_path {IMPORT_PATH}.")
    args = read_args(ours[0].get("args") or {}, source=f"{path}, args")
    try:
        _check_keys(config, TOP_KEYS, "")
        config["http_options"] = {"host": HOST, **(config.get("http_options") or {}), **_from_environment()}
        _check_keys(config["http_options"], HTTP_KEYS, "http_options.")
        _check_deployments(ours[0].get("deployments") or [], args)
        _hide_keys(ours[0].get("args") or {})
        for entry in args.models:
            _check_loader(entry.loader, path.parent)
            _check_kwargs(entry, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config, args


def base_url(config: Mapping[str, Any]) -> str:
    """The URL of the application, for clients on this machine."""
    http = config.get("http_options") or {}
    host = http.get("host", HOST)
    prefix = next(a for a in config["applications"] if a.get("import_path") == IMPORT_PATH).get("route_prefix", "/")
    reached = {"0.0.0.0": HOST, "::": "[::1]"}.get(host, host)
    scheme = "https" if http.get("ssl_certfile") else "http"
    return f"{scheme}://{reached}:{http.get('port', PORT)}{prefix.rstrip('/')}"


def _from_environment() -> dict[str, Any]:
    host, port = os.environ.get("TROUPE_HOST"), os.environ.get("TROUPE_PORT")
    if port and not port.isdecimal():
        raise ConfigError(f"TROUPE_PORT {port!r}: write a port's number.")
    return ({"host": host} if host else {}) | ({"port": int(port)} if port else {})


def _hide_keys(args: dict[str, Any]) -> None:
    """Replace keys by digests, because Ray logs an application's arguments."""
    api = args.get("api") or {}
    for name in ("api_keys", "admin_keys"):
        if api.get(name):
            api[name] = as_digests(api[name])


def _check_keys(given: Iterable[str], known: Iterable[str], place: str) -> None:
    for key in given:
        if key not in known:
            raise ConfigError(f"{place}{key}: unknown key{_meant(key, known)}")


def _meant(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _check_deployments(deployments: Any, args: AppArgs) -> None:
    if not isinstance(deployments, list) or not all(isinstance(d, dict) and "name" in d for d in deployments):
        raise ConfigError("applications.deployments: expected a list of mappings with the key 'name'.")
    replicas = [f"ModelReplica-{name}" for name in args.pools] if args.pools else ["ModelReplica"]
    known = ["OpenAIIngress", *replicas]
    for deployment in deployments:
        if deployment["name"] not in known:
            raise ConfigError(
                f"deployments: there is none named {deployment['name']!r}{_meant(deployment['name'], known)}"
            )


def _check_loader(loader: str, folder: Path) -> None:
    """Refuse a loader whose file, module or function does not exist, without importing anything of it."""
    place, _, function = loader.rpartition(":") if ":" in loader else (loader, "", "model_info")
    if place.endswith(".py") or "/" in place:
        file = folder / Path(place).expanduser()
        if not file.is_file():
            raise ConfigError(f"loader {loader}: there is no file {file.resolve()}.")
    elif importlib.util.find_spec(place.split(".")[0]) is None:
        if (folder / f"{place.split('.')[0]}.py").is_file():
            return
        raise ConfigError(f"loader {loader}: there is no module named {place!r}.")
    else:
        spec = _spec(place, loader)
        if spec.origin is None or not spec.origin.endswith(".py"):
            return
        file = Path(spec.origin)
    names = _top_level_names(file)
    if names is not None and function not in names:
        raise ConfigError(f"loader {loader}: {place} has no {function!r}{_meant(function, sorted(names))}")


def _check_kwargs(entry: ModelEntry, folder: Path) -> None:
    """Refuse paths of models that do not exist. The nodes of a Ray that runs already may have other folders."""
    if os.environ.get("RAY_ADDRESS"):
        return
    try:
        check_folders(entry.kwargs, folder)
    except ModelLoadFailed as error:
        raise ConfigError(f"model {entry.id!r}, kwargs.{error.message}") from None


def _spec(module: str, loader: str) -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(module)
    except ImportError as error:
        raise ConfigError(f"loader {loader}: {error}.") from None
    if spec is None:
        raise ConfigError(f"loader {loader}: there is no module named {module!r}.")
    return spec


def _top_level_names(file: Path) -> set[str] | None:
    """What a module defines or imports outside of its functions; None if its text does not tell."""
    try:
        nodes: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    except (OSError, SyntaxError, ValueError):
        return None
    names: set[str] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.Name):
            names.add(node.id)
        nodes.extend(ast.iter_child_nodes(node))
    return None if {"*", "__getattr__"} & names else names
