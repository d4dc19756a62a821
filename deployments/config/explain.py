"""What pydantic finds wrong, in words: each fault with its place; those of a configuration with the fix."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pydantic import ValidationError

from deployments.core.errors import ConfigError, shown


def config_error(faults: list[str], source: str) -> ConfigError:
    """Returns one error that lists all faults, one per line."""
    lines = "\n".join(f"  {fault}" for fault in faults)
    return ConfigError(f"{source}:\n{lines}")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a validation, in words.

    Attributes:
        path: of the value: keys and indexes.
        place: the path as text, `models[0].engine`; empty for the whole.
        reason: what is wrong.
        got: the value, cut if it is long.
        unknown: nobody knows the key at the end of the path.
        missing: the value is not there.
    """

    path: tuple[int | str, ...]
    place: str
    reason: str
    got: str
    unknown: bool = False
    missing: bool = False


def read_faults(error: ValidationError) -> Iterator[Fault]:
    """What pydantic has found, in its order."""
    return map(_fault, error.errors(include_url=False, include_context=False))


_OBJECTS = {"dict_type", "model_type", "model_attributes_type", "dataclass_type"}


def _fault(found: Any) -> Fault:
    reason = found["msg"].removeprefix("Value error, ").replace(" after validation", "")
    if found["type"] in _OBJECTS:  # pydantic names its own classes here.
        reason = "input should be an object, with keys and values"
    return Fault(
        path=found["loc"],
        place=_place(found["loc"]),
        reason=reason[:1].lower() + reason[1:],
        got=shown(found["input"]),
        unknown=found["type"] in ("extra_forbidden", "unexpected_keyword_argument"),
        missing=found["type"] in ("missing", "missing_keyword_only_argument"),
    )


def _place(path: tuple[int | str, ...]) -> str:
    # pydantic's name for a key itself comes after the key.
    steps = [step for step in path if step != "[key]"]
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def descriptions(error: ValidationError, schema: type) -> list[str]:
    """The faults of a configuration of this schema, each with its place and the fix."""
    return [": ".join(filter(None, (fault.place, explained(fault, schema)))) for fault in read_faults(error)]


def explained(fault: Fault, schema: type, root: str = "args") -> str:
    """What is wrong with a value, and the fix.

    Args:
        root: what the schema describes, for a key that belongs in another section of it.
    """
    if fault.unknown:
        return f"unknown key{_meant(fault.path, schema, root)}"
    if fault.missing:
        return "missing"
    # The whole configuration may contain keys, and says nothing that the reason does not.
    return fault.reason + (f" (got {fault.got})" if fault.path and "; got " not in fault.reason else "")


def nearest(wrong: str, known: Iterable[str]) -> str:
    """What an unknown name may mean, in parentheses, for the end of a message."""
    names = list(known)
    close = sorted((key for key in names if key.startswith(wrong)), key=len)
    close = close or difflib.get_close_matches(wrong, names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(names)})"


def _meant(path: tuple[int | str, ...], schema: type, root: str) -> str:
    """The section that a key belongs in, or the nearest key of its own section."""
    wrong = str(path[-1])
    homes = list(_homes(schema, wrong, root))
    return f" (it belongs in {' or '.join(homes)})" if homes else nearest(wrong, _section(schema, path[:-1]))


def _homes(schema: Any, key: str, place: str) -> Iterator[str]:
    """The sections that have a key."""
    known = _fields(schema)
    if key in known:
        yield place
    for name, field in known.items():
        annotation = getattr(field, "annotation", None)
        items = typing.get_args(annotation)
        origin = typing.get_origin(annotation)
        many = "[]" if origin is list else ".<name>" if origin is dict else ""
        yield from _homes(items[-1] if items else annotation, key, f"{place}.{name}{many}")


def _section(schema: Any, path: tuple[int | str, ...]) -> dict[str, Any]:
    """The fields of the section at a place of the configuration."""
    for part in path:
        items = typing.get_args(schema)
        # An index of a list or a name in a mapping: any of its items has the same fields.
        schema = items[-1] if items else getattr(_fields(schema).get(str(part)), "annotation", None)
    return _fields(schema)


def _fields(schema: Any) -> dict[str, Any]:
    if is_dataclass(schema):
        return {field.name: field for field in fields(schema)}
    return dict(getattr(schema, "model_fields", None) or {})
