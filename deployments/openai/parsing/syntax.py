"""Declarations: how model families mark their tool calls and their reasoning."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.cursor import closings_of, first_word

_HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
ID, INDEX = "[A-Za-z0-9]{9}", "[0-9]{1,2}"
"""Patterns of what a call's id may be."""
_ARGUMENT_TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
_FUNCTION_TAGS = ("<function=", "</function>", "<parameter=", "</parameter>")
Shape = Literal["json", "named", "tagged", "lines", "python", "any"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSyntax:
    """How tool calls are written. White space around the words of a marker is free; `…` in one is any short text.

    Attributes:
        shape: `json` (an object or a list that has the name as well), `named` (the name, then the arguments as JSON),
            `tagged` (the name, then every argument between markers of its own), `lines` (the name, then every
            argument on lines of its own), `python` (calls with keywords),
            `any` (each of these after any marker that says that it is of a call).
        section, section_end: what stands around all calls of an answer; a model may leave it out.
        open, close: what stands around a call. In `named` and `tagged`, `open` goes up to the name.
        gap: what stands between the name and the arguments.
        key_open, key_close, value_close: what stands before and after an argument's name, and after its value.
        name, arguments: the keys of JSON. An empty `name`: the name is itself the key of the arguments.
        several: one value is a list of calls.
        each: `section` stands around every call.
        separator: what stands between two calls.
        keys: the keys of JSON in their order, with that of an id if calls have one.
        ids: a pattern of what an id is, or `…` in `gap`.
        kinds: what `…` in `key_close` is before a text, and before a whole number.
        quote: what stands around a text in place of quotes.
        listed: Python calls are in a list.
        alone: an answer has one call.
        sorts: arguments are in the order of their names.
        cdata: a text with markup is CDATA.
    """

    shape: Shape
    section: str = ""
    section_end: str = ""
    open: str = ""
    close: str = ""
    gap: str = ""
    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    name: str = "name"
    arguments: str = "arguments"
    several: bool = False
    each: bool = False
    separator: str = ""
    keys: tuple[str, ...] = ()
    ids: str = ID
    kinds: tuple[str, ...] = ()
    quote: str = ""
    listed: bool = True
    alone: bool = False
    sorts: bool = False
    cdata: bool = False

    @property
    def begins(self) -> tuple[str, ...]:
        """The texts that begin a call; empty if nothing marks one."""
        return tuple(text for text in (self.section, self.open) if text.strip())

    @property
    def starts(self) -> tuple[str, ...]:
        """The first words of these."""
        return tuple(map(first_word, self.begins))

    @property
    def ends(self) -> list[str]:
        """The texts that may follow a call that has been read."""
        return closings_of(self.section_end) + (closings_of(self.close) if self.shape == "tagged" else [])

    @property
    def around(self) -> tuple[str, str]:
        """What begins calls, and what ends them; empty if the answer's end does."""
        return "".join(self.begins[:1]).strip(), (self.section_end if self.section else self.close).strip()

    @property
    def sketch(self) -> str:
        """A call, as a person would write the form down."""
        bodies = {
            "json": f'{{"{self.name}": …, "{self.arguments}": …}}' if self.name else "{NAME: {…}}",
            "named": f"NAME{self.gap}{{…}}",
            "python": "[NAME(KEY=VALUE)]",
        }
        body = bodies.get(self.shape, f"NAME{self.gap}{self.key_open}KEY{self.key_close}VALUE{self.value_close}")
        body = f"[{body}]" if self.several else body
        return "".join(f"{self.section}{self.open}{body}{self.close}{self.section_end}".split())

    @property
    def markers(self) -> tuple[str, ...]:
        """All texts but those of the arguments; of a form that nothing declares, such as may be special tokens."""
        if self.shape == "any":
            return _ARGUMENT_TAGS + _FUNCTION_TAGS
        around = (self.section, self.section_end, self.open, self.close, self.gap)
        found = (*around, self.key_open, self.key_close, self.value_close)
        return tuple(part for text in found for part in text.split("…") if part.strip())


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSyntax:
    """How a model writes its answers.

    Attributes:
        calls: the forms of its tool calls, the first that can be read is taken.
        reasoning: the markers of its reasoning.
        dropped: markup that is neither content nor a call: what stands around content, and what ends a turn.
        harmony: the text is in channels; `HarmonySplitter` reads it.
        short_ids: its template insists on ids of nine letters and digits.
    """

    calls: tuple[CallSyntax, ...] = ()
    reasoning: ReasoningMarkers | None = None
    dropped: tuple[str, ...] = ()
    harmony: bool = False
    short_ids: bool = False

    def markers(self, *, calls: bool) -> tuple[str, ...]:
        """The texts that are looked for, those of calls if there are tools."""
        found = [] if self.reasoning is None else [self.reasoning.opening, self.reasoning.closing]
        found += _HARMONY_MARKERS if self.harmony else ()
        if calls:
            found += [text for call in self.calls for text in call.markers]
        # Without a letter they are parts of any token.
        words = dict.fromkeys(word for text in found for word in text.split() if any(map(str.isalpha, word)))
        return (*words, *(call.quote for call in self.calls if calls and len(call.quote) > 1))


def _form(shape: Shape, open: str, gap: str = "", close: str = "", around: tuple[str, str] = ("", "")) -> CallSyntax:
    section, end = around
    return CallSyntax(shape=shape, section=section, open=open, gap=gap, close=close, section_end=end)


BARE = CallSyntax(shape="json")
BARE_PYTHON = CallSyntax(shape="python")
UNDECLARED = CallSyntax(shape="any")
_BEGIN, _SEPARATOR, _END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_KIMI = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_CALLS = {
    "hermes": (_form("json", "<tool_call>", close="</tool_call>"), UNDECLARED),
    "llama3_json": (_form("json", "<|python_tag|>"), BARE),
    "mistral": (_form("json", "[TOOL_CALLS]"), _form("named", "[TOOL_CALLS]", "[CALL_ID]…[ARGS]")),
    "deepseek": (
        _form("named", f"{_BEGIN}function{_SEPARATOR}", "\n```json\n", f"\n```{_END}", _DEEPSEEK),
        _form("named", _BEGIN, _SEPARATOR, _END, _DEEPSEEK),
    ),
    "kimi": (_form("named", "<|tool_call_begin|>", ":…<|tool_call_argument_begin|>", "<|tool_call_end|>", _KIMI),),
    "granite": (_form("json", "<|tool_call|>"), UNDECLARED, BARE),
    "phi4": (_form("json", "functools"),),
    "internlm": (_form("json", "<|action_start|><|plugin|>", close="<|action_end|>"),),
    "pythonic": (_form("python", "<|python_start|>", close="<|python_end|>"), BARE_PYTHON),
    "olmo3": (_form("python", "<function_calls>", close="</function_calls>"),),
    "harmony": (
        replace(_form("named", " to=functions.", "<|channel|>commentary json<|message|>", "<|call|>"), alone=True),
    ),
    "json": (BARE,),
}
SYNTAXES = {
    name: AnswerSyntax(calls=calls, harmony=name == "harmony", short_ids=name == "mistral")
    for name, calls in _CALLS.items()
}
"""What `tool_parser` names."""

MARKERS = {
    "think": ReasoningMarkers("<think>", "</think>"),
    "mistral": ReasoningMarkers("[THINK]", "[/THINK]"),
    "thought": ReasoningMarkers("<thought>", "</thought>"),
    "reasoning": ReasoningMarkers("<reasoning>", "</reasoning>"),
    "harmony": ReasoningMarkers(
        "<|channel|>analysis<|message|>",
        "<|end|>",
        begins="<|channel|>",
        answer=("<|channel|>final", "<|message|>"),
        between="<|start|>assistant",
    ),
    "seed": ReasoningMarkers("<seed:think>", "</seed:think>"),
}
"""What `reasoning_parser` names."""

HARMONY_BEFORE_CALLS = replace(
    MARKERS["harmony"], between="", answer=("<|start|>assistant",), closed="<|channel|>final<|message|>"
)
"""A call begins where a message does: the header of the answer to a user is not waited for."""
