"""Checks of how an answer ends, and how tool calls and reasoning in it are read."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from deployments.cli.doctor.conversations import TOOL
from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Messages, Subject, assistant, first_difference, refusal, user
from deployments.core.errors import TroupeError
from deployments.core.reasoning import ReasoningMarkers
from deployments.core.token_ids import vocab_size
from deployments.engine.text.stop_tokens import terminator_ids
from deployments.openai.parsing import response_template
from deployments.openai.parsing.families import FAMILIES, family_of, shown_family
from deployments.openai.parsing.reasoning import MARKERS

_ANSWER = "ANSWERWORD"
_BEGUN_MARKER = re.compile(r"[<\[][^<>\[\]]*\Z")


async def stop_tokens(subject: Subject) -> Finding:
    """The stop tokens in force."""
    subject.need_text()
    size = vocab_size(subject.info.model)
    ids = sorted(i for i in _stop_ids(subject) if size is None or i < size)
    strings = _stop_strings(subject)
    if not ids and strings:
        named = ", ".join(map(repr, strings))
        return fine(f"Answers end with the texts of default_params: {named}.", stop_token_ids=[])
    if not ids and subject.info.generate is not None:
        return fine("The loader's generate hook alone ends answers.", stop_token_ids=[])
    if not ids:
        return fault("no-stop-tokens", "No stop token is in force.", stop_token_ids=[])
    texts = await subject.host.spell(subject.entry.id, ids)
    named = ", ".join(f"{text} ({token_id})" for text, token_id in zip(texts, ids, strict=True))
    return fine(f"Answers end with: {named}.", stop_token_ids=ids, stop_tokens=list(texts))


async def turn_end(subject: Subject) -> Finding:
    """Whether what the template writes after an answer stops generation."""
    subject.need_chat()
    messages = [user("Hello"), assistant(_ANSWER)]
    try:
        tail = await _after_answer(subject, messages)
    except TroupeError as error:
        raise NotApplicable(f"The template writes no answer: {refusal(error)}") from error
    with contextlib.suppress(TroupeError):
        # Some templates open the next turn unasked.
        tail = _common(tail, await _after_answer(subject, [*messages, user("Go on")]))
    if not (ending := tail.strip()):
        return fine("The template writes nothing after an answer.", ending="")
    ids = await subject.encode(ending)
    if _stop_ids(subject).intersection(ids):
        return fine(f"The template ends an answer with {ending!r}, which stops generation.", ending=ending)
    if any(ending.startswith(text) for text in _stop_strings(subject)):
        return fine(f"The template ends an answer with {ending!r}, at which default_params stop it.", ending=ending)
    fix = f"Set `api: {{default_params: {{stop: [{ending!r}]}}}}` for the model."
    if len(ids) == 1:
        fix = f"Let the loader return `stop_token_ids: [{ids[0]}]`."
    return fault(
        "turn-end-not-stop",
        f"The template ends an answer with {ending!r} (ids {', '.join(map(str, ids))}). Generation goes on.",
        fix=fix,
        ending=ending,
        ending_ids=list(ids),
    )


def _stop_ids(subject: Subject) -> set[int]:
    """The tokens that end an answer to a request that names none."""
    return {*terminator_ids(subject.model.hooks), *subject.entry.api.default_params.get("stop_token_ids", ())}


def _stop_strings(subject: Subject) -> list[str]:
    """The texts that end an answer to a request that names none."""
    stop = subject.entry.api.default_params.get("stop") or []
    return [stop] if isinstance(stop, str) else list(stop)


async def _after_answer(subject: Subject, messages: Messages) -> str:
    """What a conversation's prompt has after the answer in it."""
    return (await subject.text_of(messages, opens=False)).rpartition(_ANSWER)[2]


def _common(one: str, other: str) -> str:
    """How both texts begin, without a marker of which they have only the beginning in common."""
    place = first_difference(one, other)
    if place is None or place == len(one):
        return one
    return _BEGUN_MARKER.sub("", one[:place])


async def tool_format(subject: Subject) -> Finding:
    """The format in which tool calls are read."""
    subject.need_chat()
    source = await _source(subject, tools=True)
    chosen = subject.entry.api.tool_parser
    described = getattr(subject.info.tokenizer, "response_template", None)
    if chosen == response_template.NAME or (described and not chosen and not subject.entry.api.reasoning_parser):
        return fine("The tokenizer's response_template reads tool calls.", tool_parser=response_template.NAME)
    shown = shown_family(source)
    if chosen is not None:
        if shown not in (None, chosen):
            text = f"Tool calls are read as {chosen}; the template shows {shown}."
            return fault("tool-parser-differs", text, tool_parser=chosen, recognized=shown)
        return fine(f"Tool calls are read as {chosen}, as tool_parser says.", tool_parser=chosen, recognized=shown)
    if not await _takes_tools(subject):
        raise NotApplicable("The template takes no tools.")
    used = family_of(source)
    if shown is None:
        known = ", ".join(FAMILIES)
        return fault(
            "tool-format-unknown",
            f"The template shows no known format of tool calls; they are read as {used}.",
            fix=f"Set `api: {{tool_parser: …}}` for the model, to one of: {known}.",
            tool_parser=used,
            recognized=None,
        )
    return fine(f"Tool calls are read as {used}, as the template shows.", tool_parser=used, recognized=shown)


async def reasoning_format(subject: Subject) -> Finding:
    """The format in which reasoning is read."""
    subject.need_chat()
    source = await _source(subject)
    prompt = await subject.text_of([user(subject.trial.message)])
    chosen = subject.entry.api.reasoning_parser
    described = getattr(subject.info.tokenizer, "response_template", None)
    if chosen == response_template.NAME or (described and not chosen and not subject.entry.api.tool_parser):
        return fine("The tokenizer's response_template reads reasoning.", reasoning_parser=response_template.NAME)
    if chosen is not None:
        return _chosen(subject, chosen, source + prompt)
    found = [(name, marker) for name, marks in MARKERS.items() for marker in _signs(marks) if marker in source + prompt]
    if not found:
        return fine("The template marks no reasoning.", reasoning_parser=None)
    name, marker = found[0]
    opened = MARKERS[name].opened_by(prompt, continued=False)
    where = "The prompt ends with" if opened else "The template has"
    return fault(
        "reasoning-not-read",
        f"{where} {marker!r}, and no reasoning_parser is set.",
        fix=f"Set `api: {{reasoning_parser: {name}}}` for the model.",
        reasoning_parser=None,
        recognized=name,
        opened_by_prompt=opened,
    )


def _signs(marks: ReasoningMarkers) -> tuple[str, ...]:
    """The markers that only a template for reasoning has. Channels have other uses, and their end is a common token."""
    return (marks.opening,) if marks.begins else (marks.opening, marks.closing)


def _chosen(subject: Subject, chosen: str, seen: str) -> Finding:
    """Whether the markers of the chosen parser are anywhere to be seen."""
    marks = MARKERS[chosen]
    vocabulary: Any = getattr(subject.info.tokenizer, "get_vocab", dict)()
    if marks.opening in seen or marks.closing in seen or marks.first in vocabulary:
        return fine(f"Reasoning is read as {chosen}, as reasoning_parser says.", reasoning_parser=chosen)
    return fault(
        "reasoning-parser-differs",
        f"Reasoning is read as {chosen}, and neither template nor vocabulary has {marks.opening!r}.",
        reasoning_parser=chosen,
    )


async def _source(subject: Subject, *, tools: bool = False) -> str:
    """The text of the chat template; "" if a function writes the prompts."""
    return subject.model.hooks.template.source(tools=tools) or ""


async def _takes_tools(subject: Subject) -> bool:
    try:
        await subject.render([user(subject.trial.message)], tools=[TOOL])
    except TroupeError:
        return False
    return True
