"""Reads a model's answer as it comes: reasoning, content and tool calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import regex

from deployments.openai.parsing.calls import OBJECT, object_of, read_calls
from deployments.openai.parsing.cursor import FENCE, Cursor, Incomplete, JsonEnd, Scan, Unreadable, either, pattern_of
from deployments.openai.parsing.live import LiveCalls
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning
from deployments.openai.parsing.syntax import MARKERS, AnswerSyntax, CallSyntax
from deployments.openai.parsing.typed import Schemas

_PYTHON = r"\[\s{0,99}[^\W\d][\w.\-/]{0,99}\s?\("
# Markup that says that a call follows, where no form of calls was found.
_MARKER = r"<{1,2}(?!/)[^<>\s\"'=]{0,40}(?i:tool|function|invoke|plugin)[^<>\n]{0,60}>{1,2}"
_MARKER += r"|\[[A-Z_]{0,20}(?:TOOL|FUNCTION)[A-Z_]{0,20}\]|\bfunctools(?=\[)"
# A name that the arguments follow.
_NAME = r"(?<![\w.\-/])[^\W\d][\w.\-/]{0,63}"
_TAG = r"(?:[\w.\-]{1,20}[_:])?(?:think|thinking|thoughts?|reasoning)"
_THOUGHT = rf"\s*<(?P<tag>{_TAG})>"
OPENED = regex.compile(rf"<({_TAG}(?:_\w{{1,20}})?)>\s*\Z")
"""What ends a prompt that has opened reasoning, whatever it is called."""
_BETWEEN = r"[\s;,]"
_SHORT, _GROWTH = 256, 8


class Reader:
    """Reads one choice. What it gives does not depend on how the text is cut into pieces.

    A call that cannot be read stays content, markers included. White space between a text and a call belongs to
    neither.

    Args:
        syntax: how the model writes.
        schemas: the tools; None reads no calls.
        reasons: reasoning may begin the text.
        begun: a marker of reasoning or of a call that ends the prompt: the text is read as if it began with it.
        least: characters of a marked call after which it is given out in pieces; 0 does so at once with
            every call, None gives whole calls alone.
    """

    def __init__(
        self, syntax: AnswerSyntax, schemas: Schemas | None, *, reasons: bool, begun: str = "", least: int | None = None
    ) -> None:
        marks = syntax.reasoning or MARKERS["think"]
        opening = _THOUGHT if syntax.reasoning is None else pattern_of(marks.opening)
        self._syntax, self._schemas, self._least, self._closing = syntax, schemas or {}, least, marks.closing
        self._calls = () if schemas is None else syntax.calls
        self._buffer = self._begun = begun
        self._final = False
        # What is looked for next; the text before it is of this kind.
        self._texts, self._after_calls = _scans_of(self._calls, syntax.dropped)
        self._kind: type[Content | Reasoning] = Content
        self._scan: Scan | JsonEnd = self._resumed
        if reasons:
            # A model may open once more what its prompt has opened.
            opening = rf"(?:{opening}\n*+){{1,{2 if begun else 1}}}"
            self._scan = _first_of(opening=opening, closed=pattern_of(marks.closing))
        # What was found, if more text decides about it.
        self._found: regex.Match[str] | None = None
        self._tried = 0
        self._live: LiveCalls | None = None
        # Whether there was a text, what joins the next one to it, and the white space before that.
        self._given, self._joint, self._space = False, "", ""

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain after this text."""
        self._buffer += text
        parts: list[Part] = []
        while self._next(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held back; nothing is fed afterwards."""
        self._final = True
        parts = self.feed("")
        return [*parts, Content(self._space)] if self._space and self._kind is Content else parts

    def _next(self, parts: list[Part]) -> bool:
        """Give out the text up to what is looked for, and read that. False: more text has to come."""
        if self._found is None:
            found, size = self._scan.next(self._buffer, self._final)
            self._pass(parts, size)
            self._found = found
        if (found := self._found) is None:
            return False
        if self._kind is Reasoning:
            return self._end_reasoning(found, parts)
        if found.lastgroup in ("marked", "unknown", "bare", "value"):
            return self._call(found, parts)
        self._skip(len(found[0]) if found.lastgroup != "own" else 0)
        match found.lastgroup:
            case "own":
                self._scan = JsonEnd()
            case "opening":
                self._closing = f"</{found['tag']}>" if self._syntax.reasoning is None else self._closing
                self._kind, self._scan = Reasoning, _thoughts_of(self._closing, self._calls)
            case "closed":
                self._scan = self._resumed
            case "text":
                self._scan = self._texts
        return True

    def _skip(self, size: int) -> None:
        """Drop the beginning of the buffer."""
        self._buffer, self._found, self._begun = self._buffer[size:], None, "" if size else self._begun

    @property
    def _resumed(self) -> Scan:
        """Looks for what may stand after reasoning: what ends it once more."""
        return _first_of(closed=pattern_of(self._closing), dropped=r"\n+")

    def _end_reasoning(self, found: regex.Match[str], parts: list[Part]) -> bool:
        """End the reasoning if it is closed here, or in what may be a call and is never closed."""
        end = self._buffer.find(self._closing)
        if end < 0 and not self._final:
            return False
        if end > 0 or (end < 0 and not self._are_calls()):
            self._pass(parts, max(end, len(found[0])))
        else:
            self._skip(len(self._closing) if end == 0 else 0)
            self._kind, self._space, self._scan = Content, "", self._resumed
        return True

    def _are_calls(self) -> bool:
        reader = Reader(self._syntax, self._schemas, reasons=False)
        parts = [*reader.feed(self._buffer), *reader.finish()]
        return bool(parts) and all(isinstance(part, Call) for part in parts)

    def _call(self, found: regex.Match[str], parts: list[Part]) -> bool:
        """Read calls at the beginning of the buffer."""
        size, known = len(self._buffer), ()
        # A long text is read again when it has grown by a part of its length, so that all of it is read in linear time.
        if self._final or size <= _SHORT or size >= self._tried + self._tried // _GROWTH:
            self._tried = size
            try:
                self._after_trial(found, parts, *self._try())
                return True
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

    def _after_trial(self, found: regex.Match[str], parts: list[Part], calls: list[Call], end: int) -> None:
        """Give out calls, or what only looked like them."""
        live, self._live, self._tried = self._live, None, 0
        if calls:
            parts += calls if live is None else live.rest(calls, self._buffer)
            self._skip(end)
            # A text does not run into the one before the calls.
            self._joint, self._space = "\n" if self._given else "", ""
            self._scan = self._after_calls
        elif live is not None and (begun := live.broken(self._buffer)):
            parts += begun
            self._skip(len(self._buffer))
            self._space = ""
        elif found.lastgroup == "value":
            self._scan, self._found = JsonEnd(), None
        elif found[0] in self._syntax.dropped:
            self._skip(len(found[0]))
        else:
            self._pass(parts, len(found[0]))

    def _pass(self, parts: list[Part], size: int) -> None:
        """Give out the beginning of the buffer. White space waits: a call may follow, to which it does not belong."""
        # The prompt's marker is not the model's text.
        text = self._buffer[:size].removeprefix(self._begun)
        self._skip(size)
        waits = self._kind is Reasoning or (self._calls and not isinstance(self._scan, JsonEnd))
        kept = text.rstrip() if waits else text
        if kept:
            given = self._joint + self._space + kept
            if parts and isinstance(last := parts[-1], self._kind):
                parts[-1] = self._kind(last.text + given)
            else:
                parts.append(self._kind(given))
            self._given, self._joint, self._space = self._given or self._kind is Content, "", ""
        self._space += text[len(kept) :]


@functools.lru_cache(maxsize=256)
def _first_of(**patterns: str) -> Scan:
    """Finds what stands at the beginning of a text: `opening` and `closed`, of reasoning, `dropped`, or `text`."""
    return Scan({name: rf"\A(?:{pattern})" for name, pattern in patterns.items()} | {"text": r"\A(?:)"})


@functools.lru_cache(maxsize=256)
def _scans_of(calls: tuple[CallSyntax, ...], dropped: tuple[str, ...]) -> tuple[Scan, Scan]:
    """What finds calls in a text, and what ends calls or separates them from each other and from a text."""
    patterns = _patterns_of(calls, dropped)
    begun = "|".join(filter(None, patterns.values())) or "(?!)"
    ends = [pattern_of(end) for call in calls for end in call.ends]
    ended = "|".join(filter(None, (*ends, patterns["dropped"]))) or "(?!)"
    return Scan(patterns), _first_of(dropped=rf"{_BETWEEN}*(?:{ended})|{_BETWEEN}+(?={begun})|\s+(?=\S|\Z)")


def _patterns_of(calls: tuple[CallSyntax, ...], dropped: tuple[str, ...]) -> dict[str, str]:
    """What may begin calls, and what is dropped.

    The groups: `marked` (a declared marker), `unknown` (markup that looks like one), `dropped`, `bare` (calls that
    nothing marks), `value` (JSON that may be a call), `own` (JSON that is none).
    """
    starts = _starts(calls)
    bare = {call.shape for call in calls if not call.begins}
    longer = either([text for text in dropped if text.startswith(starts) and text not in starts])
    gaps = {pattern_of(call.gap) for call in calls if call.shape == "named" and not call.begins}
    unmarked = [_PYTHON] if "python" in bare else []
    unmarked += [rf"{_NAME}{gap}\s{{0,9}}(?=\{{)" for gap in sorted(gaps)]
    return {
        "marked": f"(?!{longer})(?:{either(starts)})" if longer else either(starts),
        "unknown": _MARKER if "any" in bare else "",
        "dropped": either(dropped),
        "bare": "|".join((*unmarked, FENCE)) if bare else "",
        "value": "|".join(object_of(call) for call in calls if call.shape == "json" and not call.begins),
        "own": OBJECT if "json" in bare else "",
    }


@functools.lru_cache(maxsize=256)
def _thoughts_of(closing: str, calls: tuple[CallSyntax, ...]) -> Scan:
    """Finds what may end reasoning."""
    return Scan({"closing": regex.escape(closing), "marked": either(_starts(calls))})


def _starts(calls: Sequence[CallSyntax]) -> tuple[str, ...]:
    """The first words of what begins a call."""
    return tuple(dict.fromkeys(word for call in calls for word in call.starts))
