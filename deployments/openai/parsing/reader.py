"""Reads a model's answer as it comes: reasoning, content and tool calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence

import regex

from deployments.openai.parsing.calls import read_calls
from deployments.openai.parsing.cursor import FENCE, Cursor, Incomplete, JsonEnd, Scan, Unreadable, either, pattern_of
from deployments.openai.parsing.live import LiveCalls
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning
from deployments.openai.parsing.syntax import MARKERS, AnswerSyntax, CallSyntax
from deployments.openai.parsing.typed import Schemas

# An object that nothing marks, or a list of them, and the keys with which one may be a call.
_OBJECT = r'(?:\[\s{0,99}){0,2}\{\s{0,99}["\']'
_KEYS = "name|function|type|id|index|arguments|parameters|tool_name|tool_call_id|tool_calls|function_calls|thought"
_PYTHON = r"\[\s{0,99}[^\W\d][\w.\-/]{0,99}\s?\("
# Markup that says that a call follows, where no form of calls was found.
_MARKER = r"<{1,2}(?!/)[^<>\s\"'=]{0,40}(?i:tool|function|invoke|plugin)[^<>\n]{0,60}>{1,2}"
_MARKER += r"|\[[A-Z_]{0,20}(?:TOOL|FUNCTION)[A-Z_]{0,20}\]|\bfunctools(?=\[)"
# A name that the arguments follow.
_NAME = r"(?<![\w.\-/])[^\W\d][\w.\-/]{0,63}"
_TAG = r"(?:[\w.\-]{1,20}[_:])?(?:think|thinking|thoughts?|reasoning)"
_THOUGHT = regex.compile(rf"\s*<({_TAG})>")
OPENED = regex.compile(rf"<({_TAG}(?:_\w{{1,20}})?)>\s*\Z")
"""What ends a prompt that has opened reasoning, whatever it is called."""
# What is left out before reasoning: the text after it has to be there.
_LINES = regex.compile(r"\n*+(?=.)", regex.DOTALL)
_BETWEEN = " \t\r\n;,"
_SHORT, _GROWTH = 256, 8


class Reader:
    """Reads one choice. What it gives does not depend on how the text is cut into pieces.

    A call that cannot be read stays content, markers included. White space between a text and a call belongs to
    neither.

    Args:
        syntax: how the model writes.
        schemas: the tools; None reads no calls.
        opened: the prompt ends with the opening marker, so that the text begins with reasoning.
        reasons: reasoning may begin the text.
        begun: a marker that the prompt has written: the text is read as if it began with it.
        least: characters of a marked call after which it is given out in pieces; 0 does so at once with
            every call, None gives whole calls alone.
    """

    def __init__(
        self,
        syntax: AnswerSyntax,
        schemas: Schemas | None,
        *,
        opened: bool,
        reasons: bool,
        begun: str = "",
        least: int | None = None,
    ) -> None:
        self._syntax = syntax
        marks = syntax.reasoning or MARKERS["think"]
        self._opening = _THOUGHT if syntax.reasoning is None else regex.compile(pattern_of(marks.opening))
        self._closing = marks.closing
        self._schemas = schemas or {}
        self._calls = () if schemas is None else syntax.calls
        self._scan = _scan_of(self._calls, syntax.dropped)
        # What may stand after a call that has been read.
        self._ends = tuple(call.section_end for call in self._calls)
        self._ends += tuple(call.close for call in self._calls if call.shape == "tagged")
        self._least = least
        self._begun = begun
        self._opened = opened
        self._buffer = marks.opening if opened else begun
        self._final = False
        self._reasons = reasons
        # What reads on: it gives out parts, and says whether to read on at once.
        self._step: Callable[[list[Part]], bool] = self._open
        # White space before the next text, and whether there was a text.
        self._space = ""
        self._given = False
        # Of the call at the beginning of the buffer.
        self._tried = 0
        self._live: LiveCalls | None = None

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""
        self._buffer += text
        parts: list[Part] = []
        try:
            while self._step(parts):
                pass
        except Incomplete:
            pass
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held back; nothing is fed afterwards."""
        self._final = True
        parts, space = self.feed(""), self._space
        self._space = ""
        self._give(parts, space)
        return parts

    def _open(self, parts: list[Part]) -> bool:
        """See whether reasoning begins here."""
        cursor = Cursor(self._buffer, final=self._final)
        if self._reasons and (found := cursor.take(self._opening)) is not None:
            cursor.take(_LINES)
            # A model may open once more what its prompt has opened.
            if self._opened and cursor.take(self._opening):
                cursor.take(_LINES)
            self._closing = f"</{found[1]}>" if self._syntax.reasoning is None else self._closing
            self._step = functools.partial(self._reason, _thoughts_of(self._closing, self._calls))
        elif cursor.maybe(self._closing):
            # It ends what had ended before.
            self._reasons = False
        else:
            self._step = self._text
            self._buffer = self._buffer if self._reasons else self._buffer.lstrip("\n")
        self._buffer = self._buffer[cursor.place :]
        return True

    def _reason(self, ends: Scan, parts: list[Part]) -> bool:
        """Give out reasoning up to its end."""
        text, marker, after = self._buffer.partition(self._closing)
        if not marker:
            # A call in reasoning that never closes ends it, so what may be one is held back.
            size = ends.next(text, self._final)[1]
            if self._final:
                places = (each.start() for each in ends.pattern.finditer(text))
                size = next((place for place in places if self._are_calls(text[place:])), len(text))
            text, after = text[:size], text[size:]
        kept = text.rstrip()
        parts += [Reasoning(kept)] if kept else []
        if marker or (self._final and after):
            self._buffer, self._reasons, self._step = after, False, self._open
            return True
        self._buffer = "" if self._final else text[len(kept) :] + after
        return False

    def _are_calls(self, text: str) -> bool:
        reader = Reader(self._syntax, self._schemas, opened=False, reasons=False)
        parts = [*reader.feed(text), *reader.finish()]
        return bool(parts) and all(isinstance(part, Call) for part in parts)

    def _text(self, parts: list[Part]) -> bool:
        """Give out what is neither a call nor markup."""
        found, size = self._scan.next(self._buffer, self._final)
        self._pass(parts, size)
        if found is None:
            return False
        if found.lastgroup in ("dropped", "own"):
            self._no_call(found, parts)
        else:
            self._step = functools.partial(self._call, found)
        return True

    def _no_call(self, found: regex.Match[str], parts: list[Part]) -> None:
        """Give out what begins no call, or drop it."""
        if found.lastgroup in ("value", "own"):
            self._step = functools.partial(self._own, JsonEnd())
        elif found[0] in self._syntax.dropped:
            self._buffer = self._buffer[len(found[0]) :]
        else:
            self._pass(parts, len(found[0]))

    def _call(self, found: regex.Match[str], parts: list[Part]) -> bool:
        """Read calls at the beginning of the buffer."""
        size, known = len(self._buffer), ()
        # A long text is read again when it has grown by a part of its length, so that all of it is read in linear time.
        if self._final or size <= _SHORT or size >= self._tried + self._tried // _GROWTH:
            self._tried = size
            try:
                return self._after_trial(found, parts, *self._try())
            except Incomplete as more:
                known = more.args
        if self._least == 0 or (self._least and found.lastgroup == "marked"):
            self._live = self._live or LiveCalls(self._calls, self._schemas, self._least)
            parts += self._live.more(self._buffer, known)
        return False

    def _try(self) -> tuple[list[Call], int]:
        """The calls at the beginning of the buffer and where they end; none if there are none."""
        for syntax in self._calls:
            cursor = Cursor(self._buffer, final=self._final, quote=syntax.quote)
            with contextlib.suppress(Unreadable):
                return read_calls(cursor, syntax, self._schemas), cursor.place
        return [], 0

    def _after_trial(self, found: regex.Match[str], parts: list[Part], calls: list[Call], end: int) -> bool:
        """Give out calls, or what only looked like them."""
        live, self._live, self._step, self._tried = self._live, None, self._text, 0
        if calls:
            parts += calls if live is None else live.rest(calls, self._buffer)
            self._buffer, self._space, self._step = self._buffer[end:], "", self._between
        elif live is not None and (begun := live.broken(self._buffer)):
            parts += begun
            self._buffer = self._space = ""
        else:
            self._no_call(found, parts)
        return True

    def _between(self, parts: list[Part]) -> bool:
        """Drop what separates calls from each other and from a text."""
        rest = self._buffer.lstrip(_BETWEEN)
        cursor = Cursor(rest, final=self._final)
        if any(map(cursor.closing, self._ends)):
            self._buffer = rest[cursor.place :]
            return True
        found, place = self._scan.next(rest, self._final)
        if found is not None and place == 0 and found.lastgroup == "dropped":
            self._buffer = rest[len(found[0]) :]
            return True
        if found is None and place == 0 and not self._final:
            return False
        self._buffer = rest if found is not None and place == 0 else self._buffer.lstrip()
        if not self._buffer:
            return False
        # A text does not run into the one before the calls.
        self._space, self._step = "\n" if self._given else "", self._text
        return True

    def _own(self, value: JsonEnd, parts: list[Part]) -> bool:
        """Give out a JSON value of the model's own."""
        end = value.find(self._buffer)
        text, self._buffer = self._buffer[:end], "" if end is None else self._buffer[end:]
        self._give(parts, text)
        self._step = self._step if end is None else self._text
        return end is not None

    def _pass(self, parts: list[Part], size: int) -> None:
        """Give out the beginning of the buffer. White space waits: a call may follow, to which it does not belong."""
        text, self._buffer = self._buffer[:size], self._buffer[size:]
        if text:
            # The prompt's marker is not the model's text.
            text, self._begun = text.removeprefix(self._begun), ""
        kept = text.rstrip() if self._calls else text
        self._give(parts, kept, text[len(kept) :])

    def _give(self, parts: list[Part], text: str, space: str = "") -> None:
        """Give out a text, in one part with the one before it; the white space after it waits."""
        if text:
            if parts and isinstance(last := parts[-1], Content):
                parts[-1] = Content(last.text + self._space + text)
            else:
                parts.append(Content(self._space + text))
            self._space, self._given = "", True
        self._space += space


@functools.lru_cache(maxsize=256)
def _scan_of(calls: tuple[CallSyntax, ...], dropped: tuple[str, ...]) -> Scan:
    """Finds what begins calls, and what is dropped.

    The groups: `marked` (a declared marker), `unknown` (markup that looks like one), `dropped`, `bare` (calls that
    nothing marks), `value` (JSON that may be a call), `own` (JSON that is none).
    """
    starts = _starts(calls)
    bare = {call.shape for call in calls if not call.begins}
    longer = either([text for text in dropped if text.startswith(starts) and text not in starts])
    gaps = {pattern_of(call.gap) for call in calls if call.shape == "named" and not call.begins}
    unmarked = [_PYTHON] if "python" in bare else []
    unmarked += [rf"{_NAME}{gap}\s{{0,9}}(?=\{{)" for gap in sorted(gaps)]
    patterns = {
        "marked": f"(?!{longer})(?:{either(starts)})" if longer else either(starts),
        "unknown": _MARKER if "any" in bare else "",
        "dropped": either(dropped),
        "bare": "|".join((*unmarked, FENCE)) if bare else "",
    }
    patterns |= {"value": rf'{_OBJECT}(?:{_KEYS})["\']\s*:', "own": _OBJECT} if "json" in bare else {}
    return Scan(patterns)


@functools.lru_cache(maxsize=256)
def _thoughts_of(closing: str, calls: tuple[CallSyntax, ...]) -> Scan:
    """Finds what may end reasoning."""
    return Scan({"closing": regex.escape(closing), "marked": either(_starts(calls))})


def _starts(calls: Sequence[CallSyntax]) -> tuple[str, ...]:
    """The first words of what begins a call."""
    return tuple(dict.fromkeys(word for call in calls for word in call.starts))
