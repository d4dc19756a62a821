"""Finds tool calls in a streamed text."""

from __future__ import annotations

import re

from deployments.openai.parsing.families import Family, bare_calls
from deployments.openai.parsing.json_end import JsonEnd
from deployments.openai.parsing.parts import Call, Content, Part, find_first, held_back
from deployments.openai.parsing.typed import Schemas

# An object, or a list of them; one that may be calls; and what is not yet known to be either.
_OBJECT = re.compile(r'(?:\[\s{0,99}){0,2}\{\s{0,99}"')
_CALLS = re.compile(_OBJECT.pattern + r'(?:name|function|type|id|index|arguments|parameters)"\s*:')
_BEGUN = re.compile(r'(?:(?:\[\s{0,99}){0,2}\{\s{0,99}(?:"\w{0,10}(?:"\s*)?)?|(?:\[\s{0,99}){1,2})\Z')
_BETWEEN = " \t\r\n;,"


class CallSplitter:
    """Tool calls in a family's own format. A call that cannot be read stays content, markers included.

    White space between a text and a call, and between calls, belongs to neither.
    """

    def __init__(self, family: Family, schemas: Schemas) -> None:
        self._family = family
        self._schemas = schemas
        self._buffer = ""
        self._begun = False
        self._whole = False
        self._after_call = False
        # While in a call: the text that began it, and where to look for the next end after failed ones.
        self._marker: str | None = None
        self._to_the_end = False
        self._looked = 0
        # While in a JSON value that nothing marks: it may be calls, or it is an object of the model's own.
        self._value: JsonEnd | None = None
        self._own = False

    def feed(self, text: str) -> list[Part]:
        self._buffer += text
        parts: list[Part] = []
        while self._in_text(parts) if self._marker is None else self._in_call(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        marker, body = self._marker, self._buffer
        self._marker, self._buffer = None, ""
        if marker is None:
            left = body.lstrip(_BETWEEN) if self._after_call and self._family.bare else body
            return [Content(left)] if left else []
        if self._value is not None:
            return [Content(marker + body)]
        # An end marker that is missing is forgiven only where the body shows its own end.
        complete = self._to_the_end or body.lstrip().startswith(("{", "["))
        calls = self._read(body) if complete else None
        return list(calls) if calls else [Content(marker + body)]

    def _in_text(self, parts: list[Part]) -> bool:
        """Give out what is not a call; return whether a call has begun."""
        if self._after_call and not self._between():
            return False
        begun = self._buffer.lstrip()
        if not self._begun and begun and begun[0] in self._family.whole:
            self._enter(self._buffer[: len(self._buffer) - len(begun)], begun, to_the_end=True)
            self._whole = True
            return True
        self._begun = self._begun or bool(begun)
        self._after_call = self._after_call and not begun
        found = find_first(self._buffer, self._family.starts)
        place = len(self._buffer) - held_back(self._buffer, self._family.starts) if found is None else found[0]
        if self._family.bare and (value := self._next_value()) is not None and value[0] < place:
            place, kind = value
            found = None if kind == "begun" else (place, "")
            self._own = kind == "own"
        kept = self._buffer[:place].rstrip() if self._begun else ""
        if kept:
            parts.append(Content(kept))
        if found is None:
            self._buffer = self._buffer[len(kept) :]
            return False
        after = found[0] + len(found[1])
        self._value = JsonEnd() if not found[1] else None
        self._enter(self._buffer[len(kept) : after], self._buffer[after:], to_the_end=self._family.end is None)
        return True

    def _in_call(self, parts: list[Part]) -> bool:
        """Look for the call's end; return whether to go on with the text after it."""
        if self._value is not None:
            return self._in_value(parts, self._value)
        end = self._family.end
        if self._to_the_end or end is None:
            return False
        if self._looked and self._next_begins(parts):
            return True
        place = self._buffer.find(end, self._looked)
        if place < 0:
            return False
        calls = self._read(self._buffer[:place])
        self._looked = place + len(end)
        if calls:
            parts.extend(calls)
            self._buffer = self._buffer[self._looked :]
            self._marker, self._after_call = None, True
        return True

    def _in_value(self, parts: list[Part], value: JsonEnd) -> bool:
        """Look for the end of a JSON value; return whether to go on with the text after it."""
        found = value.find(self._buffer[self._looked :])
        end = len(self._buffer) if found is None else self._looked + found
        calls = None
        if not self._own and found is not None:
            calls = bare_calls(self._buffer[:end], self._schemas)
            parts.extend(calls or ())
        if calls is None and (self._own or found is not None) and end:
            parts.append(Content(f"{self._marker}{self._buffer[:end]}"))
            self._marker = ""
        if self._own or found is not None:
            self._buffer, end = self._buffer[end:], 0
        self._looked = end
        if found is None:
            return False
        self._marker, self._value, self._after_call = None, None, calls is not None
        return True

    def _next_value(self) -> tuple[int, str] | None:
        """Where the next JSON object or list of them begins, and whether it may be `calls`, is the model's `own`, or
        has only `begun`.
        """
        found, begun = _OBJECT.search(self._buffer), _BEGUN.search(self._buffer)
        if begun is not None and (found is None or begun.start() <= found.start()):
            return begun.start(), "begun"
        if found is None:
            return None
        return found.start(), "calls" if _CALLS.match(self._buffer, found.start()) else "own"

    def _between(self) -> bool:
        """Drop what separates calls from each other and from a text; False if that is all there is so far."""
        rest = self._buffer.lstrip(_BETWEEN if self._family.bare else None)
        if self._family.bare and rest and not (_CALLS.match(rest) or _BEGUN.match(rest)):
            rest = self._buffer.lstrip()
        elif self._family.bare and not rest:
            return False
        self._buffer = rest
        return True

    def _next_begins(self, parts: list[Part]) -> bool:
        """Whether another call begins after an end without a readable call; what was before it is content."""
        found = find_first(self._buffer[self._looked :], self._family.starts)
        if found is None:
            return False
        place = self._looked + found[0]
        parts.append(Content(f"{self._marker}{self._buffer[:place]}"))
        self._enter(found[1], self._buffer[place + len(found[1]) :], to_the_end=False)
        return True

    def _enter(self, marker: str, body: str, *, to_the_end: bool) -> None:
        self._marker, self._buffer, self._to_the_end, self._looked = marker, body, to_the_end, 0
        self._begun = True

    def _read(self, body: str) -> list[Call] | None:
        try:
            calls = self._family.read(body, self._schemas)
        except ValueError:
            return None
        # An answer that nothing marks as calls is one only if its tools are there.
        bare = calls is not None and self._whole and any(call.name not in self._schemas for call in calls)
        return None if bare else calls
