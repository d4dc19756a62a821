"""Finds `true` and `false` given for numbers, which pydantic takes for 1 and 0."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

from pydantic import BaseModel


def booleans_for_numbers(value: Any, expected: Any, place: str = "") -> Iterator[str]:
    """A line with its place for every boolean in a configuration that is to be a number.

    Args:
        expected: the type of the value: a model, a dataclass, or an annotation.
    """
    kinds = _kinds(expected)
    if isinstance(value, bool):
        if bool not in kinds and {int, float} & set(kinds):
            yield f"{place}: write a number (got {str(value).lower()})"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            for kind in kinds:
                yield from booleans_for_numbers(item, _inner(kind, key), f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            for kind in kinds:
                yield from booleans_for_numbers(item, _inner(kind, index), f"{place}[{index}]")


def _kinds(expected: Any) -> tuple[Any, ...]:
    """The types of a union, or the type itself."""
    is_union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    return typing.get_args(expected) if is_union else (expected,)


def _inner(kind: Any, key: Any) -> Any:
    """The type of a section's field, of a mapping's values or of a list's items; None for anything else."""
    if isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel)):
        return typing.get_type_hints(kind).get(key)
    items = [item for item in typing.get_args(kind) if item is not ...]
    return items[-1] if items else None
