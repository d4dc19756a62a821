"""Gives out the calls of an answer while they are written: as much of their arguments as is final."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from deployments.openai.parsing.calls import call_start
from deployments.openai.parsing.cursor import Cursor, Incomplete, JsonEnd, Unreadable
from deployments.openai.parsing.parts import Call, CallBegun, CallPiece, Part
from deployments.openai.parsing.syntax import CallSyntax
from deployments.openai.parsing.typed import Schemas, dumps

_TEXT = re.compile(r'[^"\\]+')
_ESCAPE = re.compile(
    r'\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|["\\/bfnrt])'
)
_SCALAR = re.compile(r"(true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=[\s,\]}])")
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST = 12


class JsonText:
    """Writes a JSON value again as `dumps` does, as far as it is final.

    Attributes:
        ended: the value is whole.
        place: how much of the text is written.
    """

    def __init__(self) -> None:
        self.ended = False
        self.place = 0
        # Of every object and list that is open, the keys so far; None for a list.
        self._open: list[set[str] | None] = []
        self._string: list[str] | None = None
        self._next = "value"
        self._stuck = False

    def write(self, text: str) -> str:
        """What is final beyond what was written before.

        Args:
            text: the value from its beginning, and what follows it.
        """
        written = ""
        while not self.ended and not self._stuck and (piece := self._step(text)) is not None:
            written += piece
        return written

    def _step(self, text: str) -> str | None:
        """The next piece; None if it is not known yet."""
        if self._string is not None:
            return self._in_string(text)
        space = _SPACE.match(text, self.place)
        place = space.end() if space else self.place
        sign = text[place : place + 1]
        if not sign:
            return None
        if self._next == "more" and sign == ",":
            return self._item(text, place + 1, ", ")
        if sign in "}]" and self._next in ("more", "first"):
            return self._close(sign, place)
        return self._stop() if self._next == "more" else self._item(text, place, "")

    def _item(self, text: str, place: int, before: str) -> str | None:
        """A key with its colon, or the beginning of a value."""
        space = _SPACE.match(text, place)
        place = space.end() if space else place
        if self._next != "value" and self._open and self._open[-1] is not None:
            return self._key(text, place, before)
        sign = text[place : place + 1]
        if sign == '"':
            self._string, self.place = [], place + 1
            return f'{before}"'
        if sign and sign in "{[":
            self._open.append(set() if sign == "{" else None)
            self._next, self.place = "first", place + 1
            return before + sign
        found = _SCALAR.match(text, place)
        if found is None:
            return (
                self._stop()
                if sign and _SCALAR.match(text[place:] + " ") is None and len(text) > place + _LONGEST
                else None
            )
        self.place = found.end()
        self._after()
        return before + json.dumps(json.loads(found[0]))

    def _key(self, text: str, place: int, before: str) -> str | None:
        try:
            key, end = json.JSONDecoder().raw_decode(text, place) if text[place : place + 1] == '"' else (None, place)
        except ValueError:
            return None
        colon = _SPACE.match(text, end)
        end = colon.end() if colon else end
        keys = self._open[-1]
        if not text[end:]:
            return None
        if key is None or keys is None or key in keys or text[end] != ":" or not _is_plain(key):
            return self._stop()
        keys.add(key)
        self._next, self.place = "value", end + 1
        return f"{before}{json.dumps(key, ensure_ascii=False)}: "

    def _in_string(self, text: str) -> str | None:
        if text[self.place : self.place + 1] == '"':
            self._string, self.place = None, self.place + 1
            self._after()
            return '"'
        found = _TEXT.match(text, self.place) or _ESCAPE.match(text, self.place)
        if found is None:
            return self._stop() if len(text) > self.place + _LONGEST else None
        self.place = found.end()
        value = found[0] if found[0][0] != "\\" else json.loads(f'"{found[0]}"')
        return json.dumps(value, ensure_ascii=False)[1:-1]

    def _close(self, sign: str, place: int) -> str | None:
        if (self._open[-1] is None) != (sign == "]"):
            return self._stop()
        self._open.pop()
        self.place = place + 1
        self._after()
        return sign

    def _after(self) -> None:
        """A value has ended."""
        self._next = "more"
        self.ended = not self._open

    def _stop(self) -> str | None:
        """Only the whole text shows what this means."""
        self._stuck = True
        return None


def _is_plain(text: str) -> bool:
    return not any("\ud800" <= each <= "\udfff" for each in text)


class LiveCalls:
    """The calls at the beginning of a text that goes on.

    What it has given out cannot be taken back: a call that cannot be read in the end has the rest of the text as
    arguments.

    Args:
        syntaxes: the forms of calls.
        schemas: the tools; calls of others are given out when they are whole.
        least: a call is given out unfinished from this many characters of it on.
        name: of the call whose arguments the text consists of.
    """

    def __init__(self, syntaxes: Sequence[CallSyntax], schemas: Schemas, least: int = 0, name: str = "") -> None:
        self._syntaxes = syntaxes
        self._least = least
        self._name = name
        self._schemas = schemas
        self._begun = 0
        self._written = ""
        self._start = 0
        self._syntax: CallSyntax | None = None
        self._json: JsonText | None = None

    def more(self, text: str, known: tuple[Any, ...] = ()) -> list[Part]:
        """What the calls gain.

        Args:
            text: from the beginning of the calls.
            known: the name of the call and the arguments that are whole, if each stands by itself.
        """
        if known:
            return self._members(*known)
        parts: list[Part] = []
        while self._json is not None or self._begins(text, parts):
            assert self._json is not None
            self._write(self._json.write(text[self._start :]), parts)
            if not self._json.ended:
                break
            self._start += self._json.place
            self._json = None
        return parts

    def rest(self, calls: Sequence[Call], text: str) -> list[Part]:
        """What is left of the calls, which have been read."""
        parts: list[Part] = []
        if self._begun and len(calls) >= self._begun:
            last = calls[self._begun - 1].arguments
            if last.startswith(self._written):
                self._write(last[len(self._written) :], parts)
            elif self._json is not None:
                # A key that comes twice: as JSON the text means the same.
                end = JsonEnd().find(text[self._start :]) or 0
                self._write(text[self._start + self._json.place : self._start + end], parts)
        return [*parts, *calls[self._begun :]]

    def broken(self, text: str) -> list[Part]:
        """What is left of calls that cannot be read; none if none had begun."""
        place = self._start + (self._json.place if self._json else 0)
        return [CallPiece(text[place:])] if self._begun else []

    def _members(self, name: str, values: dict[str, object]) -> list[Part]:
        parts: list[Part] = []
        whole = dumps(values)[:-1]
        if len(whole) < max(self._least, 2) or name not in self._schemas or not whole.startswith(self._written):
            return parts
        if not self._begun:
            self._begun = 1
            parts.append(CallBegun(name))
        self._write(whole[len(self._written) :], parts)
        return parts

    def _write(self, text: str, parts: list[Part]) -> None:
        self._written += text
        if text:
            parts.append(CallPiece(text))

    def _begins(self, text: str, parts: list[Part]) -> bool:
        """See where the arguments of the next call begin."""
        if self._name:
            return self._opens(self._name, self._start, parts) if not self._begun and text.strip() else False
        for syntax in self._syntaxes if self._syntax is None else (self._syntax,):
            cursor = Cursor(text, self._start, final=False)
            try:
                name = call_start(cursor, syntax, again=self._begun > 0)
            except (Incomplete, Unreadable):
                continue
            if name in self._schemas and (self._begun or len(text) - cursor.place >= self._least):
                self._syntax = syntax
                return self._opens(name, cursor.place, parts)
        return False

    def _opens(self, name: str, place: int, parts: list[Part]) -> bool:
        self._start, self._written, self._json = place, "", JsonText()
        self._begun += 1
        parts.append(CallBegun(name))
        return True
