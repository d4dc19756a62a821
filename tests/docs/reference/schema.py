"""JSON schemas as the words of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
_LARGE = 2**31 - 1
_WORDS = {"string": "text", "boolean": "true, false", "null": "null"}


def resolved(schema: Schema, components: Mapping[str, Schema]) -> Schema:
    """What a schema refers to; None among alternatives is left out if there is only one other."""
    if "$ref" in schema:
        return components[schema["$ref"].rpartition("/")[2]]
    others = [item for item in schema.get("anyOf", []) if item.get("type") != "null"]
    return resolved(others[0], components) if len(others) == 1 else schema


def type_of(schema: Schema, components: Mapping[str, Schema]) -> str:
    """A schema in words, such as `number, 0 to 1`."""
    schema = resolved(schema, components)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            words = [type_of(item, components) for item in schema[key]]
            return " or ".join(dict.fromkeys(word for word in words if word != "null"))
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type")
    if kind == "array":
        items = type_of(schema.get("items", {}), components)
        return f"list of {items}" if items != "any" else "list"
    if kind in ("integer", "number"):
        return f"{kind}{_limits(schema)}"
    return _WORDS.get(str(kind), str(kind or "any"))


def _limits(schema: Schema) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    above = ">" if "exclusiveMinimum" in schema else "from"
    if high is not None and abs(high) < _LARGE:
        return f", {f'> {low:.12g} to' if above == '>' else f'{low:.12g} to'} {high:.12g}"
    return f", {above} {low:.12g}" if low is not None and abs(low) < _LARGE else ""


def default_of(schema: Schema) -> str:
    """The default of a field; nothing if it is empty or null."""
    default = schema.get("default")
    return "" if default in (None, "", [], {}) and default is not False else f"`{json.dumps(default)}`"


def fields(schema: Schema, components: Mapping[str, Schema], place: str = "") -> Iterator[tuple[str, Schema, bool]]:
    """Every field of an object and of the objects in it: its path, its schema, and whether it is always there."""
    schema = resolved(schema, components)
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        path = f"{place}{name}"
        yield path, field, name in required
        yield from _inner(field, components, path)


def _inner(field: Schema, components: Mapping[str, Schema], path: str) -> Iterator[tuple[str, Schema, bool]]:
    inner = resolved(field, components)
    if inner.get("type") == "array":
        inner, path = resolved(inner.get("items", {}), components), f"{path}[]"
    for part in inner.get("anyOf", inner.get("oneOf", [inner])):
        yield from fields(part, components, f"{path}.")
