"""Where a JSON value ends in a text that comes in pieces."""

from __future__ import annotations


class JsonEnd:
    """Finds the end of an object or list that is fed in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def find(self, piece: str) -> int | None:
        """The place in this piece after which the value has ended; None if it goes on."""
        for place, character in enumerate(piece):
            if self._ends(character):
                return place + 1
        return None

    def _ends(self, character: str) -> bool:
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = not self._escaped and character == "\\"
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False
