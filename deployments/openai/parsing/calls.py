"""Finding tool calls in a text while it comes."""

from __future__ import annotations

from deployments.openai.parsing.families import Family, Schemas
from deployments.openai.parsing.parts import Call, Content, Part, find_first, held_back


class CallSplitter:
    """Tool calls in a family's own format. A call that cannot be read stays content, markers included.

    White space between a text and a call, and between calls, belongs to neither.
    """

    def __init__(self, family: Family, schemas: Schemas) -> None:
        self._family = family
        self._schemas = schemas
        self._buffer = ""
        self._begun = False
        self._after_call = False
        # While in a call: the text that began it, and where behind failed ends to look for the next one.
        self._marker: str | None = None
        self._to_the_end = False
        self._looked = 0

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
            return [Content(body)] if body else []
        # An end marker that is missing is forgiven only where the body shows its own end.
        complete = self._to_the_end or body.lstrip().startswith(("{", "["))
        calls = self._read(body) if complete else None
        return list(calls) if calls else [Content(marker + body)]

    def _in_text(self, parts: list[Part]) -> bool:
        """Give out what is no call; whether a call has begun."""
        if self._after_call:
            self._buffer = self._buffer.lstrip()
        begun = self._buffer.lstrip()
        if not self._begun and begun and begun[0] in self._family.whole:
            self._enter(self._buffer[: len(self._buffer) - len(begun)], begun, to_the_end=True)
            return True
        self._begun = self._begun or bool(begun)
        self._after_call = self._after_call and not begun
        found = find_first(self._buffer, self._family.starts)
        place = len(self._buffer) - held_back(self._buffer, self._family.starts) if found is None else found[0]
        kept = self._buffer[:place].rstrip() if self._begun else ""
        if kept:
            parts.append(Content(kept))
        if found is None:
            self._buffer = self._buffer[len(kept) :]
            return False
        behind = found[0] + len(found[1])
        self._enter(self._buffer[len(kept) : behind], self._buffer[behind:], to_the_end=self._family.end is None)
        return True

    def _in_call(self, parts: list[Part]) -> bool:
        """Look for the call's end; whether to go on with what is behind it."""
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

    def _next_begins(self, parts: list[Part]) -> bool:
        """Whether another call begins behind an end that ended nothing readable; what was before it is content."""
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
            return self._family.read(body, self._schemas)
        except ValueError:
            return None
