"""Converts arguments that a model writes as plain text to the types of their JSON schemas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from deployments.openai.parsing.cursor import LITERALS, Cursor, Unreadable

Schemas = Mapping[str, Mapping[str, Any]]
"""The tools of a request: name to the JSON schema of the arguments."""

_DEEPEST = 32
_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    type(None): "null",
    dict: "object",
    list: "array",
}
_ANY = frozenset(_KINDS.values())


def loads(text: str) -> Any:
    """The JSON value of a text; None if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def dumps(arguments: Any) -> str:
    """Arguments as JSON. A number that JSON does not have (NaN, Infinity) becomes a text.

    Raises:
        ValueError: they are not an object, or have a value that JSON does not have.
    """
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are not an object")
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise ValueError(str(error)) from error
    except ValueError:
        arguments = _finite(arguments)
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(arguments)


def is_text(text: str) -> bool:
    """Whether a string can be sent: a half of a surrogate pair, which JSON can spell, cannot."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def typed(text: str, key: str, root: Mapping[str, Any]) -> Any:
    """An argument of a tool, written as bare text.

    A value that its schema allows is taken: of several types the text is read as the narrowest, and as a string if
    nothing else fits. Without a type only objects and lists are more than text. Python's names of constants are read as
    well, and its objects and lists if no string may stand there.

    Args:
        key: of the argument.
        root: the schema of the tool's arguments.
    """
    schema = _property(root, key, root, 0)
    kinds = _kinds(schema, root, 0)
    value = _read(text.strip(), {"object", "array"} if kinds == _ANY else kinds)
    named = _named(schema)
    if named and value not in named:
        return next((each for each in named if each in (text, text.strip())), text if value is None else value)
    return text if value is None and not _is_null(text, kinds) else value


def takes_text(key: str, root: Mapping[str, Any]) -> bool:
    """Whether the schema of an argument says that it may be a text."""
    kinds = _kinds(_property(root, key, root, 0), root, 0)
    return "string" in kinds and kinds != _ANY


def parts_of(key: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool whose arguments are the members of one argument of another, or its items."""
    schema = _property(root, key, root, 0)
    schema = (_resolved(schema, root) or schema) if isinstance(schema, Mapping) else {}
    definitions = {word: root[word] for word in ("$defs", "definitions") if word in root}
    return {"additionalProperties": schema.get("items"), **schema, **definitions}


def _read(text: str, kinds: frozenset[str] | set[str]) -> Any:
    """The value of a text if it is of one of the kinds, but for strings; else None."""
    value = _number(loads(text), kinds)
    if value is None and (text in LITERALS or "string" not in kinds):
        value = _number(_literal(text), kinds)
    return value if value is not None and not isinstance(value, str) and _kind(value) & kinds else None


def _literal(text: str) -> Any:
    """A value as Python or JSON writes it, but for numbers and strings; None if it is none."""
    cursor = Cursor(text)
    try:
        value = cursor.value() if text in LITERALS or text.startswith(("{", "[", "(")) else None
        dumps({"value": value})
    except (Unreadable, ValueError):
        return None
    return None if text[cursor.place :].strip() else value


def _number(value: Any, kinds: frozenset[str] | set[str]) -> Any:
    """A fraction as the whole number that it is, where only whole numbers may stand; infinite ones are none."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if "number" not in kinds and value.is_integer():
            return int(value)
    return value


def _is_null(text: str, kinds: frozenset[str]) -> bool:
    """Whether a text says that there is no value."""
    if kinds == _ANY or "null" not in kinds:
        return False
    return text.strip() in ("null", "None")


def _kind(value: Any) -> set[str]:
    kind = _KINDS.get(type(value), "string")
    return {kind, "number"} if kind == "integer" else {kind}


def _named(schema: Any) -> list[Any]:
    """The values that a schema lists."""
    if not isinstance(schema, Mapping):
        return []
    listed = schema.get("enum")
    return [*(listed if isinstance(listed, list) else []), *([schema["const"]] if "const" in schema else [])]


def _property(schema: Any, key: str, root: Mapping[str, Any], depth: int) -> Any:
    """The schema of a key of an object; None if nothing describes it."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return None
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and key in properties:
        return properties[key]
    patterns = schema.get("patternProperties")
    for pattern, described in patterns.items() if isinstance(patterns, Mapping) else ():
        if _matches(pattern, key):
            return described
    parts = [_resolved(schema, root)] + [part for word in ("allOf", "anyOf", "oneOf") for part in _parts(schema, word)]
    found = (_property(part, key, root, depth + 1) for part in parts if part is not None)
    return next((each for each in found if each is not None), schema.get("additionalProperties"))


def _matches(pattern: str, key: str) -> bool:
    try:
        return re.search(pattern, key) is not None
    except re.error:
        return False


def _kinds(schema: Any, root: Mapping[str, Any], depth: int) -> frozenset[str]:
    """The types of JSON values that a schema allows."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return _ANY
    kinds = _ANY
    declared = schema.get("type")
    names = [declared] if isinstance(declared, str) else declared if isinstance(declared, list) else None
    if names is not None:
        known = {each for each in names if each in _ANY}
        kinds &= (known | ({"integer"} if "number" in known else set())) or _ANY
    if listed := _named(schema):
        kinds &= frozenset().union(*map(_kind, listed))
    for word in ("anyOf", "oneOf"):
        if parts := _parts(schema, word):
            kinds &= frozenset().union(*(_kinds(part, root, depth + 1) for part in parts))
    for part in (_resolved(schema, root), *_parts(schema, "allOf")):
        if part is not None:
            kinds &= _kinds(part, root, depth + 1)
    if isinstance(excluded := schema.get("not"), Mapping) and excluded.keys() == {"type"}:
        kinds = (kinds - _kinds(excluded, root, depth + 1)) or kinds
    return (kinds | {"null"}) if schema.get("nullable") is True and kinds != _ANY else kinds


def _parts(schema: Mapping[str, Any], word: str) -> list[Any]:
    parts = schema.get(word)
    return parts if isinstance(parts, list) else []


def _resolved(schema: Mapping[str, Any], root: Any) -> Any:
    """What a schema's $ref points at within the tool's parameters; None without one."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for step in reference.removeprefix("#").strip("/").split("/") if reference.strip("#/") else []:
        step = step.replace("~1", "/").replace("~0", "~")
        found = found.get(step) if isinstance(found, Mapping) else None
    return found


def _finite(value: Any) -> Any:
    """A value without numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
