"""Checks of the conversations that benchmarks send, and that chat templates refuse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Subject, assistant, refusal, user
from deployments.core.errors import TroupeError

_SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up.",
        "parameters": {"type": "object", "properties": {"about": {"type": "string"}}, "required": ["about"]},
    },
}
# Mistral's templates insist on ids of nine letters and digits.
_CALL = {"id": "call00001", "type": "function", "function": {"name": "look_up", "arguments": '{"about": "tea"}'}}
_CALLED = [
    user("What is tea?"),
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "look_up", "content": "A drink."},
]


@dataclass(frozen=True, slots=True)
class _Kind:
    """A kind of conversation: what it has, the messages, the code of the finding if it is refused."""

    what: str
    messages: Sequence[Mapping[str, Any]]
    code: str


_KINDS = {
    "system": _Kind("a system message", [_SYSTEM, user("Hello")], "system-refused"),
    "turns": _Kind("an earlier answer", [user("Hello"), assistant("Hi"), user("Go on")], "turns-refused"),
    "consecutive-users": _Kind("two user messages in a row", [user("Hello"), user("Go on")], "consecutive-refused"),
    "consecutive-answers": _Kind(
        "two answers in a row",
        [user("Hello"), assistant("Hi"), assistant("Well"), user("Go on")],
        "consecutive-refused",
    ),
    "empty-user": _Kind("an empty user message", [user("")], "empty-refused"),
    "empty-answer": _Kind("an empty answer", [user("Hello"), assistant(""), user("Go on")], "empty-refused"),
}


def _check(kind: _Kind) -> Callable[[Subject], Awaitable[Finding]]:
    async def check(subject: Subject) -> Finding:
        subject.need_chat()
        error = await _refused(subject, kind.messages)
        if error is None:
            return fine(f"A conversation with {kind.what} is accepted.")
        fix = None
        if kind.code == "consecutive-refused" and not await _merged(subject, kind.messages):
            fix = "Give the loader a `chat_template` that writes consecutive messages of a role."
        return fault(kind.code, f"With {kind.what} a client gets {refusal(error)}", fix=fix, error=_fields(error))

    return check


CHECKS = {name: _check(kind) for name, kind in _KINDS.items()}
"""The check of each kind of conversation."""


async def tools(subject: Subject) -> Finding:
    """Whether a request with tools is accepted."""
    subject.need_chat()
    error = await _refused(subject, [user("What is tea?")], [TOOL])
    if error is None:
        return fine("A request with tools is accepted.")
    speaks = "tools" in (subject.model.hooks.template.source(tools=True) or "")
    code = "tools-refused" if speaks else "no-tools"
    return fault(code, f"With tools a client gets {refusal(error)}", error=_fields(error))


async def tool_results(subject: Subject) -> Finding:
    """Whether a tool call and its result are accepted."""
    subject.need_chat()
    if await _refused(subject, [user("What is tea?")], [TOOL]):
        raise NotApplicable("The template takes no tools.")
    error = await _refused(subject, _CALLED, [TOOL])
    if error is None:
        return fine("A tool call and its result are accepted.")
    return fault(
        "tool-results-refused", f"With a tool call and its result a client gets {refusal(error)}", error=_fields(error)
    )


async def _refused(
    subject: Subject, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> TroupeError | None:
    """The error that a client gets for a conversation; None if it gets a prompt."""
    try:
        await subject.render(messages, tools=tools)
    except TroupeError as error:
        return error
    return None


async def _merged(subject: Subject, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a conversation is accepted if consecutive messages of a role are joined."""
    try:
        await subject.host.render(subject.entry.id, replace(subject.chat(messages), merge_roles=True))
    except TroupeError:
        return False
    return True


def _fields(error: TroupeError) -> dict[str, Any]:
    return {"status": error.status, "code": error.code, "param": error.param}
