"""Which pieces of a conversation reach the prompt, found by rendering it once with a mark in place of every piece."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from model_loaders.prompts.message_forms import Message

TOOL = "qvztoolzvq"
SAMPLE_TOOL = {
    "type": "function",
    "function": {
        "name": TOOL,
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"about": {"type": "string", "description": "What to look up."}},
            "required": ["about"],
        },
    },
}
SYSTEM_ROLES = ("system", "developer")
_MARK = re.compile(r"qvz\d+zvq|9021\d{9}1209")
_NUMBER = re.compile(r"[\s.,:/+-]*\d[\s\d.,:/+-]*")
_WORD = re.compile(r"[\w-]+")
# Characters that a search may read beside a few passes over the prompt.
_READ_FREELY = 1 << 24
_PASSES = 8


Side = Literal["before", "after", "alike"]


class Piece(NamedTuple):
    """A part of a conversation that must appear in the prompt.

    Attributes:
        mark: what stands for it in the marked conversation.
        place: the request field that holds it.
        what: it is, for people.
    """

    mark: str
    place: str
    what: str


class Marked:
    """A conversation with a mark in place of every text, name and argument.

    Args:
        strict: every message has to reach the prompt; else tool calls, their results and messages of roles that
            templates seldom know. Text beside tool calls and reasoning never have to.
        kept: what of tool calls stays as it is, for templates that look a name up among the tools, or a key among the
            arguments.
        side: the marks stand before or after the texts, not in their place, or only in place of numbers and of texts in
            capitals, as a number or in capitals; tool calls stay as they are.
        prompt: of the conversation; texts that are in it as they are have reached it.
        shows_system: the template is known to write a system message that comes first. If there is no other, whether
            it does so in every turn is left to its author: Mistral's does while the user speaks last.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        *,
        strict: bool,
        shows_system: bool,
        kept: Sequence[str] = (),
        side: Side | None = None,
        prompt: str = "",
    ) -> None:
        self.pieces: list[Piece] = []
        self._count = 0
        self._names: dict[str, str] = {}
        self._ids: dict[str, str] = {}
        self._strict = strict
        self._kept = kept
        self._side = side
        self._said = _Search(prompt)
        systems = sum(message["role"] in SYSTEM_ROLES for message in messages)
        self._trusted = shows_system and systems == 1 and len(messages) > 1
        self.messages = [self._message(message, index) for index, message in enumerate(messages)]

    def missing(self, text: str) -> Piece | None:
        """The first piece that a prompt lacks; found by one pass over the prompt, not by one for each piece."""
        lowered = text.lower()
        found = set(_MARK.findall(lowered))
        if self._kept:
            found.update(_WORD.findall(lowered))
        for piece in self.pieces:
            if piece.mark in found:
                continue
            if _MARK.fullmatch(piece.mark) or piece.mark not in lowered:
                return piece
            found.add(piece.mark)
        return None

    def _mark(self) -> str:
        self._count += 1
        return f"qvz{self._count}zvq"

    def _message(self, message: Message, index: int) -> Message:
        place = f"messages[{index}]"
        marked = dict(message)
        if (calls := message.get("tool_calls")) and self._side is None:
            marked["tool_calls"] = [self._call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls)]
        if isinstance(answered := message.get("tool_call_id"), str):
            marked["tool_call_id"] = self._ids.get(answered, answered)
        if isinstance(name := message.get("name"), str):
            marked["name"] = self._names.get(name, name)
        if "content" in message:
            marked["content"] = self._content(message, place, required=self._required(message, index))
        return marked

    def _required(self, message: Message, index: int) -> bool:
        role = message["role"]
        if role == "assistant":
            # Reasoning at the beginning of an earlier turn is often left out on purpose.
            return self._strict and not message.get("tool_calls") and self._side != "before"
        if role in SYSTEM_ROLES:
            return self._strict and not (index == 0 and self._trusted)
        return self._strict or role != "user"

    def _content(self, message: Message, place: str, *, required: bool) -> Any:
        content = message["content"]
        what = f"{place} (role {message['role']!r})"
        if isinstance(content, str):
            return self._text(content, f"{place}.content", what, required=required)
        if not isinstance(content, list):
            return content
        parts = []
        for i, part in enumerate(content):
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                text = self._text(part["text"], f"{place}.content[{i}]", f"{place}.content[{i}]", required=required)
                part = {**part, "text": text}
            parts.append(part)
        return parts

    def _text(self, text: str, place: str, what: str, *, required: bool) -> str:
        if not text.strip():
            return text
        mark = self._mark()
        if self._side == "alike":
            match _form(text):
                case "number":
                    mark = f"9021{self._count:09}1209"
                case "words":
                    return text
        if required and not self._said.finds(text.strip()):
            self.pieces.append(Piece(mark, place, what))
        marked = {None: mark, "before": f"{mark} {text}", "after": f"{text} {mark}", "alike": mark}[self._side]
        return marked.upper() if self._side == "alike" else marked

    def _call(self, call: Mapping[str, Any], place: str) -> Message:
        function = call["function"]
        name = function["name"] if "names" in self._kept else self._mark()
        self._names[function["name"]] = name
        self.pieces.append(Piece(name.lower(), place, f"the tool call {place}"))
        arguments, marks = self._arguments(function["arguments"])
        what = f"the arguments of the tool call {place}"
        self.pieces.extend(Piece(mark, f"{place}.function.arguments", what) for mark in marks)
        marked = {**call, "function": {**function, "name": name, "arguments": arguments}}
        if isinstance(call_id := call.get("id"), str) and f"functions.{function['name']}:" in call_id:
            # Kimi's ids name the function.
            marked["id"] = self._ids[call_id] = call_id.replace(function["name"], name)
        return marked

    def _arguments(self, arguments: Any) -> tuple[Any, list[str]]:
        if arguments in ({}, "{}", []):
            return arguments, []
        if isinstance(arguments, list):
            return [mark := self._mark()], [mark]
        if "keys" in self._kept and isinstance(arguments, Mapping):
            marked = {key: self._mark() if isinstance(value, str) else value for key, value in arguments.items()}
            return marked, [marked[key] for key, value in arguments.items() if isinstance(value, str)]
        key, value = self._mark(), self._mark()
        if isinstance(arguments, Mapping):
            return {key: value}, [key, value]
        return f'{{"{key}": "{value}"}}', [key, value]


Write = Callable[[list[Message]], str | None]
"""Writes the prompt of a marked conversation; None if the template refuses it."""


def begins_with_system(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a system message stands first."""
    return bool(messages) and messages[0].get("role") in SYSTEM_ROLES


def unseen_piece(messages: Sequence[Message], write: Write, *, strict: bool, shows_system: bool) -> Piece | None:
    """The first piece that a template leaves out, whatever it says, or because it is a number or in capitals.

    The arguments are those of `Marked`.
    """
    for kept in ((), ("names",), ("names", "keys")):
        marked = Marked(messages, strict=strict, shows_system=shows_system, kept=kept)
        text = write(marked.messages) if marked.pieces else ""
        if text is not None:
            if (piece := marked.missing(text)) is not None:
                return piece
            break
    marked = Marked(messages, strict=strict, shows_system=shows_system, side="alike")
    text = write(marked.messages) if marked.pieces else None
    return None if text is None else marked.missing(text)


def unseen_words(messages: Sequence[Message], write: Write, *, shows_system: bool, prompt: str) -> Piece | None:
    """The first text of which a template leaves out the beginning or the end, because of what it says."""
    sides: tuple[Side, ...] = ("after", "before")
    for side in sides:
        marked = Marked(messages, strict=True, shows_system=shows_system, side=side, prompt=prompt)
        text = write(marked.messages) if marked.pieces else None
        if text is not None and (piece := marked.missing(text)) is not None:
            return piece
    return None


def pattern_of(messages: Sequence[Message]) -> Hashable:
    """The same for conversations of which a template writes the same pieces.

    What a template does with a message depends on its kind, on its neighbors, and on whether there are more like it;
    an agent's conversation therefore soon has the pattern of its earlier turns.
    """
    kinds = [_kind(message) for message in messages]
    triples = zip([None, *kinds], kinds, [*kinds[1:], None], strict=False)
    return frozenset((triple, min(count, 2)) for triple, count in Counter(triples).items())


def is_said(messages: Sequence[Message], prompt: str) -> bool:
    """Whether a prompt is seen to have every text as it is, or as JSON, but for texts beside tool calls.

    A template may leave out the earliest messages of a long conversation, or those with certain words. The texts are
    looked for in their order; a search that has to read the prompt over and over is given up, as not seen.
    """
    search = _Search(prompt)
    contents = (message.get("content") for message in messages if not message.get("tool_calls"))
    return all(search.finds(text) for content in contents for text in _texts(content))


class _Search:
    """Looks for texts in a prompt, each from where the last one was; reads little more than a few times the prompt."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._place = 0
        self._left = _READ_FREELY + _PASSES * len(prompt)

    def finds(self, text: str) -> bool:
        """Whether the text is in the prompt, as it is or as JSON; False too if too much would have to be read."""
        if self._after(text, self._place):
            return True
        forms = {text, *(json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))}
        return any(self._after(form, start) for start in (self._place, 0) for form in forms)

    def _after(self, form: str, start: int) -> bool:
        if self._left < 0:
            return False
        at = self._prompt.find(form, start)
        if at < 0:
            self._left -= len(self._prompt) - start
            return False
        self._left -= at + len(form) - start
        self._place = at
        return True


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content.strip()]
    parts = content if isinstance(content, list) else ()
    return [part["text"].strip() for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _form(text: str) -> Literal["", "number", "capitals", "words"]:
    if not text.strip():
        return ""
    if _NUMBER.fullmatch(text):
        return "number"
    return "capitals" if text.isupper() else "words"


def _kind(message: Message) -> Hashable:
    content = message.get("content")
    form: Hashable = None
    if isinstance(content, str):
        form = _form(content)
    elif isinstance(content, list):
        form = tuple((p.get("type"), _form(str(p.get("text", "")))) for p in content if isinstance(p, Mapping))
    calls = message.get("tool_calls") or ()
    called = tuple(type(call["function"]["arguments"]) if call["function"]["arguments"] else None for call in calls)
    return message["role"], form, called, tuple(message)
