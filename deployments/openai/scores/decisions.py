"""POST /v1/decisions: questions with fixed answers, answered by the probabilities of their labels.

Each question becomes a prompt that lists its options with a label, and one forward tells how likely the model begins
its reply with each label. Labels that are not single tokens of a model, or too many for letters, are scored as texts.
"""

from __future__ import annotations

import asyncio
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from fastapi import Response

from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, TextPrompt
from deployments.core.client import Rendered
from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter
from deployments.core.events import Usage
from deployments.core.model_card import ModelCard
from deployments.openai.chat.media_urls import inline_media
from deployments.openai.chat.messages import has_media
from deployments.openai.chat.plan import chat_prompt
from deployments.openai.chat.schema import ChatBody
from deployments.openai.fields.choices import Choice, gather
from deployments.openai.fields.fields import parse_fields
from deployments.openai.fields.logprobs import UNLIKELY
from deployments.openai.fields.sampling import check_choices
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, to_json
from deployments.openai.responses.answer import usage_of
from deployments.openai.responses.plan import item_messages, name_items
from deployments.openai.scores.continuations import score_continuations, shares
from deployments.openai.scores.schema import Answer, ChoiceQuestion, Decision, DecisionsBody, Predicate, Question

_LETTERS = string.ascii_uppercase
# Long enough that the tokens at its end are those of the whole prompt.
_TAIL = 200

Items = str | list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Reading:
    """The log-probability of each label of a question, in order, and what they cost."""

    logprobs: list[float]
    usage: Usage


async def create_decision(exchange: Exchange) -> Response:
    """Answer questions that have fixed answers with the probability of each."""
    body, card = await exchange.read(DecisionsBody)
    check_choices(len(body.questions), exchange.options)
    items = await exchange.aside(lambda: _known_items(body.input))
    try:
        return await _respond(exchange, body, card, items)
    except TroupeError as error:
        name_items(error, items)
        raise


async def _respond(exchange: Exchange, body: DecisionsBody, card: ModelCard, items: Items) -> Response:
    given = await exchange.aside(
        lambda: [{"role": "user", "content": items}] if isinstance(items, str) else item_messages(items, "input")
    )
    messages = await until_disconnect(exchange.request.receive, inline_media(given, exchange.options))
    prompts = await exchange.aside(
        lambda: [_prompt(exchange, body, card, messages, index) for index in range(len(body.questions))]
    )
    return await json_answer(exchange, _decision(exchange, body, card, prompts))


async def _decision(exchange: Exchange, body: DecisionsBody, card: ModelCard, prompts: list[ChatPrompt]) -> bytes:
    labels = [_labels(question) for question in body.questions]
    rendered = await asyncio.gather(*(exchange.client.render(card.id, prompt) for prompt in prompts))
    finder = LabelFinder(exchange, card)
    found = [await finder.ids(each, wanted) for each, wanted in zip(rendered, labels, strict=True)]
    single = [index for index, ids in enumerate(found) if ids is not None]
    readings: dict[int, Reading] = {}
    if single:
        chosen = [(prompts[index], found[index] or []) for index in single]
        readings.update(zip(single, await _read(exchange, body, card, chosen), strict=True))
    for index in set(range(len(prompts))).difference(single):
        if has_media(prompts[index].messages):
            raise UnsupportedParameter(
                f"The answers of 'questions[{index}]' are not single tokens of model {card.id!r}; such questions are "
                "answered about texts only.",
                param=f"questions[{index}]",
            )
        sums, usage = await score_continuations(
            exchange, card, rendered[index], labels[index], param=f"questions[{index}]", plain=False
        )
        readings[index] = Reading([total for total, _ in sums], usage)
    ordered = [readings[index] for index in range(len(prompts))]
    answers = [_answer(question, each.logprobs) for question, each in zip(body.questions, ordered, strict=True)]
    usage = Usage(
        prompt_tokens=sum(each.usage.prompt_tokens for each in ordered),
        completion_tokens=sum(each.usage.completion_tokens for each in ordered),
        cached_tokens=sum(each.usage.cached_tokens for each in ordered),
    )
    shape: Decision = {"model": body.model or card.id, "answers": answers, "usage": usage_of(usage)}
    return to_json(shape)


class LabelFinder:
    """Finds the token that each label is at the beginning of a reply."""

    def __init__(self, exchange: Exchange, card: ModelCard) -> None:
        self._exchange = exchange
        self._model = card.id
        self._known: dict[tuple[str, str], int | None] = {}

    async def ids(self, rendered: Rendered, labels: Sequence[str]) -> list[int] | None:
        """The labels' token ids; None if one of them is not one token, or two are the same."""
        tail = (rendered.text or "")[-_TAIL:]
        # The bound text is what follows the last of the question: for all questions of a model the same few tails.
        missing = [label for label in labels if (tail, label) not in self._known]
        if missing:
            base = (await self._encoded(tail)).token_ids
            wholes = await asyncio.gather(*(self._encoded(tail + label) for label in missing))
            for label, whole in zip(missing, wholes, strict=True):
                fits = whole.token_ids[:-1] == base
                self._known[tail, label] = whole.token_ids[-1] if fits else None
        ids = [self._known[tail, label] for label in labels]
        single = [token_id for token_id in ids if token_id is not None]
        return single if len(set(single)) == len(labels) else None

    async def _encoded(self, text: str) -> Rendered:
        return await self._exchange.client.render(self._model, TextPrompt(text=text, add_special_tokens=False))


async def _read(
    exchange: Exchange, body: DecisionsBody, card: ModelCard, chosen: Sequence[tuple[ChatPrompt, list[int]]]
) -> list[Reading]:
    """One forward for each prompt: how likely its reply begins with each of its label tokens."""
    wanted = tuple(sorted({token_id for _, ids in chosen for token_id in ids}))
    call = GenerateCall(
        request_id=f"decision-{uuid4().hex}",
        model=card.id,
        prompts=tuple(prompt for prompt, _ in chosen),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=wanted),
        affinity=exchange.request.headers.get("x-session-affinity") or body.prompt_cache_key,
    )
    gathered = await gather(exchange.generate(call), len(chosen))
    counts = [len(ids) for ids in gathered.accepted.prompt_token_ids]
    cached = [gathered.usage.cached_tokens if index == 0 else 0 for index in range(len(chosen))]
    return [
        Reading(
            _label_logprobs(choice, ids),
            Usage(prompt_tokens=count, completion_tokens=1, cached_tokens=reused),
        )
        for choice, (_, ids), count, reused in zip(gathered.choices, chosen, counts, cached, strict=True)
    ]


def _label_logprobs(choice: Choice, ids: Sequence[int]) -> list[float]:
    (first,) = choice.logprobs[:1]
    known = {candidate.token_id: candidate.logprob for candidate in first.top}
    return [max(known.get(token_id, UNLIKELY), UNLIKELY) for token_id in ids]


def _prompt(
    exchange: Exchange, body: DecisionsBody, card: ModelCard, messages: Sequence[Mapping[str, Any]], index: int
) -> ChatPrompt:
    """The conversation, with a question at its end."""
    question = body.questions[index]
    asked = _question_parts(question, f"questions[{index}].instructions")
    *before, last = [dict(message) for message in messages]
    if last.get("role") == "user":
        last["content"] = [*_parts(last["content"]), *asked]
        turns = [*before, last]
    else:
        turns = [*before, last, {"role": "user", "content": asked}]
    kwargs = {"enable_thinking": False, **body.chat_template_kwargs}
    chat, _ = parse_fields(ChatBody, {"messages": turns, "chat_template_kwargs": kwargs})
    prompt = chat_prompt(chat, card, exchange.options, None)
    return replace(prompt, add_generation_prompt=True)


def _question_parts(question: Question, place: str) -> list[Any]:
    """What the model is asked: the instructions, then a line for every option and its label, then how to reply."""
    labels = _labels(question)
    lines = [f"{label}: {text}" for label, text in zip(labels, _options(question), strict=True)]
    kind = "letter" if len(labels) <= len(_LETTERS) else "number"
    opening = "\nIs this true?" if isinstance(question, Predicate) else "\nQuestion:"
    ending = "\n".join([*lines, f"Reply with the {kind} of one line and nothing else."])
    if isinstance(question.instructions, str):
        return _parts(f"{opening} {question.instructions}\n{ending}")
    return [*_parts(opening), *_readable(question.instructions, place), *_parts(ending)]


def _options(question: Question) -> list[str]:
    if isinstance(question, Predicate):
        return ["true", "false"]
    if isinstance(question, ChoiceQuestion):
        named = [(json.dumps(option.value, ensure_ascii=False), option.description) for option in question.choices]
    else:
        named = [(level.label, level.description) for level in question.levels]
    return [f"{name} ({description})" if description else name for name, description in named]


def _labels(question: Question) -> list[str]:
    """Letters; where there are too few, numbers of one length, so that none begins like another."""
    count = len(_options(question))
    return list(_LETTERS[:count]) if count <= len(_LETTERS) else [f"{number:03d}" for number in range(1, count + 1)]


def _answer(question: Question, logprobs: Sequence[float]) -> Answer:
    probabilities = shares(logprobs)
    best = max(range(len(logprobs)), key=lambda index: logprobs[index])
    confidence = math.exp(logprobs[best])
    if isinstance(question, Predicate):
        return {"type": "predicate", "name": question.name, "probability": probabilities[0]}
    if isinstance(question, ChoiceQuestion):
        return {
            "type": "choice",
            "name": question.name,
            "choice": question.choices[best].value,
            "probabilities": [
                {"value": option.value, "probability": share}
                for option, share in zip(question.choices, probabilities, strict=True)
            ],
            "confidence": confidence,
        }
    return {
        "type": "score",
        "name": question.name,
        "score": math.fsum(value * share for value, share in enumerate(probabilities)),
        "probabilities": [
            {"value": value, "label": level.label, "probability": share}
            for value, (level, share) in enumerate(zip(question.levels, probabilities, strict=True))
        ],
        "confidence": confidence,
    }


def _known_items(given: Items) -> Items:
    """The input as the Responses API has it."""
    if isinstance(given, str):
        return given
    if not given:
        raise BadRequest("Invalid 'input': there is no item; send at least one.", param="input")
    return [_known_item(item, f"input[{index}]") for index, item in enumerate(given)]


def _known_item(item: Mapping[str, Any], place: str) -> dict[str, Any]:
    """An item as the Responses API has it, its JSON parts as texts and its custom calls as calls of functions."""
    read = dict(item)
    for key in ("content", "output"):
        if isinstance(read.get(key), list):
            read[key] = _readable(read[key], f"{place}.{key}")
    if read.get("type") == "custom_tool_call":
        arguments = json.dumps({"input": read.get("input")}, ensure_ascii=False)
        read.update(type="function_call", arguments=arguments)
    elif read.get("type") == "custom_tool_call_output":
        read["type"] = "function_call_output"
    return read


def _readable(content: Any, place: str) -> Any:
    """A content whose JSON parts are texts."""
    if not isinstance(content, list):
        return content
    return [_readable_part(part, f"{place}[{index}]") for index, part in enumerate(content)]


def _readable_part(part: Any, place: str) -> Any:
    if not isinstance(part, Mapping) or part.get("type") != "input_json":
        return part
    if not isinstance(part.get("data"), Mapping | list):
        raise BadRequest(f"Invalid '{place}.data': input should be an object or a list.", param=f"{place}.data")
    return {"type": "input_text", "text": json.dumps(part["data"], ensure_ascii=False, separators=(",", ":"))}


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
