"""What `troupe serve` serves: a configuration file, or the configuration of one model that its arguments name."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any, cast

import yaml

from deployments.cli.serve_file import AUTO, HOST, PORT, ServeConfig, load_config, troupe_applications
from deployments.cli.serve_options import ServeOptions, flag, keys
from deployments.config.app import IMPORT_PATH
from deployments.config.yaml_text import RepeatedKey, read_yaml
from deployments.core.errors import ConfigError, ModelLoadFailed
from model_loaders.loader_name import parts
from model_loaders.local_folder import HUB_ID, check_checkpoint, found, hub_instead, is_mistyped, missing

SHIPPED = "serve_config.yaml"
_DEMO_ENTRY = {
    "id": "demo",
    "loader": "model_loaders.demo:load_model",
    "aliases": ["gpt-3.5-turbo-0613"],
    "preload": True,
}
_EXPECTED = "Give a configuration (.yaml), a model's folder, org/name, or loader.py:function."


def written_config(options: ServeOptions) -> ServeConfig:
    """The configuration that a command line means, not checked yet.

    An option wins over the file. Options of a model are refused with a file, which has options for each of its models.

    Raises:
        ConfigError: there is nothing of that name, or an option cannot be followed.
    """
    source = options.model or (SHIPPED if Path(SHIPPED).is_file() else None)
    if source is not None and source.endswith((".yaml", ".yml")):
        written = load_config(Path(source).expanduser())
        return _with_options(written, options, [name for name, key in keys().items() if not key.startswith("models[]")])
    entry = _DEMO_ENTRY if source is None else {**_entry(source), "pinned": True}
    application = {"name": "troupe", "route_prefix": "/", "import_path": IMPORT_PATH, "args": {"models": [dict(entry)]}}
    config = {"http_options": {"host": HOST, "port": PORT}, "applications": [application]}
    written = ServeConfig(config, source or "the demo model", Path.cwd())
    return _with_options(written, options, list(keys()))


def _entry(source: str) -> dict[str, Any]:
    """The entry under `models` of a folder, a loader or a name on the Hub. Paths are absolute."""
    path = found(source)
    if path.is_dir():
        try:
            check_checkpoint(path.resolve())
        except ModelLoadFailed as error:
            raise ConfigError(error.message) from None
        return {"id": path.resolve().name or "model", "loader": AUTO, "kwargs": {"model_name": str(path.resolve())}}
    place, name = parts(source)
    if place.endswith(".py"):
        file = found(place)
        if not file.is_file():
            raise ConfigError(f"{source}: {missing(place)}")
        loader = str(file.resolve()) + (f":{name}" if ":" in source else "")
        return {"id": file.stem, "loader": loader}
    if path.exists():
        raise ConfigError(f"{source} is a file. {_EXPECTED}")
    if re.fullmatch(r"[\w.]+:\w+", source):
        return {"id": place.rpartition(".")[2], "loader": source}
    if not HUB_ID.fullmatch(source):
        raise ConfigError(f"{source}: {missing(source)}")
    _check_hub(source)
    return {"id": source, "loader": AUTO, "kwargs": {"model_name": source}}


def _check_hub(name: str) -> None:
    """Refuse a name that the Hub does not have. If the Hub cannot be asked, the loader will find out."""
    if is_mistyped(name):
        raise ConfigError(f"{name}: {missing(name)} {hub_instead(name)}")
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if any(isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", "modules.json")):
        return
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{name}: {missing(name)} It is not in the Hub's cache either, and HF_HUB_OFFLINE is set.")
    try:
        HfApi().model_info(name, timeout=5)
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise ConfigError(f"{name}: {missing(name)} The Hub does not have it either.") from None
    except (HfHubHTTPError, OSError):
        return


def _with_options(written: ServeConfig, options: ServeOptions, allowed: list[str]) -> ServeConfig:
    config, name = copy.deepcopy(written.config), written.name
    for option, key in keys().items():
        value = getattr(options, option)
        if value is None or value is False or value == []:
            continue
        if option not in allowed:
            raise ConfigError(f"{flag(option)} is for a model that the command line names. Set {key} in {name}.")
        _set(config, key, _mapping(value) if option == "kwargs" else value, name)
    if options.replicas is not None or options.gpus is not None:
        _share_gpus(_application(config, name), options.replicas, options.gpus, name)
    return ServeConfig(config, name, written.folder)


def _set(config: dict[str, Any], key: str, value: Any, name: str) -> None:
    """Set a key of a configuration. A mapping adds to what is there."""
    *path, last = key.split(".")
    section = config if path[0] == "http_options" else _application(config, name)
    for step in path if path[0] in ("http_options", "args") else ["args", *path]:
        section = section["models"][0] if step == "models[]" else _section(section, step, name)
    if not isinstance(value, dict):
        section[last] = value
        return
    section = _section(section, last, name)
    for inner, item in value.items():
        if inner in section:
            raise ConfigError(f"--kwargs: another argument of the command sets {inner!r} too.")
        section[inner] = item


def _section(section: dict[str, Any], step: str, name: str) -> dict[str, Any]:
    """A section of a configuration, made if it is not there."""
    if section.get(step) is None:
        section[step] = {}
    if not isinstance(section[step], dict):
        raise ConfigError(f"{name}: {step}: write a mapping (got {section[step]!r}).")
    return cast(dict[str, Any], section[step])


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = read_yaml(text)
    except RepeatedKey as error:
        raise ConfigError(f"--kwargs {text!r}: {error}") from None
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--kwargs {text!r}: write a mapping, such as '{{dtype: bfloat16}}'.")
    return value


def _application(config: dict[str, Any], name: str) -> dict[str, Any]:
    ours = troupe_applications(config)
    if len(ours) != 1:
        raise ConfigError(f"{name} has {len(ours)} applications of Troupe. Set this option in it, for one of them.")
    return ours[0]


def _share_gpus(app: dict[str, Any], replicas: int | None, gpus: int | None, name: str) -> None:
    """Set the replicas of an application, and the GPUs of each: all GPUs divided by the replicas."""
    if (app.get("args") or {}).get("pools"):
        raise ConfigError(f"{name} has pools. Set replicas and gpus_per_replica of each pool in it.")
    deployment = _replica_deployment(app)
    if replicas is None:
        replicas = deployment.get("num_replicas") or gpus or 1
    if not isinstance(replicas, int) or replicas < 1:
        raise ConfigError(f"replicas: write a number from 1 (got {replicas!r}).")
    deployment["num_replicas"] = replicas
    if gpus is None:
        return
    if gpus < 0 or (gpus % replicas and replicas % gpus):
        raise ConfigError(f"--gpus {gpus}: write 0, or a multiple or a divisor of the number of replicas ({replicas}).")
    each = gpus // replicas if gpus % replicas == 0 else math.floor(10_000 * gpus / replicas) / 10_000
    _section(deployment, "ray_actor_options", name)["num_gpus"] = each
    for model in app["args"]["models"] if each > 1 else ():
        if model.get("loader") == AUTO:
            _section(model, "kwargs", name).setdefault("device_map", "auto")


def _replica_deployment(app: dict[str, Any]) -> dict[str, Any]:
    deployments = app["deployments"] = app.get("deployments") or []
    for deployment in deployments if isinstance(deployments, list) else ():
        if isinstance(deployment, dict) and deployment.get("name") == "ModelReplica":
            return deployment
    deployments.append({"name": "ModelReplica"})
    return cast(dict[str, Any], deployments[-1])
