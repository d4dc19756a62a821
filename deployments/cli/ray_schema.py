"""The sections of a configuration that are Ray Serve's own, compared with its schema.

Ray Serve ignores a key that it does not know, and finds some wrong values only after it has started. Ray reads settings
when it is imported, so this module is imported after they are set.
"""

from __future__ import annotations

import inspect
import os
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeDeploySchema

from deployments.config.booleans import booleans_for_numbers
from deployments.config.explain import Fault, nearest, read_faults

_ENVIRONMENT = {
    key: Any
    for key in sorted({*RuntimeEnv.known_fields, *inspect.signature(RuntimeEnv).parameters} - {"kwargs"})
    if not key.startswith("_")
}
"""The keys of a `runtime_env`; plugins add others."""

_TYPE = ": input should be a valid "
"""How pydantic says that a value has none of the types it may have."""
_IMPORTED = ("policy", "request_router_class", "deployment_actors", "args")


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """A line for every key that Ray Serve would ignore, with its place and the nearest known key."""
    return list(_unknown(config, ServeDeploySchema, ""))


def wrong_values(config: Mapping[str, Any]) -> list[str]:
    """A line for every value that Ray Serve would refuse, with its place and what is expected."""
    config = _without_imports(config)
    faults = [*booleans_for_numbers(config, ServeDeploySchema), *_refused(config, ServeDeploySchema, "")]
    for place, section in _sections(config, ""):
        autoscaling = section.get("autoscaling_config")
        if isinstance(autoscaling, dict):
            faults += _refused(autoscaling, AutoscalingConfig, f"{place}.autoscaling_config")
        resources = section.get("resources")
        for name, amount in resources.items() if isinstance(resources, dict) else ():
            if type(amount) not in (int, float):
                faults.append(f"{place}.resources.{name}: write a number (got {amount!r})")
        environment = section.get("runtime_env")
        if isinstance(environment, dict) and "env_vars" in environment:
            faults += _wrong_variables(environment["env_vars"], f"{place}.runtime_env.env_vars")
    return list(dict.fromkeys(faults))


def _unknown(value: Any, expected: Any, place: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown(item, expected, f"{place}[{index}]")
    known = _keys(expected) if isinstance(value, dict) else {}
    for key, item in value.items() if known else ():
        inner = f"{place}.{key}".removeprefix(".")
        if key in known:
            yield from _unknown(item, known[key], inner)
        else:
            yield f"{inner}: unknown key{nearest(str(key), known)}"


def _keys(expected: Any) -> dict[str, Any]:
    """The keys of a section and what their values are; empty if any key may be there."""
    if isinstance(expected, dict):
        return {} if "RAY_RUNTIME_ENV_PLUGINS" in os.environ else expected
    schema = _schema(expected)
    if schema is None:
        return {}
    untyped = {"runtime_env": _ENVIRONMENT, "autoscaling_policy": AutoscalingPolicy}
    return {name: untyped.get(name, field.annotation) for name, field in schema.model_fields.items()}


def _schema(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `Optional[List[Model]]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in typing.get_args(annotation) if (found := _schema(part))), None)


def _without_imports(value: Any) -> Any:
    """A copy without what the schema imports to check it: it can be beside the file, or only on the nodes."""
    if isinstance(value, list):
        return [_without_imports(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_imports(item) for key, item in value.items() if key not in _IMPORTED}
    return value


def _refused(value: Mapping[str, Any], schema: type[BaseModel], place: str) -> Iterator[str]:
    try:
        schema.model_validate(value)
    except ValidationError as error:
        lines: dict[str, list[str]] = {}
        for fault in read_faults(error):
            line = _line(fault, value, place)
            lines.setdefault(line.partition(":")[0], []).append(line)
        for found in lines.values():
            # Of a number or a text, the number's limit is the fault.
            yield from [line for line in found if _TYPE not in line] or found
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        yield f"{place or 'applications'}: {error}"


def _line(fault: Fault, value: Any, place: str) -> str:
    """The fault at the last part of its path that is in the configuration: unions add names of their types."""
    for step in fault.path:
        inside = isinstance(value, list | dict) and step in (value if isinstance(value, dict) else range(len(value)))
        if not inside:
            break
        value = value[step]
        place += f"[{step}]" if isinstance(step, int) else f".{step}"
    place = place.removeprefix(".")
    if fault.missing:
        return f"{place}.{fault.path[-1]}: missing".removeprefix(".")
    got = "" if isinstance(value, dict) else f" (got {fault.got})"
    return f"{place or 'applications'}: {fault.reason}{got}"


def _sections(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every application, deployment and `ray_actor_options`."""
    for name in ("applications", "deployments", "ray_actor_options"):
        found = value.get(name) if isinstance(value, dict) else None
        for index, section in enumerate(found if isinstance(found, list) else [found]):
            if isinstance(section, dict):
                inner = f"{place}.{name}" + (f"[{index}]" if isinstance(found, list) else "")
                inner = inner.removeprefix(".")
                yield inner, section
                yield from _sections(section, inner)


def _wrong_variables(variables: Any, place: str) -> Iterator[str]:
    if not isinstance(variables, dict):
        yield f"{place}: write a mapping of names to texts (got {variables!r})"
        return
    for name, value in variables.items():
        if not isinstance(value, str):
            yield f"{place}.{name}: write a text, in quotes (got {value!r})"
