"""Finds where calls, and markup, may begin in a text that goes on."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import regex

from deployments.openai.parsing.cursor import FENCE, first_word, pattern_of
from deployments.openai.parsing.syntax import CallSyntax

# An object that nothing marks, or a list of them, and the keys with which one may be a call.
_OBJECT = r'(?:\[\s{0,99}){0,2}\{\s{0,99}["\']'
_KEYS = "name|function|type|id|index|arguments|parameters|tool_name|tool_call_id|tool_calls|function_calls|thought"
_PYTHON = r"\[\s{0,99}[^\W\d][\w.\-/]{0,99}\s?\("
# Markup that says that a call follows, where no form of calls was found.
_MARKER = r"<(?!/)[^<>\s\"'=]{0,40}(?i:tool|function|invoke|plugin)[^<>\n]{0,60}>"
_MARKER += r"|\[[A-Z_]{0,20}(?:TOOL|FUNCTION)[A-Z_]{0,20}\]|\bfunctools(?=\[)"
# A name that the arguments follow.
_NAME = r"(?<![\w.\-/])[^\W\d][\w.\-/]{0,63}"
_LONGEST = 512


class Scan:
    """Finds the first of some patterns. The name of its group says which it is.

    Args:
        patterns: by the names of their groups; of several at one place the first wins.
    """

    def __init__(self, patterns: dict[str, str]) -> None:
        any_of = "|".join(f"(?P<{name}>{pattern})" for name, pattern in patterns.items()) or "(?!)"
        self.pattern = regex.compile(any_of)
        # Matches nothing: as far as it comes at the end of a text, more text could make a match, or a longer one.
        self._tail = regex.compile(rf"(?:{any_of})\Z(?s:.)")

    def next(self, text: str, final: bool) -> tuple[regex.Match[str] | None, int]:
        """The next match, if it is certain, and up to where it is certain that there is none."""
        found = self.pattern.search(text)
        place = len(text) if found is None else found.start()
        if not final and len(text) - place < _LONGEST:
            tail = self._tail.search(text, max(0, len(text) - _LONGEST), partial=True)
            if tail is not None and tail.start() <= place:
                return None, tail.start()
        return found, place


@functools.lru_cache(maxsize=256)
def scan_of(calls: tuple[CallSyntax, ...], dropped: tuple[str, ...]) -> Scan:
    """Finds what begins calls, and what is dropped.

    The groups: `marked` (a declared marker), `unknown` (markup that looks like one), `dropped`, `bare` (calls that
    nothing marks), `value` (JSON that may be a call), `own` (JSON that is none).
    """
    starts = _starts(calls)
    bare = {call.shape for call in calls if not call.begins}
    longer = [text for text in dropped if text.startswith(starts) and text not in starts]
    patterns = {}
    if starts:
        patterns["marked"] = f"(?!{either(longer)})(?:{either(starts)})" if longer else either(starts)
    if "any" in bare:
        patterns["unknown"] = _MARKER
    if dropped:
        patterns["dropped"] = either(dropped)
    gaps = {pattern_of(call.gap) for call in calls if call.shape == "named" and not call.begins}
    unmarked = [_PYTHON] if "python" in bare else []
    unmarked += [rf"{_NAME}{gap}\s{{0,9}}(?=\{{)" for gap in sorted(gaps)]
    if bare:
        patterns["bare"] = "|".join((*unmarked, FENCE))
    if "json" in bare:
        patterns |= {"value": rf'{_OBJECT}(?:{_KEYS})["\']\s*:', "own": _OBJECT}
    return Scan(patterns)


@functools.lru_cache(maxsize=256)
def thoughts_of(closing: str, calls: tuple[CallSyntax, ...]) -> Scan:
    """Finds what may end reasoning."""
    starts = _starts(calls)
    return Scan({"closing": regex.escape(closing)} | ({"marked": either(starts)} if starts else {}))


def _starts(calls: Sequence[CallSyntax]) -> tuple[str, ...]:
    """The first words of what begins a call."""
    return tuple(dict.fromkeys(first_word(text) for call in calls for text in call.begins))


def either(texts: Sequence[str]) -> str:
    """A pattern of one of some texts, the longest that there is."""
    return "|".join(map(regex.escape, sorted(texts, key=len, reverse=True)))
