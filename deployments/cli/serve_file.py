"""Reading and checking a Ray Serve configuration file with Troupe applications."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.args import check_adapter_folders, read_args
from deployments.config.app import IMPORT_PATH, AppArgs
from deployments.config.explain import nearest
from deployments.config.loader_file import check_arguments, check_loader
from deployments.config.model import ModelEntry
from deployments.config.yaml_text import read_yaml
from deployments.core.errors import ConfigError, ModelLoadFailed
from deployments.openai.http.keys import KeyFile, as_digests
from model_loaders.local_folder import check_folders, missing

AUTO = "model_loaders.auto:load_model"
"""The loader of any checkpoint of transformers."""

_DTYPES = ("bfloat16", "float16", "float32", "float64")
HOST, PORT = "127.0.0.1", 8000
_DEFAULT_NAME = "default"
"""Ray Serve's name of an application without one."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """A Serve configuration as it is written, not checked.

    Attributes:
        config: its sections.
        name: of the file, or of what it was made from; messages begin with it.
        folder: the folder that its relative paths start from.
    """

    config: dict[str, Any]
    name: str
    folder: Path


def load_config(path: Path) -> ServeConfig:
    """The configuration in a file.

    Raises:
        ConfigError: there is no such file, or it is not a configuration.
    """
    return ServeConfig(_parsed(path), str(path), path.parent)


def read_config(path: Path) -> tuple[dict[str, Any], AppArgs]:
    """The checked configuration in a file, see `check_config`.

    Raises:
        ConfigError: as of `load_config` and `check_config`.
    """
    return check_config(load_config(path))


def check_config(written: ServeConfig) -> tuple[dict[str, Any], AppArgs]:
    """The configuration to serve, and the checked arguments of its first Troupe application; all of them are checked.

    The environment variables TROUPE_HOST and TROUPE_PORT win over its `http_options`, as a container needs. A
    host that both leave open is 127.0.0.1: Ray Serve's own default is every address of the machine. API keys are
    replaced by their digests in the configuration, because Ray logs it. Imports Ray.

    Raises:
        ConfigError: something is wrong; it names the file, the key and the nearest known one.
    """
    config, name, folder = copy.deepcopy(written.config), written.name, written.folder
    try:
        ours = _applications(config)
        _check_ray_keys(config)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    checked = [read_args(app.get("args") or {}, source=f"{name}, {_args_of(app, ours)}") for app in ours]
    try:
        for app, args in zip(ours, checked, strict=True):
            _check_application(app, args, folder)
            _hide_keys(app.get("args") or {})
        _set_http_options(config)
        _check_ray_values(config)
        _check_certificates(config["http_options"], folder)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return config, checked[0]


def as_yaml(written: ServeConfig) -> str:
    """The text of a configuration file."""
    return yaml.safe_dump(written.config, sort_keys=False, allow_unicode=True)


def troupe_applications(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The applications of a configuration that are Troupe's."""
    return [app for app in config["applications"] if isinstance(app, dict) and app.get("import_path") == IMPORT_PATH]


def base_url(config: Mapping[str, Any], application: Mapping[str, Any] | None = None) -> str:
    """The URL of a Troupe application, by default the first, for clients on this machine."""
    http = config.get("http_options") or {}
    host = http.get("host", HOST)
    prefix = (application or troupe_applications(config)[0]).get("route_prefix", "/")
    reached = {"0.0.0.0": HOST, "::": "[::1]"}.get(host, host)
    scheme = "https" if http.get("ssl_certfile") else "http"
    return f"{scheme}://{reached}:{http.get('port', PORT)}{prefix.rstrip('/')}"


def _parsed(path: Path) -> dict[str, Any]:
    try:
        config = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: it is not a text in UTF-8; save it as UTF-8.") from None
    except RecursionError:
        raise ConfigError(f"{path}: it is nested too deeply.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not isinstance(config.get("applications"), list):
        raise ConfigError(f"{path}: expected a mapping with the key 'applications'.")
    return config


def _applications(config: dict[str, Any]) -> list[dict[str, Any]]:
    for index, app in enumerate(config["applications"]):
        if not isinstance(app, dict):
            raise ConfigError(f"applications[{index}]: write a mapping with the key 'import_path' (got {app!r}).")
        app.setdefault("name", _DEFAULT_NAME)
    ours = troupe_applications(config)
    if not ours:
        raise ConfigError(f"no application has import_path {IMPORT_PATH}.")
    return ours


def _args_of(app: Mapping[str, Any], ours: list[dict[str, Any]]) -> str:
    return "args" if len(ours) == 1 else f"args of application {app['name']!r}"


def _check_ray_keys(config: Mapping[str, Any]) -> None:
    from deployments.cli.ray_schema import unknown_keys  # imports Ray, which reads the environment then

    _refuse(unknown_keys(config))
    for index, app in enumerate(config["applications"]):
        deployments = app.get("deployments")
        if not isinstance(deployments, list | None):
            raise ConfigError(f"applications[{index}].deployments: write a list of mappings (got {deployments!r}).")
        names = [deployment.get("name") for deployment in deployments or [] if isinstance(deployment, dict)]
        _refuse(
            [
                f"applications[{index}].deployments: {name!r} is there twice; write one entry for it"
                for name in dict.fromkeys(names)
                if names.count(name) > 1
            ]
        )


def _check_ray_values(config: Mapping[str, Any]) -> None:
    from deployments.cli.ray_schema import wrong_values

    _refuse(wrong_values(config))
    if config.get("proxy_location") == "Disabled":
        raise ConfigError("proxy_location: Disabled leaves no HTTP server; write EveryNode or HeadOnly.")


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ConfigError("\n  ".join(faults))


def _set_http_options(config: dict[str, Any]) -> None:
    for section in ("http_options", "grpc_options"):
        given = config.get(section)
        if given is None:
            config.pop(section, None)
        elif not isinstance(given, dict):
            raise ConfigError(f"{section}: write a mapping of options, such as {{port: 8000}} (got {given!r}).")
        elif "port" in given:
            given["port"] = _port(given["port"], f"{section}.port")
    http = config["http_options"] = {"host": HOST, **config.get("http_options", {}), **_from_environment()}
    if http["host"] == "":
        raise ConfigError(f"http_options.host: write an address, such as {HOST} (got '').")


def _from_environment() -> dict[str, Any]:
    host, port = os.environ.get("TROUPE_HOST"), os.environ.get("TROUPE_PORT")
    return ({"host": host} if host else {}) | ({"port": _port(port, "TROUPE_PORT")} if port else {})


def _port(value: Any, place: str) -> int:
    port = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(port) is not int or not 0 < port < 2**16:
        raise ConfigError(f"{place} {value!r}: write a port's number, from 1 to 65535.")
    return port


def _check_certificates(http: Mapping[str, Any], folder: Path) -> None:
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        file = http.get(name)
        if file and not os.environ.get("RAY_ADDRESS") and not (folder / file).is_file():
            raise ConfigError(f"http_options.{name}: there is no file {str(folder / file)!r}.")


def _hide_keys(args: dict[str, Any]) -> None:
    """Replace keys by digests, because Ray logs an application's arguments."""
    api = args.get("api") or {}
    for name in ("api_keys", "admin_keys"):
        if api.get(name):
            api[name] = as_digests(api[name])


def _check_application(app: Mapping[str, Any], args: AppArgs, folder: Path) -> None:
    prefix = app.get("route_prefix", "/")
    if not isinstance(prefix, str) or not prefix.startswith("/") or {"{", "}"} & set(prefix):
        raise ConfigError(
            f"route_prefix of application {app['name']!r}: write a path such as / or /a (got {prefix!r})."
        )
    _check_deployments(app.get("deployments") or [], args)
    base = folder / (args.folder or "")
    remote = bool(os.environ.get("RAY_ADDRESS"))  # its nodes may have other folders
    if not remote and not base.is_dir():
        raise ConfigError(f"args.folder: there is no folder {str(base)!r}.")
    if not remote:
        _check_files(args, base)
        check_adapter_folders(args, base)
    for entry in (entry for entry in args.models if entry.adapter is None):
        check_loader(entry.loader, base)
        check_arguments(entry, base)
        if not remote:
            _check_folders(entry.id, entry.kwargs, base)
        if entry.loader == AUTO:
            _check_dtype(entry)


def _check_files(args: AppArgs, base: Path) -> None:
    if args.api.api_keys_file is not None:
        KeyFile(base / args.api.api_keys_file)
    for root in args.api.admin_roots:
        if not (base / root).is_dir():
            raise ConfigError(f"api.admin_roots: {root}: {missing(root, base)}")
    folders = [("api.record_dir", args.api.record_dir), ("state_dir", args.state_dir)]
    folders += [(f"model {entry.id!r}, profile_dir", entry.profile_dir) for entry in args.models]
    for place, name in folders:
        if name is not None and (fault := _unwritable(base / name)):
            raise ConfigError(f"{place}: {str(base / name)!r} cannot be made: {fault}.")


def _unwritable(folder: Path) -> str | None:
    """Why a folder cannot be made or written to; None if it can. Nothing is left there."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError as error:
        return error.strerror
    if not there.is_dir():
        return f"{str(there)!r} is a file"
    try:
        # Root may write by the permissions also where the file system, such as /proc, takes nothing.
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError:
        return f"{str(there)!r} is not writable"


def _check_deployments(deployments: Any, args: AppArgs) -> None:
    if not isinstance(deployments, list) or not all(isinstance(d, dict) and "name" in d for d in deployments):
        raise ConfigError("applications.deployments: expected a list of mappings with the key 'name'.")
    replicas = [f"ModelReplica-{name}" for name in args.pools] if args.pools else ["ModelReplica"]
    known = ["OpenAIIngress", *replicas]
    for deployment in deployments:
        if deployment["name"] not in known:
            raise ConfigError(
                f"deployments: there is none named {deployment['name']!r}{nearest(str(deployment['name']), known)}"
            )


def _check_dtype(entry: ModelEntry) -> None:
    asked = entry.kwargs.get("dtype")
    if asked is not None and str(asked).removeprefix("torch.") not in _DTYPES:
        raise ConfigError(f"model {entry.id!r}, kwargs.dtype: there is no {asked!r}{nearest(str(asked), _DTYPES)}.")


def _check_folders(model: str, kwargs: Mapping[str, Any], base: Path) -> None:
    try:
        check_folders(kwargs, base)
    except ModelLoadFailed as error:
        raise ConfigError(f"model {model!r}, kwargs.{error.message}") from None
