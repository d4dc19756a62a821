"""Messages for the faults of a configuration, each with its place and the fix."""

from __future__ import annotations

import difflib
import typing
from typing import Any

from deployments.core.errors import ConfigError


def config_error(faults: list[str], source: str) -> ConfigError:
    """Returns one error that lists all faults, one per line."""
    lines = "\n".join(f"  {fault}" for fault in faults)
    return ConfigError(f"{source}:\n{lines}")


def described(fault: Any, schema: type) -> str:
    """Returns the message for a fault that pydantic found in a configuration of this schema."""
    place = _place(fault["loc"])
    if fault["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: unknown key{_nearest(fault['loc'], schema)}"
    if fault["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{place}: missing"
    shown = repr(fault["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{place}: {fault['msg'].removeprefix('Value error, ')} (got {shown})"


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "args"


def _nearest(loc: tuple[int | str, ...], schema: type) -> str:
    known, wrong = list(_section(schema, loc[:-1])), str(loc[-1])
    close = [key for key in known if key.startswith(wrong)] or difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _section(schema: Any, path: tuple[int | str, ...]) -> dict[str, Any]:
    """The fields of the section at a place of the configuration."""
    for part in path:
        items = typing.get_args(schema)
        # An index of a list or a name in a mapping: any of its items has the same fields.
        schema = items[-1] if items else getattr(_fields(schema).get(str(part)), "annotation", None)
    return _fields(schema)


def _fields(schema: Any) -> dict[str, Any]:
    return dict(getattr(schema, "model_fields", None) or getattr(schema, "__dataclass_fields__", {}))
