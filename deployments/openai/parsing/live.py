"""Gives out the calls of an answer while they are written: as much of their arguments as is final."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import regex

from deployments.openai.parsing.calls import ARGUMENT_KEYS, NAME_KEYS, head_of
from deployments.openai.parsing.cursor import JsonEnd, either, pattern_of
from deployments.openai.parsing.parts import Call, CallBegun, CallPiece, Part
from deployments.openai.parsing.syntax import CallSyntax
from deployments.openai.parsing.typed import Schemas, dumps

# Halves of surrogate pairs are left to `dumps`, as are numbers that may be too large.
_ESCAPE = (
    r'\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}|["\\/bfnrt])'
)
_IN_STRING = regex.compile(rf'"|[^"\\]+|{_ESCAPE}')
_SCALAR = r"(?:true|false|null|-?(?:0|[1-9]\d{0,99})(?:\.\d{1,99})?)(?=[\s,\]}])"
_TOKEN = regex.compile(rf'\s*(?:(?P<comma>,)\s*(?=[^\s,:\]}}]))?(?P<token>[\]}}:\[{{"]|{_SCALAR})')


class JsonText:
    """Writes a JSON value again as `dumps` does, as far as it is final. What is not JSON is where it stops.

    Attributes:
        ended: the value is whole.
        place: how much of the text is written.
    """

    def __init__(self) -> None:
        self.ended = False
        self.place = 0
        self._depth = 0
        self._in_string = False

    def write(self, text: str) -> str:
        """What is final beyond what was written before.

        Args:
            text: the value from its beginning, and what follows it.
        """
        written = ""
        while not self.ended and (found := (_IN_STRING if self._in_string else _TOKEN).match(text, self.place)):
            written += self._in_quotes(found[0]) if self._in_string else self._between_strings(**found.groupdict())
            self.place = found.end()
        return written

    def _in_quotes(self, text: str) -> str:
        self._in_string = text != '"'
        value = json.loads(f'"{text}"') if text[0] == "\\" else text
        return json.dumps(value, ensure_ascii=False)[1:-1] if self._in_string else text

    def _between_strings(self, token: str, comma: str | None) -> str:
        self._depth += (token in "{[") - (token in "}]")
        self._in_string = token == '"'
        self.ended = self._depth == 0
        text = token if token in '"{[]}' else ": " if token == ":" else json.dumps(json.loads(token))
        return f", {text}" if comma else text


class LiveCalls:
    """The calls at the beginning of a text that goes on.

    What it has given out cannot be taken back: a call that cannot be read in the end has the rest of the text as
    arguments.

    Args:
        syntaxes: the forms of calls.
        schemas: the tools; calls of others are given out when they are whole.
        least: a call is given out unfinished from this many characters of it on.
    """

    def __init__(self, syntaxes: Sequence[CallSyntax], schemas: Schemas, least: int = 0) -> None:
        self._syntaxes = syntaxes
        self._least = least
        self._schemas = schemas
        self._begun = 0
        self._written = ""
        self._start = 0
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
                end = JsonEnd().next(text[self._start :], True)[1]
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
        for syntax in self._syntaxes:
            found = _start_of(syntax, self._begun > 0).match(text, self._start)
            name = "" if found is None else found["name"].removeprefix("functions.")
            if found and name in self._schemas and (self._begun or len(text) - found.end() >= self._least):
                # The other calls have the same form.
                self._syntaxes = (syntax,)
                self._start, self._written, self._json = found.end(), "", JsonText()
                self._begun += 1
                parts.append(CallBegun(name))
                return True
        return False


@functools.lru_cache(maxsize=256)
def _start_of(syntax: CallSyntax, again: bool) -> regex.Pattern[str]:
    """A pattern of what stands before the arguments of the first call, or of another one in a list of JSON."""
    before = r"\s*\}\s*," if again else f"(?:{pattern_of(syntax.section)})?{pattern_of(syntax.open)}"
    key = after = ""
    if syntax.shape == "named" and not again:
        return regex.compile(before + head_of(syntax).pattern)
    if syntax.shape != "json":
        return regex.compile("(?!)")
    if syntax.name:
        key = rf'"(?:{either((syntax.name, *NAME_KEYS))})"\s*:\s*'
        after = rf'\s*,\s*"(?:{either((syntax.arguments, *ARGUMENT_KEYS))})"'
    return regex.compile(rf'{before}\s*\[?\s*\{{\s*{key}"(?P<name>[\w.\-/]+)"{after}\s*:\s*(?=\{{)')
