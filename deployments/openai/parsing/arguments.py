"""Reads the arguments of a call that stand between markers of their own, or on lines of their own."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import regex

from deployments.openai.parsing.cursor import ANY, Cursor, Incomplete, Unreadable, first_word, pattern_of
from deployments.openai.parsing.syntax import CallSyntax
from deployments.openai.parsing.typed import Schemas, parts_of, takes_text, typed

KEY = regex.compile(r"[^\s<>\"'=\[\]]++")
_LINE_KEY = regex.compile(r"[\w.\-]++")


def read_arguments(cursor: Cursor, syntax: CallSyntax, name: str, schemas: Schemas) -> list[tuple[str, Any]]:
    """The arguments up to the end of a call: only one that was closed is a call.

    Raises:
        Incomplete: more text is needed.
        Unreadable: they are not written so.
    """
    found: list[tuple[str, Any]] = []
    declared = schemas.get(name, {}).get("properties")
    # What may follow a value that is not closed; None if nothing says. One that is closed by its key is closed.
    others = set(declared or ()) if declared or ANY in syntax.value_close else None
    try:
        while not cursor.maybe(syntax.close):
            cursor.expect(syntax.key_open)
            key = cursor.match(_key(syntax))
            cursor.expect(syntax.key_close)
            rest = None if others is None else others - {key, *dict(found)}
            if syntax.shape == "lines":
                found.append((key, _line(cursor, syntax, rest, name, key, schemas)))
                continue
            # Where the end of a value is not always the same, it has the key in it.
            of_key = replace(syntax, value_close=syntax.value_close.replace(ANY, key))
            found.append((key, _argument(_value(cursor, of_key, rest), syntax, name, key, schemas)))
    except Incomplete as more:
        raise Incomplete(name, dict(found)) from more
    return found


def _argument(text: str, syntax: CallSyntax, name: str, key: str, schemas: Schemas) -> Any:
    """The value of an argument: bare text, or elements if it has them and is not a text."""
    parts = None if takes_text(name, key, schemas) else parts_of(name, key, schemas)
    if parts is not None and ANY in syntax.value_close and Cursor(text).maybe(syntax.key_open):
        members = read_arguments(Cursor(text + syntax.close), syntax, name, parts)
        return [value for _, value in members] if {key for key, _ in members} == {"item"} else dict(members)
    return typed(text, name, key, schemas)


def _key(syntax: CallSyntax) -> regex.Pattern[str]:
    return _LINE_KEY if syntax.shape == "lines" else KEY


def _value(cursor: Cursor, syntax: CallSyntax, others: set[str] | None) -> str:
    """The text of an argument, up to its end that another argument or the call's end follows."""
    if cursor.maybe("<![CDATA["):
        start, end = cursor.place, cursor.first("]]>")
        cursor.place = end + 3
        cursor.maybe(syntax.value_close)
        return cursor.text[start:end]
    start = cursor.place
    end = _end(cursor, syntax, others)
    text = cursor.text[start:end]
    text = text.removeprefix("\n") if syntax.key_close.endswith("\n") else text
    closed = cursor.place > end
    return text.removesuffix("\n") if syntax.value_close.startswith("\n") or not closed else text


def _end(cursor: Cursor, syntax: CallSyntax, others: set[str] | None) -> int:
    """The end of a value, after which the cursor is moved."""
    lines = syntax.shape == "lines"
    markers = (syntax.close,) if lines else (syntax.value_close, syntax.key_open, syntax.close)
    words = [*filter(None, map(first_word, markers)), *(["\n"] if lines else [])]
    place = cursor.place
    while True:
        cursor.place = place
        cursor.place = place = cursor.first(*words)
        if _ends(cursor, syntax, others):
            return place
        place += 1


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


def _line(cursor: Cursor, syntax: CallSyntax, others: set[str] | None, name: str, key: str, schemas: Schemas) -> Any:
    """A value in quotes or brackets, or the text up to the next argument or the call's end."""
    start = cursor.place
    try:
        value, end = cursor.value(), cursor.place
        whole = _ends(cursor, syntax, others)
    except Unreadable:
        whole = False
    if whole and isinstance(value, str):
        return value
    if not whole:
        cursor.place = start
        end = _end(cursor, syntax, others)
    return typed(cursor.text[start:end].strip(), name, key, schemas)
