"""Checks of how an answer ends, and how tool calls and reasoning in it are read."""

from __future__ import annotations

import contextlib
import re
from typing import Any

from deployments.cli.doctor.conversations import TOOL
from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Messages, Subject, assistant, first_difference, refusal, user
from deployments.core.errors import TroupeError
from deployments.core.model_card import ModelOptions
from deployments.core.token_ids import vocab_size
from deployments.engine.text.stop_tokens import terminator_ids
from deployments.openai.parsing import AnswerFormat, response_template
from deployments.openai.parsing.format import format_of
from deployments.openai.parsing.syntax import MARKERS, SYNTAXES

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
    source = subject.model.hooks.template.source(tools=True) or ""
    chosen = subject.entry.api.tool_parser
    if _described(subject, chosen):
        return fine("The tokenizer's response_template reads tool calls.", tool_parser=response_template.NAME)
    if chosen is None and not await _takes_tools(subject):
        raise NotApplicable("The template takes no tools.")
    found = format_of(subject.entry.api, source, subject.tokens)
    facts = {"tool_parser": chosen, **found.card()}
    shown = format_of(ModelOptions(), source, subject.tokens)
    if chosen is not None and not found.is_proved and _differ(found, shown):
        text = f"Tool calls are read as {chosen}; the template shows {shown.calls or 'harmony'}."
        return fault("tool-parser-differs", text, **facts)
    if found.source == "default":
        return fault(
            "tool-format-unknown",
            f"The template shows no format of tool calls. They are read as {found.calls}.",
            fix=f"Set `api: {{tool_parser: …}}` for the model, to one of: {', '.join(SYNTAXES)}.",
            **facts,
        )
    return fine(found.describe(), **facts)


def _differ(found: AnswerFormat, shown: AnswerFormat) -> bool:
    """Whether calls begin otherwise than the template shows."""
    first, second = ({text for call in each.syntax.calls for text in call.begins} for each in (found, shown))
    return shown.source != "default" and not first & second


def _described(subject: Subject, chosen: str | None) -> bool:
    """Whether the tokenizer's own description is used."""
    named = (subject.entry.api.tool_parser, subject.entry.api.reasoning_parser)
    return chosen == response_template.NAME or bool(subject.info.described_answers and named == (None, None))


async def reasoning_format(subject: Subject) -> Finding:
    """The format in which reasoning is read."""
    subject.need_chat()
    source = await _source(subject)
    prompt = await subject.text_of([user(subject.trial.message)])
    chosen = subject.entry.api.reasoning_parser
    if _described(subject, chosen):
        return fine("The tokenizer's response_template reads reasoning.", reasoning_parser=response_template.NAME)
    if chosen is not None:
        return _chosen(subject, chosen, source + prompt)
    marks = format_of(subject.entry.api, source, subject.tokens).syntax.reasoning
    if marks is None:
        return fine("The template marks no reasoning.", reasoning_parser=None)
    opened = marks.opened_by(prompt, continued=False)
    where = ", which the prompt opens" if opened else ""
    text = f"Reasoning is read between {marks.opening!r} and {marks.closing!r}{where}."
    return fine(text, reasoning_parser=None, opening=marks.opening, closing=marks.closing, opened_by_prompt=opened)


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


async def _source(subject: Subject) -> str:
    """The text of the chat template; "" if a function writes the prompts."""
    return subject.model.hooks.template.source() or ""


async def _takes_tools(subject: Subject) -> bool:
    try:
        await subject.render([user(subject.trial.message)], tools=[TOOL])
    except TroupeError:
        return False
    return True
