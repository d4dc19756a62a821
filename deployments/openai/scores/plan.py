"""From a request for scores or decisions to the prompts that they are read from."""

from __future__ import annotations

import json
import re
import string
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from deployments.core.calls import ChatPrompt, Prompt, TextPrompt
from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.chat.messages import Media, read_parts
from deployments.openai.chat.prompt import ChatInput, chat_prompt, check_objects, fetch_media
from deployments.openai.fields.sampling import check_choices
from deployments.openai.http.exchange import Exchange
from deployments.openai.responses.messages import item_messages, name_items
from deployments.openai.scores.schema import ChoiceQuestion, DecisionsBody, Predicate, Question, ScoreBody

_LETTERS = string.ascii_uppercase
_PART = re.compile(r"(messages\[\d+\]\.content\[\d+\])(.*)")
_NAMED = 3

Items = str | list[dict[str, Any]]


async def score_plan(exchange: Exchange, body: ScoreBody, card: ModelCard) -> Prompt:
    """What the continuations come after.

    Raises:
        BadRequest: something in the request cannot be used.
    """
    await check_objects(exchange, card)
    prompt = await exchange.aside(lambda: _score_prompt(exchange, body, card))
    if isinstance(prompt, ChatPrompt):
        exchange.keep(prompt.messages)
    return prompt


def _score_prompt(exchange: Exchange, body: ScoreBody, card: ModelCard) -> Prompt:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("Invalid request: send either 'prompt' or 'messages'.", param="prompt")
    if not all(body.choices):
        raise BadRequest("Invalid 'choices': a choice is empty.", param="choices")
    if body.prompt is not None:
        return TextPrompt(text=body.prompt)
    chat = ChatInput(
        messages=body.messages or [],
        template_kwargs=body.chat_template_kwargs,
        continue_final_message=body.continue_final_message,
    )
    conversation, media = chat_prompt(chat, card, exchange.options)
    if media:
        raise UnsupportedParameter("Continuations are scored after texts only; leave the images out.", param="messages")
    return conversation


async def decision_plan(exchange: Exchange, body: DecisionsBody, card: ModelCard) -> list[tuple[ChatPrompt, Media]]:
    """The conversation with each question at its end, and the parts of each that are not text.

    Raises:
        BadRequest: something in the request cannot be used.
    """
    check_choices(len(body.questions), exchange.options)
    items = await exchange.aside(lambda: _known_items(body.input))
    exchange.rename = partial(name_items, given=items)
    chat = await exchange.aside(lambda: ChatInput(messages=_turns(items), template_kwargs=_kwargs(body)))
    prompt, media = await exchange.aside(lambda: chat_prompt(chat, card, exchange.options))
    exchange.keep(chat.messages, prompt.messages)
    prompt = replace(prompt, add_generation_prompt=True)
    asked = await exchange.aside(lambda: [_asked(prompt, each, index) for index, each in enumerate(body.questions)])
    places = await exchange.aside(lambda: _places(prompt, asked))
    exchange.rename = partial(_name_places, items=items, places=places)
    await fetch_media(exchange, [*media, *(medium for _, own in asked for medium in own)])
    return [(each, [*media, *own]) for each, own in asked]


def _turns(items: Items) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": items}] if isinstance(items, str) else item_messages(items, "input")
    last = turns[-1]
    if last.get("role") != "user":
        return [*turns, {"role": "user", "content": []}]
    content = last.get("content")
    return [*turns[:-1], {**last, "content": _parts(content)}]


def _kwargs(body: DecisionsBody) -> dict[str, Any]:
    return {"enable_thinking": False, **body.chat_template_kwargs}


def _places(prompt: ChatPrompt, asked: Sequence[tuple[ChatPrompt, Media]]) -> dict[str, list[str]]:
    """By place in the conversations that are asked about: the media of questions that stand there."""
    places: dict[str, list[str]] = defaultdict(list)
    turn = len(prompt.messages) - 1
    for each, own in asked:
        index = {id(part): i for i, part in enumerate(each.messages[turn]["content"])} if own else {}
        for place, medium in own:
            places[f"messages[{turn}].content[{index[id(medium)]}]"].append(place)
    return places


def _name_places(error: TroupeError, items: Items, places: Mapping[str, Sequence[str]]) -> None:
    """Let an error about the conversation name the item or the questions that it is about."""
    found = _PART.match(error.param or "")
    questions = places.get(found[1]) if found else None
    if not found or not questions:
        name_items(error, items)
        return
    named = [f"{place}{found[2]}" for place in questions]
    error.message = error.message.replace(found[0], " or ".join(named[:_NAMED]))
    error.param = named[0] if len(named) == 1 else "questions"


def _asked(prompt: ChatPrompt, question: Question, index: int) -> tuple[ChatPrompt, Media]:
    """The conversation with a question at the end of its last turn, and the question's parts that are not text."""
    *before, last = prompt.messages
    own: Media = []
    asked = _question_parts(question, f"questions[{index}].instructions", own)
    turn = {**last, "content": [*last["content"], *asked]}
    return replace(prompt, messages=[*before, turn]), own


def _question_parts(question: Question, place: str, media: Media) -> list[Any]:
    """What the model is asked: the instructions, then a line for every option and its label, then how to reply."""
    labels = question_labels(question)
    lines = [f"{label}: {text}" for label, text in zip(labels, _options(question), strict=True)]
    kind = "letter" if len(labels) <= len(_LETTERS) else "number"
    opening = "\nIs this true?" if isinstance(question, Predicate) else "\nQuestion:"
    ending = "\n".join([*lines, f"Reply with the {kind} of one line and nothing else."])
    if isinstance(question.instructions, str):
        return _text(f"{opening} {question.instructions}\n{ending}")
    return [*_text(opening), *read_parts(_readable(question.instructions, place), place, media), *_text(ending)]


def _options(question: Question) -> list[str]:
    if isinstance(question, Predicate):
        return ["true", "false"]
    if isinstance(question, ChoiceQuestion):
        named = [(json.dumps(option.value, ensure_ascii=False), option.description) for option in question.choices]
    else:
        named = [(level.label, level.description) for level in question.levels]
    return [f"{name} ({description})" if description else name for name, description in named]


def question_labels(question: Question) -> list[str]:
    """Letters; where there are too few, numbers of one length, so that none begins like another."""
    count = len(_options(question))
    return list(_LETTERS[:count]) if count <= len(_LETTERS) else [f"{number:03d}" for number in range(1, count + 1)]


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


def _parts(content: Any) -> Any:
    """A content as a list of parts, if it is one."""
    return _text(content) if isinstance(content, str) else content or []


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]
