"""Reads the arguments of a call that stand between markers of their own, or on lines of their own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import regex

from deployments.openai.parsing.cursor import ANY, Cursor, Incomplete, Scan, Unreadable, pattern_of
from deployments.openai.parsing.syntax import CallSyntax
from deployments.openai.parsing.typed import parts_of, takes_text, typed

_CDATA = regex.compile(r"\s*<!\[CDATA\[(.*?)\]\]>", regex.DOTALL)


def read_arguments(cursor: Cursor, syntax: CallSyntax, name: str, schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments up to the end of a call: only one that was closed is a call.

    Args:
        name, schema: of the tool.

    Raises:
        Incomplete: more text is needed.
        Unreadable: they are not written so.
    """
    found: list[tuple[str, Any]] = []
    declared, begins = schema.get("properties"), regex.compile(_argument(syntax))
    # What may follow a value that is not closed; None if nothing says. One that is closed by its key is closed.
    others = set(declared or ()) if declared or ANY in syntax.value_close else None
    try:
        while not cursor.maybe(syntax.close):
            key = cursor.need(begins)["key"]
            others = None if others is None else others - {key}
            read = _line if syntax.shape == "lines" else _value
            found.append((key, read(cursor, syntax, others, key, schema)))
    except Incomplete as more:
        raise Incomplete(name, dict(found)) from more
    return found


def _line(cursor: Cursor, syntax: CallSyntax, others: Set[str] | None, key: str, schema: Mapping[str, Any]) -> Any:
    """A value in quotes or brackets, or the text up to the next argument or the call's end."""
    start = cursor.place
    with contextlib.suppress(Unreadable):
        value, text = cursor.value(), cursor.text[start : cursor.place]
        if not _up_to_end(cursor, syntax, others).strip():
            return value if isinstance(value, str) else typed(text.strip(), key, schema)
    cursor.place = start
    return typed(_up_to_end(cursor, syntax, others).strip(), key, schema)


def _value(cursor: Cursor, syntax: CallSyntax, others: Set[str] | None, key: str, schema: Mapping[str, Any]) -> Any:
    """A value that is bare text, or elements if it has them and is not a text."""
    # Where the end of a value is not always the same, it has the key in it.
    close = syntax.value_close.replace(ANY, key)
    if (data := cursor.take(_CDATA)) is not None:
        cursor.maybe(close)
        return typed(data[1], key, schema)
    start = cursor.place
    text = _up_to_end(cursor, replace(syntax, value_close=close), others)
    closed = cursor.place > start + len(text)
    text = text.removeprefix("\n") if syntax.key_close.endswith("\n") else text
    text = text.removesuffix("\n") if close.startswith("\n") or not closed else text
    in_elements = ANY in syntax.value_close and not takes_text(key, schema)
    if in_elements and Cursor(text).maybe(syntax.key_open):
        members = read_arguments(Cursor(text + syntax.close), syntax, key, parts_of(key, schema))
        return [value for _, value in members] if {key for key, _ in members} == {"item"} else dict(members)
    return typed(text, key, schema)


def _up_to_end(cursor: Cursor, syntax: CallSyntax, others: Set[str] | None) -> str:
    """The text up to the end of a value. What closes it is taken; if nothing does, another argument has to follow."""
    start = cursor.place
    while True:
        found = cursor.find(_ends_of(syntax, cursor.final))
        if found["key"] is None or others is None or found["key"] in others:
            return cursor.text[start : found.start()]
        cursor.place += 1


@functools.lru_cache(maxsize=256)
def _argument(syntax: CallSyntax) -> str:
    """A pattern of what stands before the value of an argument."""
    key = r"[\w.\-]++" if syntax.shape == "lines" else r"[^\s<>\"'=\[\]]++"
    return rf"{pattern_of(syntax.key_open)}\s*(?P<key>{key}){pattern_of(syntax.key_close)}"


@functools.lru_cache(maxsize=256)
def _ends_of(syntax: CallSyntax, final: bool) -> Scan:
    """Finds what ends a value: what closes it, the next argument, or the end of the call."""
    close, key_open, value_close = map(pattern_of, (syntax.close, syntax.key_open, syntax.value_close))
    argument = _argument(syntax)
    # White space before an end is the value's.
    call, argument, value = (pattern.removeprefix(r"\s*") for pattern in (close, argument, value_close))
    if syntax.shape == "lines":
        return Scan({"call": f"(?={call})", "argument": rf"(?=\n\s*{argument})"})
    # What looks like the end of a call is one if calls go on, or the text ends.
    after = [pattern_of(each) for each in (syntax.section_end, syntax.section, syntax.open) if each.strip()]
    after += [r"\s*<\|[^<>\s]+\|>", *([r"\s*\Z"] if final else [])]
    return Scan(
        {
            "value": f"{value}(?={key_open}|{close})" if value else "",
            "call": f"(?={call}(?:{'|'.join(after)}))",
            "argument": f"(?={argument})",
        }
    )
