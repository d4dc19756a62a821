"""Models that `POST /admin/models` has added, and the file that keeps them."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deployments.config.api import ApiOptions
from deployments.config.app import AppArgs
from deployments.config.booleans import booleans_for_numbers
from deployments.config.explain import explained, read_faults
from deployments.config.loader_file import check_arguments
from deployments.config.model import ModelEntry
from deployments.config.sources import Spec, adapter_spec, spec_like
from deployments.core.errors import BadRequest, ConfigError, PathNotAllowed, Unavailable
from deployments.registry.adapter_check import AdapterCheck
from deployments.registry.files import folder_files
from deployments.registry.stamp import Stamp

logger = logging.getLogger("troupe.registry")

EntryFaults = Callable[[ModelEntry, ApiOptions], list[str]]
"""What the schema of a model's entry does not see: each fault after its key."""

_HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def posted_spec(
    args: AppArgs, body: Mapping[str, Any], found: Mapping[str, Spec], check: AdapterCheck, faults: EntryFaults
) -> Spec:
    """The model that a request describes: `id`, and `like` and `model_name`, or `base` and `adapter`; optionally
    `aliases`, `api`, and `engine` for a model. Blocks.

    Args:
        found: the models that came while the server runs, by name.
        check: reads adapters.
        faults: as for an entry of the configuration.

    Raises:
        BadRequest: a field cannot be used, the adapter cannot be served, or the folder has no model.
        PathNotAllowed: the folder is not below one of `api.admin_roots`, or the Hub's name is not allowed.
    """
    is_adapter = "base" in body or "adapter" in body
    needed, others = (
        (("base", "adapter"), ("like", "model_name", "engine")) if is_adapter else (("like", "model_name"), ())
    )
    for key in needed:
        if body.get(key) is None:
            raise BadRequest(f"Missing required field {key!r}.", param=key, code="missing_required_parameter")
    for key in others:
        if key in body:
            raise BadRequest(f"Invalid {key!r}: an adapter has this of its base; leave it out.", param=key)
    fields = {key: body[key] for key in ("aliases", "engine", "api") if body.get(key) is not None}
    for line in booleans_for_numbers(fields, ModelEntry):
        raise _invalid(*line.split(": ", 1))
    try:
        spec = _adapter(args, body, found, check, fields) if is_adapter else _model(args, body, fields)
    except ValidationError as error:
        fault = next(iter(read_faults(error)))
        raise _invalid(fault.place, explained(fault, ModelEntry, "model")) from None
    for line in faults(spec.entry, args.api):
        raise _invalid(*line.split(": ", 1))
    return spec


def _invalid(place: str, reason: str) -> BadRequest:
    return BadRequest(f"Invalid {place!r}: {reason}{'' if reason.endswith('.') else '.'}", param=place)


def _model(args: AppArgs, body: Mapping[str, Any], fields: Mapping[str, Any]) -> Spec:
    like = args.by_name().get(body["like"])
    if like is None or like.base is not None:
        known = ", ".join(entry.id for entry in args.models if entry.base is None)
        raise BadRequest(
            f"Invalid 'like': there is no model {body['like']!r} in the configuration (it has {known}).", param="like"
        )
    source = _allowed(args, body["model_name"], "model_name")
    if os.path.isdir(source) and not any(file.has_weights for file in folder_files(Path(source))):
        raise _invalid("model_name", f"{body['model_name']!r} has no weights")
    made = _written(source)
    spec = spec_like(like, "model_name", name=body["id"], source=source, origin="post", created=made, **fields)
    try:
        check_arguments(spec.entry, Path(args.folder or ""))
    except ConfigError as error:
        raise _invalid("like", str(error)) from None
    return spec


def _adapter(
    args: AppArgs, body: Mapping[str, Any], found: Mapping[str, Spec], check: AdapterCheck, fields: Mapping[str, Any]
) -> Spec:
    parent = found.get(body["base"])
    base = args.by_name().get(body["base"]) if parent is None else parent.entry
    if base is None or base.base is not None:
        fault = f"no model has the name {body['base']!r}" if base is None else f"{base.id!r} is an adapter itself"
        raise BadRequest(f"Invalid 'base': {fault}; name the model that the adapter was trained on.", param="base")
    if body["base"] in base.variants:
        raise BadRequest(
            f"Invalid 'base': {body['base']!r} is a variant, and an adapter does not have its default fields; send "
            f"{base.id!r}.",
            param="base",
        )
    source = _allowed(args, body["adapter"], "adapter")
    made = _written(source)
    spec = adapter_spec(base, parent, name=body["id"], source=source, origin="post", created=made, **fields)
    if (reason := check.reason(spec.entry)) is not None:
        raise BadRequest(f"Invalid 'adapter' {body['adapter']!r}: {reason}", param="adapter")
    return spec


def _written(source: str) -> int:
    return Stamp.of_files(folder_files(Path(source))).written_at or int(time.time())


def _allowed(args: AppArgs, name: str, param: str) -> str:
    """The folder with its links resolved, or the name of a model on the Hub."""
    if param == "model_name" and _HUB_NAME.fullmatch(name) and not Path(name).exists():
        if args.hub is not None and hub_allows(args, name):
            return name
        raise PathNotAllowed(
            f"{name!r} is not a folder, and hub.allow in the configuration does not allow this name.",
            param="model_name",
        )
    real = os.path.realpath(name)
    for root in args.api.admin_roots:
        if Path(real).is_relative_to(os.path.realpath(root)):
            if not os.path.isdir(real):
                raise BadRequest(f"Invalid {param!r}: {name!r} is not a folder.", param=param)
            return real
    raise PathNotAllowed(f"{name!r} is not below one of the folders in api.admin_roots.", param=param)


def hub_allows(args: AppArgs, name: str) -> bool:
    """Whether clients may request a model of the Hub by its name."""
    return (
        args.hub is not None
        and _HUB_NAME.fullmatch(name) is not None
        and any(fnmatchcase(name, pattern) for pattern in args.hub.allow)
    )


class PostedFile:
    """`models.json`: the added models, which outlive the process. A whole file replaces the one before."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[str, Spec]:
        """The models by id; none, with an error in the log, if the file cannot be read."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {spec.entry.id: spec for spec in self._valid(found["models"])}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.error("%s cannot be read; the models that were added are not there: %s", self._path, error)
            return {}

    def _valid(self, found: Sequence[Any]) -> Iterator[Spec]:
        for each in found:
            try:
                yield Spec.model_validate(each)
            except ValidationError as error:
                fault = next(read_faults(error))
                logger.error("%s: a model is left out: %s: %s", self._path, fault.place, fault.reason)

    def write(self, specs: Mapping[str, Spec]) -> None:
        """Replace the file. Blocks.

        Raises:
            Unavailable: it cannot be written.
        """
        try:
            self._replace(specs)
        except OSError as error:
            raise Unavailable(
                f"{self._path} cannot be written: {error.strerror}. Set state_dir to a folder that can be written."
            ) from error

    def _replace(self, specs: Mapping[str, Spec]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(f".{os.getpid()}.tmp")
        with fresh.open("w", encoding="utf-8") as file:
            json.dump({"models": [spec.model_dump(mode="json") for spec in specs.values()]}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)


def posted_file(args: AppArgs) -> PostedFile:
    """The file of an application: in its `state_dir`, else in one of its own below ~/.local/state/troupe."""
    if args.state_dir is not None:
        return PostedFile(Path(args.folder or "", args.state_dir) / "models.json")
    place = re.sub(r"[^\w.-]+", "-", os.path.abspath(args.folder or ".")).strip("-")
    return PostedFile(Path("~/.local/state/troupe").expanduser() / place / "models.json")
