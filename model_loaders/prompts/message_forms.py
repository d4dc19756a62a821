"""Finds how a chat template reads messages, by rendering short conversations, and writes messages in that form.

Templates differ in what they read: a content as text or as a list of parts, null or "" beside tool calls, arguments as
an object or as JSON text, which roles. Each question is answered once, when a request first needs it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from deployments.core.errors import RAISED_BY_HOOKS

Message = dict[str, Any]
Reads = Literal["text", "parts", "both", "part"]

# Letters and digits alone, so that no template escapes them; found whatever case the template gives them.
_FIRST, _SECOND, _NAME, _KEY, _VALUE, _ROLE = (f"qvz{n}zvq" for n in range(6))
# Mistral's templates insist on nine letters or digits.
_ID = "qvz6id7vq"
_USER: Message = {"role": "user", "content": "Go on."}
_NO_ID = "\0"
_RESULT: Message = {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": "Done."}
_STANDARD = ("system", "user", "assistant", "tool")
_RESULT_ROLES = ("tool", "ipython", "tool_response", "function", "observation", "tool_results")
# What a role is called by templates that do not know it.
_ALIASES = {
    "developer": ("system",),
    "system": ("developer",),
    "agent": ("assistant",),
    "tool": _RESULT_ROLES[1:],
    **dict.fromkeys(_RESULT_ROLES[1:], ("tool",)),
}


class _Absent:
    """In place of a content: the message has no such key."""


class _EmptyPart:
    """In place of a content: a list of one empty text."""


_ABSENT, _EMPTY_PART = _Absent(), _EmptyPart()
Empty = str | _Absent | _EmptyPart | None
Form = Literal["object", "string"]
_EMPTIES: tuple[Empty, ...] = (None, _ABSENT, "", _EMPTY_PART)
_ARGUMENTS: tuple[Form, ...] = ("object", "string")
_NOT_WRITTEN, _PERFECT = (False, False, False, 0), (True, True, True, 0)


class CallForm(NamedTuple):
    """How a template reads an assistant's message with tool calls.

    Attributes:
        arguments: as an object, or as JSON text.
        null, blank: what stands in place of a content of null and of "".
        named_by_id: the template writes a call's id and not its name, as Kimi's does.
    """

    arguments: Form = "object"
    null: Empty = ""
    blank: Empty = ""
    named_by_id: bool = False


class MessageForms:
    """The forms of messages that one chat template reads.

    Args:
        write: renders messages; raises where the template refuses them.
        source: the template's text; None for a function.
    """

    def __init__(self, write: Callable[[list[Message]], str], source: str | None) -> None:
        self._write = write
        self._source = None if source is None else re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)
        self._reads: dict[str, Reads] = {}
        self._roles: dict[str, str] = {}
        self._reached: dict[str, bool] = {}
        self._kinds: dict[tuple[str, str], bool] = {}

    def shape(self, messages: Sequence[Mapping[str, Any]], *, own_roles: bool = False) -> list[Message]:
        """The messages in the form that the template reads.

        Args:
            own_roles: leave the messages their roles, but for results.
        """
        called: dict[str, tuple[str | None, str]] = {}
        roles = [str(message.get("role")) for message in messages]
        roles = [role if own_roles and role not in _RESULT_ROLES else self.role(role) for role in roles]
        return [self._shaped(message, role, called) for message, role in zip(messages, roles, strict=True)]

    def describe(self) -> dict[str, Any]:
        """What was found, as JSON values."""
        calls = self.calls
        named = {None: "null", "": "empty", _ABSENT: "absent", _EMPTY_PART: "part"}
        return {
            "content": {role: self.reads(role) for role in _STANDARD},
            "null_content": {"without_calls": named[self.empty], "with_calls": named[calls.null]},
            "arguments": calls.arguments,
            "roles": {role: self.role(role) for role in ("developer", "system", "tool", "function")},
        }

    def reads(self, role: str) -> Reads:
        """What the template reads as the content of a role's messages."""
        if role not in self._reads:
            parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
            text = self._written(self._around(role, parts)) or ""
            first, second = _as_text(text, _FIRST), _as_text(text, _SECOND)
            if first and not _has(self._written(self._around(role, _FIRST)), _FIRST):
                self._reads[role] = "parts" if second else "part"
            else:
                self._reads[role] = "both" if first and second else "text"
        return self._reads[role]

    def writes(self, role: str, part: Mapping[str, Any]) -> bool:
        """Whether the template may write a part: text, a medium, or the text of some other type (`thinking`)."""
        kind = part["type"]
        if kind in ("text", "image", "audio"):
            return True
        if not isinstance(part.get(kind), str):
            return False
        if (role, kind) not in self._kinds:
            text = self._written(self._around(role, [{"type": kind, kind: _FIRST}]))
            self._kinds[role, kind] = _as_text(text or "", _FIRST)
        return self._kinds[role, kind]

    def role(self, role: str) -> str:
        """The name under which the template reads a role's messages; the role itself if no other is better."""
        if role not in self._roles:
            self._roles[role] = self._find_role(role)
        return self._roles[role]

    def reaches(self, role: str) -> bool:
        """Whether the template writes a role's content where it usually stands."""
        if role not in self._reached:
            self._reached[role] = any(
                _has(self._written(self._around(role, content)), _FIRST)
                for content in (_FIRST, [{"type": "text", "text": _FIRST}])
            )
        return self._reached[role]

    @cached_property
    def empty(self) -> Empty:
        """What stands in place of a content of null in an assistant's message without tool calls."""

        return max(_EMPTIES, key=self._empty_score)

    @cached_property
    def blank(self) -> Empty:
        """The same for a content of ""."""
        return "" if self._empty_score("")[0] else self.empty

    def _empty_score(self, content: Empty) -> tuple[bool, int]:
        text = self._written([self._user, _with_content({"role": "assistant"}, content), self._user])
        return text is not None, -(text or "").count("None")

    @cached_property
    def calls(self) -> CallForm:
        """How the template reads tool calls."""
        best, form, empty = _NOT_WRITTEN, _ARGUMENTS[0], _EMPTIES[0]
        for tried_form, tried_empty in itertools.product(_ARGUMENTS, _EMPTIES):
            if best == _PERFECT:
                break
            score = self._call_score(tried_form, tried_empty)
            if score > best:
                best, form, empty = score, tried_form, tried_empty
        if best == _NOT_WRITTEN:
            return CallForm()
        text = self._called(empty, _arguments_of(form))
        return CallForm(
            arguments=form,
            null=empty,
            blank="" if self._call_score(form, "") == best else empty,
            named_by_id=not _has(text, _NAME) and _has(text, _ID),
        )

    def _call_score(self, form: str, empty: Empty) -> tuple[bool, bool, bool, int]:
        """How well a call is written: at all, completely, and in the intended form; best first."""
        arguments = _arguments_of(form)
        text = self._called(empty, arguments)
        if text is None:
            return _NOT_WRITTEN
        whole = _has(text, _KEY) and _has(text, _VALUE) and (_has(text, _NAME) or _has(text, _ID))
        meant = self._source is None or (
            f"'{_KEY}': '" not in text if isinstance(arguments, dict) else arguments in text
        )
        return True, whole, whole and meant, -text.count("None")

    def _shaped(self, message: Mapping[str, Any], role: str, called: dict[str, tuple[str | None, str]]) -> Message:
        """A message in the template's form; `called` are the id and the name of earlier calls, by the client's ids."""
        calls = message.get("tool_calls")
        content = message.get("content")
        if role == "assistant" and _is_empty(content):
            shaped = _with_content({**message, "role": role}, self._nothing(content, bool(calls)))
        else:
            shaped = {**message, "role": role, "content": self._content(content, role)}
        if calls:
            shaped["tool_calls"] = [self._call(call, index) for index, call in enumerate(calls)]
            for call, each in zip(calls, shaped["tool_calls"], strict=True):
                # Without ids, results are those of the calls in their order.
                called[str(call.get("id") or f"{_NO_ID}{id(call)}")] = (each.get("id"), each["function"]["name"])
        answered = str(message.get("tool_call_id") or "")
        if not answered and message["role"] == "tool":
            answered = next((each for each in called if each.startswith(_NO_ID)), "")
        if answered in called:
            identity, name = called.pop(answered) if answered.startswith(_NO_ID) else called[answered]
            shaped |= {} if identity is None else {"tool_call_id": identity}
            # OpenAI's results name their call alone; templates that write a function's name have it from here.
            if self._source is not None:
                shaped.setdefault("name", name)
        if role == "assistant" and isinstance(message.get("reasoning_content"), str) and self._thinks_in_parts:
            shaped = _with_thought(shaped)
        return shaped

    def _nothing(self, content: Any, calls: bool) -> Empty:
        if calls:
            return self.calls.null if content is None else self.calls.blank
        return self.empty if content is None else self.blank

    def _content(self, content: Any, role: str) -> Any:
        if isinstance(content, list):
            if any(part.get("type") != "text" for part in content) or self.reads(role) in ("parts", "both"):
                return content
            text = "\n".join(part["text"] for part in content)
            return as_parts(text) if self.reads(role) == "part" else text
        if self._source is not None and isinstance(content, str) and self.reads(role) in ("parts", "part"):
            return as_parts(content)
        return content

    def _call(self, call: Mapping[str, Any], index: int) -> Message:
        function = {**call["function"], "arguments": self._arguments(call["function"].get("arguments"))}
        shaped = {**call, "function": function}
        name = function["name"]
        if self.calls.named_by_id and name not in str(call.get("id")):
            shaped["id"] = f"functions.{name}:{index}"
        return shaped

    def _arguments(self, given: Any) -> Any:
        """Arguments in the form that the template writes; what is not an object stays what the model wrote."""
        value = _parsed(given)
        if self.calls.arguments == "string":
            return given if isinstance(given, str) and value != {} else json.dumps(value, ensure_ascii=False)
        if isinstance(value, Mapping):
            return value
        if isinstance(value, list) and self._takes_list:
            return value
        text = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        return text if self._takes_text else {"arguments": text}

    @cached_property
    def _takes_text(self) -> bool:
        return _has(self._called(self.calls.null, _VALUE), _VALUE)

    @cached_property
    def _takes_list(self) -> bool:
        return _has(self._called(self.calls.null, [_VALUE]), _VALUE)

    @cached_property
    def _thinks_in_parts(self) -> bool:
        """Whether the template writes reasoning that is a part of the content, and not a field of its own."""
        message = {**_call_message(self.calls.null, _arguments_of(self.calls.arguments)), "reasoning_content": _FIRST}
        if _has(self._written([self._user, message]), _FIRST):
            return False
        return _as_text(self._written([self._user, _with_thought(message)]) or "", _FIRST)

    def _find_role(self, role: str) -> str:
        if role in ("user", "assistant") or role not in _ALIASES:
            return role
        if role in _STANDARD:
            if self._source is None or self.reaches(role):
                return role
            return next((other for other in _ALIASES[role] if self._knows(other) and self.reaches(other)), role)
        return role if self._knows(role) and self.reaches(role) else self.role(_ALIASES[role][0])

    def _knows(self, role: str) -> bool:
        """Whether the template names a role; of a function, whether it writes it otherwise than one it cannot know."""
        if self._source is not None:
            # In a tag that speaks of roles: 'function' is also the type of a tool.
            tags = re.findall(r"\{[%{].*?[%}]\}", self._source, flags=re.DOTALL)
            return any("role" in tag and re.search(rf"""["']{role}["']""", tag) for tag in tags)
        known, unknown = (self._written(self._around(name, _FIRST, like=role)) for name in (role, _ROLE))
        return known is not None and known != (unknown or "").replace(_ROLE, role)

    def _around(self, role: str, content: Any, *, like: str | None = None) -> list[Message]:
        """A conversation with a message of a role where such messages usually stand."""
        message = {"role": role, "content": content}
        match like or role:
            case "user":
                return [message]
            case "assistant" | "agent":
                return [self._user, message, self._user]
            case kind if kind in _RESULT_ROLES:
                call = _call_message(self.calls.null, _arguments_of(self.calls.arguments))
                return [self._user, call, {**_RESULT, **message}]
            case "system" | "developer":
                return [message, self._user]
        return [self._user, message]

    @property
    def _user(self) -> Message:
        parts = self.reads("user") in ("parts", "part")
        return {**_USER, "content": as_parts(_USER["content"])} if parts else _USER

    def _called(self, content: Empty, arguments: Any) -> str | None:
        """A question, a call and its result; without the result if the template has no place for it."""
        called = [self._user, _call_message(content, arguments)]
        results: tuple[list[Message], ...] = ([_RESULT], [{**_RESULT, "content": as_parts(_RESULT["content"])}], [])
        texts = (self._written([*called, *result]) for result in results)
        return next((text for text in texts if text is not None), None)

    def _written(self, messages: list[Message]) -> str | None:
        try:
            text = self._write(messages)
        except RAISED_BY_HOOKS:
            return None
        return text if isinstance(text, str) else None


def as_parts(content: Any) -> list[Any]:
    """A content as a list of parts."""
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _call_message(content: Empty, arguments: Any) -> Message:
    function = {"name": _NAME, "arguments": arguments}
    message = {"role": "assistant", "tool_calls": [{"id": _ID, "type": "function", "function": function}]}
    return _with_content(message, content)


def _arguments_of(form: str) -> Any:
    arguments = {_KEY: _VALUE}
    return arguments if form == "object" else json.dumps(arguments)


def _with_content(message: Message, content: Empty) -> Message:
    if isinstance(content, _Absent):
        return {key: value for key, value in message.items() if key != "content"}
    return {**message, "content": as_parts("") if isinstance(content, _EmptyPart) else content}


def _with_thought(message: Message) -> Message:
    """A message whose reasoning is the first part of its content."""
    thought, content = message["reasoning_content"], message.get("content")
    parts = as_parts(content) if content else []
    return {**message, "content": [{"type": "thinking", "thinking": thought}, *parts]}


def _is_empty(content: Any) -> bool:
    """Whether an assistant's content is empty, in any form."""
    if isinstance(content, list):
        return all(part.get("type") == "text" and not part["text"] for part in content)
    return content is None or content == ""


def _parsed(given: Any) -> Any:
    """The value of arguments; {} for every way to write that there are none, a text that is not JSON as it is."""
    if not isinstance(given, str):
        return {} if given is None else given
    if not given.strip():
        return {}
    try:
        value = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return {} if value is None else value


def _has(text: str | None, *marks: str) -> bool:
    return text is not None and all(mark in text.lower() for mark in marks)


def _as_text(text: str, mark: str) -> bool:
    """Whether a template writes a text, and not the Python or JSON form of a list that holds it."""
    return _has(text, mark) and not re.search(rf"""["'](text["']\s*:\s*["'])?{mark}["']\s*[,}}\]]""", text)
