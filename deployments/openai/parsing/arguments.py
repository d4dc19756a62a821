"""Reads the arguments of a call that stand between markers of their own, or on lines of their own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import regex

from deployments.openai.parsing.cursor import ANY, Cursor, Incomplete, Unreadable, first_word, pattern_of
from deployments.openai.parsing.syntax import CallSyntax
from deployments.openai.parsing.typed import parts_of, takes_text, typed

KEY = regex.compile(r"[^\s<>\"'=\[\]]++")
_LINE_KEY = regex.compile(r"[\w.\-]++")


def read_arguments(cursor: Cursor, syntax: CallSyntax, name: str, schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The arguments up to the end of a call: only one that was closed is a call.

    Args:
        name, schema: of the tool.

    Raises:
        Incomplete: more text is needed.
        Unreadable: they are not written so.
    """
    found: list[tuple[str, Any]] = []
    declared = schema.get("properties")
    # What may follow a value that is not closed; None if nothing says. One that is closed by its key is closed.
    others = set(declared or ()) if declared or ANY in syntax.value_close else None
    try:
        while not cursor.maybe(syntax.close):
            cursor.expect(syntax.key_open)
            key = cursor.match(_key(syntax))
            cursor.expect(syntax.key_close)
            rest = None if others is None else others - {key, *dict(found)}
            read = _line if syntax.shape == "lines" else _value
            found.append((key, read(cursor, syntax, rest, key, schema)))
    except Incomplete as more:
        raise Incomplete(name, dict(found)) from more
    return found


def _key(syntax: CallSyntax) -> regex.Pattern[str]:
    return _LINE_KEY if syntax.shape == "lines" else KEY


def _line(cursor: Cursor, syntax: CallSyntax, others: set[str] | None, key: str, schema: Mapping[str, Any]) -> Any:
    """A value in quotes or brackets, or the text up to the next argument or the call's end."""
    start = cursor.place
    with contextlib.suppress(Unreadable):
        value, end = cursor.value(), cursor.place
        if _ends(cursor, syntax, others):
            return value if isinstance(value, str) else typed(cursor.text[start:end].strip(), key, schema)
    cursor.place = start
    return typed(_up_to_end(cursor, syntax, others).strip(), key, schema)


def _value(cursor: Cursor, syntax: CallSyntax, others: set[str] | None, key: str, schema: Mapping[str, Any]) -> Any:
    """A value that is bare text, or elements if it has them and is not a text."""
    # Where the end of a value is not always the same, it has the key in it.
    text = _text(cursor, replace(syntax, value_close=syntax.value_close.replace(ANY, key)), others)
    in_elements = ANY in syntax.value_close and not takes_text(key, schema)
    if in_elements and Cursor(text).maybe(syntax.key_open):
        members = read_arguments(Cursor(text + syntax.close), syntax, key, parts_of(key, schema))
        return [value for _, value in members] if {key for key, _ in members} == {"item"} else dict(members)
    return typed(text, key, schema)


def _text(cursor: Cursor, syntax: CallSyntax, others: set[str] | None) -> str:
    """The text of an argument, up to its end that another argument or the call's end follows."""
    if cursor.maybe("<![CDATA["):
        text = cursor.until("]]>")
        cursor.maybe(syntax.value_close)
        return text
    start = cursor.place
    text = _up_to_end(cursor, syntax, others)
    closed = cursor.place > start + len(text)
    text = text.removeprefix("\n") if syntax.key_close.endswith("\n") else text
    return text.removesuffix("\n") if syntax.value_close.startswith("\n") or not closed else text


def _up_to_end(cursor: Cursor, syntax: CallSyntax, others: set[str] | None) -> str:
    """The text up to the end of a value. The end is taken as well."""
    words = [*filter(None, map(first_word, (syntax.value_close, syntax.key_open, syntax.close)))]
    words += ["\n"] if syntax.shape == "lines" else []
    start = cursor.place
    while True:
        cursor.place = end = cursor.first(*words)
        if _ends(cursor, syntax, others):
            return cursor.text[start:end]
        cursor.place = end + 1


def _ends(cursor: Cursor, syntax: CallSyntax, others: set[str] | None) -> bool:
    """Whether a value ends here. What closes it is taken; one that is not closed ends before one of other arguments."""
    found = cursor.take(_end_of(syntax, cursor.final))
    return found is not None and (found["key"] is None or others is None or found["key"] in others)


@functools.lru_cache(maxsize=256)
def _end_of(syntax: CallSyntax, final: bool) -> regex.Pattern[str]:
    """A pattern of what ends a value: what closes it, the next argument, or the end of the call."""
    key_open, key_close, value_close, close = map(
        pattern_of, (syntax.key_open, syntax.key_close, syntax.value_close, syntax.close)
    )
    argument = rf"(?={key_open}\s*(?P<key>{_key(syntax).pattern}){key_close})"
    if syntax.shape == "lines":
        return regex.compile(f"(?={close})|{argument}")
    # What looks like the end of a call is one if calls go on, or the text ends.
    after = [pattern_of(each) for each in (syntax.section_end, syntax.section, syntax.open) if each.strip()]
    after += [r"\s*<\|[^<>\s]+\|>", *([r"\s*\Z"] if final else [])]
    closed = f"{value_close}(?={key_open}|{close})|" if value_close else ""
    return regex.compile(f"{closed}(?={close}(?:{'|'.join(after)}))|{argument}")
