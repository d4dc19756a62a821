"""The tables of docs/reference/configuration.md: keys, values and defaults are the code's, the prose is the page's."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, TypeAdapter

from deployments.config.api import ApiOptions, BatchOptions, CaptureOptions
from deployments.config.app import AppArgs, Pool
from deployments.config.engine import EngineOptions
from deployments.config.model import AdapterOptions, ModelEntry
from deployments.config.sources import FolderSource, HubSource
from deployments.core.model_card import ModelOptions
from tests.docs.reference.schema import type_of

SECTIONS: dict[str, Any] = {
    "args": AppArgs,
    "pools": Pool,
    "models": ModelEntry,
    "folders": FolderSource,
    "hub": HubSource,
    "models[].engine": EngineOptions,
    "models[].api": ModelOptions,
    "models[].adapters": AdapterOptions,
    "api": ApiOptions,
    "api.captures": CaptureOptions,
    "api.batches": BatchOptions,
}
"""The schema of each section, by its heading."""

Row = tuple[str, str, str, str]


def table(section: str, shown: str) -> str:
    """A section's table.

    Args:
        shown: the table that is on the page; its prose stays.
    """
    prose = {row[0]: row for row in rows(shown)}
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for key, value, default, description in _keys(SECTIONS[section]):
        said = prose.get(key, (key, "", "", description))
        lines.append(f"| `{key}` | {value} | {default or said[2]} | {said[3]} |")
    return "\n".join(lines)


def rows(shown: str) -> Iterator[Row]:
    """The rows of a table on the page."""
    yield from re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*?) ?\| (.*?) \|$", shown, re.MULTILINE)


def _keys(schema: Any) -> Iterator[Row]:
    """Key, value, default (empty if the page has to say it) and description."""
    described = TypeAdapter(schema).json_schema()
    components = described.get("$defs", {})
    for name, field in described["properties"].items():
        value = type_of(field, components).replace("object", "mapping")
        value = "mapping" if name in ("engine", "api") else value.replace("list of mapping", "list of mappings")
        description = field.get("description", "")
        yield name, value, _default(name, _default_value(schema, name)), description


def _default_value(schema: Any, name: str) -> Any:
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        field = schema.model_fields[name]
        return ... if field.is_required() else field.get_default(call_default_factory=True)
    (found,) = [each for each in dataclasses.fields(schema) if each.name == name]
    return found.default if found.default is not dataclasses.MISSING else found.default_factory()  # type: ignore[misc]


def _default(name: str, value: Any) -> str:
    if value is ...:
        return "required"
    if isinstance(value, bool | str):
        return f"`{json.dumps(value)}`" if isinstance(value, bool) else f"`{value}`" if value else ""
    if isinstance(value, int) and (name.endswith("_bytes") or name.startswith("media_max")) and value >= 2**10:
        unit = 2**20 if value % 2**20 == 0 else 2**10
        word = ("Mi" if unit == 2**20 else "Ki") + ("B" if name.endswith("_bytes") else "")
        return f"`{value}` ({value // unit} {word})" if value % unit == 0 else f"`{value}`"
    return f"`{value:g}`" if isinstance(value, int | float) else ""
