"""Reads a model's answer as it comes: reasoning, content and tool calls."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.calls import read_calls
from deployments.openai.parsing.cursor import FENCE, Cursor, Incomplete, JsonEnd, Unreadable, first_word
from deployments.openai.parsing.live import LiveCalls
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning, held_back
from deployments.openai.parsing.syntax import MARKERS, AnswerSyntax, CallSyntax
from deployments.openai.parsing.typed import Schemas

# An object that nothing marks, or a list of them: what may be calls, and what is not yet known to be.
_OBJECT = r'(?:\[\s{0,99}){0,2}\{\s{0,99}["\']'
_KEYS = "name|function|type|id|index|arguments|parameters|tool_name|tool_call_id|tool_calls|function_calls|thought"
_CALLS = rf'{_OBJECT}(?:{_KEYS})["\']\s*:'
_BEGUN = r'(?:(?:\[\s{0,99}){0,2}\{\s{0,99}(?:["\']\w{0,12}(?:["\']\s*)?)?|(?:\[\s{0,99}){1,2})\Z'
_PYTHON = r"\[\s{0,99}[^\W\d][\w.\-/]{0,99}\s?\("
_PYTHON_BEGUN = r"\[\s{0,99}(?:[^\W\d][\w.\-/]{0,99})?\s?\Z"
# Markup that says that a call follows, where no form of calls was found.
_MARKER = r"<(?!/)[^<>\s\"'=]{0,40}(?i:tool|function|invoke|plugin)[^<>\n]{0,60}>"
_MARKER += r"|\[[A-Z_]{0,20}(?:TOOL|FUNCTION)[A-Z_]{0,20}\]|\bfunctools(?=\[)"
# A name that the arguments follow.
_NAME = r"(?<![\w.\-/])[^\W\d][\w.\-/]{0,63}"
_MARKER_BEGUN = r"(?:<(?!/)[^<>\n]{0,100}|\[[A-Z_]{0,60})\Z"
_THOUGHT = re.compile(r"\s*<((?:[\w.\-]{1,20}[_:])?(?:think|thinking|thoughts?|reasoning))>")
_THOUGHT_BEGUN = re.compile(r"\s*(?:<[\w.:\-]{0,30})?")
_BETWEEN = " \t\r\n;,"
_SHORT, _GROWTH = 256, 8
_LONGEST_BEGUN = 512


class Reader:
    """Reads one choice. What it gives does not depend on how the text is cut into pieces.

    A call that cannot be read stays content, markers included. White space between a text and a call belongs to
    neither.

    Args:
        syntax: how the model writes.
        schemas: the tools; None reads no calls.
        opened: the prompt ends with the opening marker, so that the text begins with reasoning.
        reasons: reasoning may begin the text.
        least: characters of a marked call after which it is given out in pieces; 0 does so at once with
            every call, None gives whole calls alone.

    Attributes:
        unread: markers of a call were given out as content.
    """

    def __init__(
        self, syntax: AnswerSyntax, schemas: Schemas | None, *, opened: bool, reasons: bool, least: int | None = None
    ) -> None:
        self.unread = False
        self._syntax = syntax
        self._reasoning = syntax.reasoning or MARKERS["think"]
        self._schemas = schemas or {}
        self._calls = () if schemas is None else syntax.calls
        self._scan = _scan(self._calls, syntax.dropped)
        self._buffer = ""
        self._final = False
        self._inside = opened
        # At the beginning of the text, or of what follows the reasoning; and whether reasoning may begin here.
        self._fresh = True
        self._reasons = reasons
        self._begun = False
        self._space = ""
        self._after_call = False
        self._given = False
        self._tried = 0
        self._own: JsonEnd | None = None
        self._least = least
        self._live: LiveCalls | None = None
        self._begun_with = ""

    def begin(self, marker: str) -> None:
        """Read as if the text began with a marker, which the prompt has written."""
        self._buffer = self._begun_with = marker

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""
        self._buffer += text
        parts: list[Part] = []
        while self._reason(parts) if self._inside else self._read(parts):
            pass
        return _merged(parts)

    def finish(self) -> list[Part]:
        """The parts that were held back; nothing is fed afterwards."""
        self._final, self._tried = True, 0
        parts = self.feed("")
        if self._space and not self._after_call:
            parts.append(Content(self._space))
        return _merged(parts)

    def _reason(self, parts: list[Part]) -> bool:
        """Give out reasoning; return whether it has ended."""
        if not self._begun:
            self._buffer = self._buffer.lstrip("\n")
            self._begun = bool(self._buffer)
        before, marker, after = self._buffer.partition(self._reasoning.closing)
        # A call in reasoning that never closes ends it, so what may be one is held back.
        calls = [] if marker or not self._scan.marked else [each.start() for each in self._scan.marked.finditer(before)]
        place = next((place for place in calls if self._final and self._calls_end(before[place:])), None)
        if marker or place is not None:
            kept = before[:place].rstrip()
            self._inside, self._fresh, self._reasons = False, True, False
            self._buffer = after if place is None else before[place:]
        else:
            held = held_back(before, (self._reasoning.closing, *self._scan.starts))
            size = len(before) if self._final else min([len(before) - held, *calls])
            kept = before[:size].rstrip()
            self._buffer = "" if self._final else before[len(kept) :]
        parts += [Reasoning(kept)] if kept else []
        return not self._inside

    def _calls_end(self, text: str) -> bool:
        """Whether a text consists of calls."""
        reader = Reader(self._syntax, self._schemas, opened=False, reasons=False)
        read = [*reader.feed(text), *reader.finish()]
        return bool(read) and all(
            isinstance(part, Call) or (isinstance(part, Content) and not part.text.strip()) for part in read
        )

    def _read(self, parts: list[Part]) -> bool:
        """Give out what is not a call; return whether to go on."""
        if self._fresh and not self._opens():
            return self._inside
        if self._own is not None:
            return self._in_own(parts, self._own)
        if self._after_call and not self._between(parts):
            return False
        found, held = self._scan.next(self._buffer, self._final)
        if found is None:
            self._content(parts, len(self._buffer) - held)
            return False
        self._content(parts, found.start())
        if found.lastgroup == "dropped":
            self._buffer = self._buffer[len(found[0]) :]
            return True
        return self._call(parts, found)

    def _call(self, parts: list[Part], found: re.Match[str]) -> bool:
        """Read calls at the beginning of the buffer; return whether it is known what is there."""
        if found.lastgroup != "own":
            try:
                calls, end = self._try()
            except Incomplete as more:
                self._begin(parts, found, more.args)
                return False
            live, self._live = self._live, None
            if live is not None and not calls and (begun := live.broken(self._buffer)):
                parts += begun
                self._buffer, self._tried = "", 0
                return False
            if calls:
                parts += calls if live is None else live.rest(calls, self._buffer)
                self._buffer, self._after_call, self._space, self._tried = self._buffer[end:], True, "", 0
                return True
        if self._after_call:
            self._after_call, self._space = False, "\n" if self._given else ""
        if found.lastgroup in ("own", "value"):
            self._own = JsonEnd()
        elif found[0] in self._syntax.dropped:
            self._buffer = self._buffer[len(found[0]) :]
        else:
            self.unread = self.unread or found.lastgroup == "marked"
            self._content(parts, len(found[0]))
        return True

    def _begin(self, parts: list[Part], found: re.Match[str], known: tuple[Any, ...]) -> None:
        """Give out what is certain of calls that are not whole yet."""
        if self._least is None or (self._least and found.lastgroup != "marked"):
            return
        self._live = self._live or LiveCalls(self._calls, self._schemas, self._least)
        parts += self._live.more(self._buffer, known)

    def _try(self) -> tuple[list[Call], int]:
        """The calls at the beginning of the buffer and where they end; none if there are none."""
        size = len(self._buffer)
        if not self._final and _SHORT < size < self._tried + self._tried // _GROWTH:
            raise Incomplete
        self._tried = size
        for syntax in self._calls:
            cursor = Cursor(self._buffer, final=self._final)
            try:
                return read_calls(cursor, syntax, self._schemas), cursor.place
            except Unreadable:
                continue
        self._tried = 0
        return [], 0

    def _between(self, parts: list[Part]) -> bool:
        """Drop what separates calls from each other and from a text; False if that is all there is so far."""
        rest = self._buffer.lstrip(_BETWEEN)
        cursor = Cursor(rest, final=self._final)
        try:
            ended = any(cursor.closing(each.section_end) for each in self._calls)
            ended = ended or any(each.shape == "tagged" and cursor.maybe(each.close) for each in self._calls)
        except Incomplete:
            return False
        if ended:
            self._buffer = rest[cursor.place :]
            return self._between(parts)
        found, held = self._scan.next(rest, self._final)
        if (found is not None and found.start() == 0) or (rest and held == len(rest)):
            self._buffer = rest
            return found is not None
        if not rest and not self._final:
            return False
        # A text goes on; it does not run into the one before the calls.
        self._buffer = self._buffer.lstrip()
        self._after_call, self._space = not self._buffer, "\n" if self._given else ""
        return bool(self._buffer)

    def _content(self, parts: list[Part], size: int) -> None:
        """Give out the beginning of the buffer. White space waits: a call may follow, to which it does not belong."""
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        if text:
            # The prompt's marker is not the model's text.
            text, self._begun_with = text.removeprefix(self._begun_with), ""
        kept = text.rstrip() if self._calls else text
        if kept:
            parts.append(Content(self._space + kept))
            self._space, self._given = "", True
        self._space += text[len(kept) :]

    def _opens(self) -> bool:
        """See whether reasoning begins here; False while that is not known, or if it does."""
        if self._syntax.reasoning is None and self._reasons:
            if not self._final and _THOUGHT_BEGUN.fullmatch(self._buffer):
                return False
            if (found := _THOUGHT.match(self._buffer)) is not None:
                self._reasoning = ReasoningMarkers(f"<{found[1]}>", f"</{found[1]}>")
        marks, cursor = self._reasoning, Cursor(self._buffer, final=self._final)
        try:
            stray = cursor.maybe(marks.closing)
            self._inside = not stray and self._reasons and cursor.maybe(marks.opening)
        except Incomplete:
            return False
        if stray or self._inside:
            self._buffer = self._buffer[cursor.place :]
        self._fresh = False
        if stray or not self._reasons:
            self._buffer = self._buffer.lstrip("\n")
        return not self._inside

    def _in_own(self, parts: list[Part], value: JsonEnd) -> bool:
        """Give out a JSON value of the model's own; return whether it has ended."""
        end = value.find(self._buffer)
        size = len(self._buffer) if end is None else end
        parts.append(Content(self._space + self._buffer[:size]))
        self._buffer, self._space, self._given = self._buffer[size:], "", True
        self._own = None if end is not None else value
        return end is not None


class _Scan:
    """Finds where a call, or markup, may begin.

    Attributes:
        starts: the first words of what begins a call.
        marked: matches them; None if nothing marks calls.
    """

    def __init__(self, calls: Sequence[CallSyntax], dropped: Sequence[str]) -> None:
        self.starts = tuple(dict.fromkeys(first_word(text) for call in calls for text in call.begins))
        self._texts = (*self.starts, *dropped)
        self.marked = re.compile(_either(self.starts)) if self.starts else None
        bare = {call.shape for call in calls if not call.begins}
        longer = [text for text in dropped if text.startswith(self.starts) and text not in self.starts]
        but = f"(?!{_either(longer)})" if longer else ""
        groups = [f"(?P<marked>{but}(?:{_either(self.starts)}))"] if self.starts else []
        begun: list[str] = []
        if "any" in bare:
            groups, begun = [*groups, f"(?P<unknown>{_MARKER})"], [_MARKER_BEGUN]
            self._texts = (*self._texts, "functools[")
        groups += [f"(?P<dropped>{_either(dropped)})"] if dropped else []
        if "python" in bare:
            groups, begun = [*groups, f"(?P<python>{_PYTHON})"], [*begun, _PYTHON_BEGUN]
        gaps = {call.gap.strip() for call in calls if call.shape == "named" and not call.begins}
        for gap in gaps:
            groups = [*groups, rf"(?P<named>{_NAME}\s{{0,9}}{re.escape(gap)}\s{{0,9}}(?=\{{))"]
            begun = [*begun, rf"{_NAME}\s{{0,9}}\W{{0,{len(gap)}}}\s{{0,9}}\Z"]
        if bare:
            groups, begun = [*groups, f"(?P<fence>{FENCE})"], [*begun, r"`{1,3}\w{0,44}\Z"]
        if "json" in bare:
            groups, begun = [*groups, f"(?P<value>{_CALLS})", f"(?P<own>{_OBJECT})"], [*begun, _BEGUN]
        self._pattern = re.compile("|".join(groups)) if groups else None
        self._begun = re.compile("|".join(begun)) if begun else None

    def next(self, text: str, final: bool) -> tuple[re.Match[str] | None, int]:
        """The next beginning, if it is certain, and how much of the text's end must wait."""
        found = self._pattern.search(text) if self._pattern else None
        begun = self._begun.search(text, max(0, len(text) - _LONGEST_BEGUN)) if self._begun and not final else None
        if found is not None and (begun is None or found.start() < begun.start()):
            rest = text[found.start() :]
            longer = not final and any(each.startswith(rest) and each != rest for each in self._texts)
            return (None, len(rest)) if longer else (found, 0)
        held = 0 if final else held_back(text, self._texts)
        return None, max(held, len(text) - begun.start() if begun else 0)


def _merged(parts: list[Part]) -> list[Part]:
    """Without two contents in a row."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, Content) and merged and isinstance(before := merged[-1], Content):
            merged[-1] = Content(before.text + part.text)
        elif not isinstance(part, Content) or part.text:
            merged.append(part)
    return merged


@functools.lru_cache(maxsize=256)
def _scan(calls: tuple[CallSyntax, ...], dropped: tuple[str, ...]) -> _Scan:
    return _Scan(calls, dropped)


def _either(texts: Sequence[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
