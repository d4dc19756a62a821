"""POST /v1/chat/completions: from the request to the call."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import Response

from deployments.config.api import ApiOptions
from deployments.core.calls import ChatPrompt, SamplingParams
from deployments.core.errors import BadRequest, ModelError, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.chat.answer import ChatAnswer, ChatPlan
from deployments.openai.chat.media_urls import inline_media
from deployments.openai.chat.message import AnswerFormat
from deployments.openai.chat.messages import template_messages
from deployments.openai.chat.schema import ChatBody
from deployments.openai.chat.template_variables import check_variables
from deployments.openai.chat.tools import ToolSet, read_tools
from deployments.openai.fields.objects import has_odd_keys, objects_of, unread_keys
from deployments.openai.fields.sampling import check_choices, check_logprobs, check_stream_options, effective
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import json_answer, sse_answer
from deployments.openai.parsing import response_template
from deployments.openai.parsing.families import FAMILIES, family_of
from deployments.openai.parsing.reasoning import MARKERS

# A conversation's key: the number of values, and of a long text the number of samples and their length.
_KEYED = 200
_SAMPLES, _SAMPLE = 32, 32

# Arguments of apply_chat_template that do not reach the template, or have a request field of their own.
_RESERVED = {
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


async def create_chat_completion(exchange: Exchange) -> Response:
    """Answer a conversation, at once or as a stream."""
    body, card = await exchange.read(ChatBody)
    check_stream_options(exchange.given)
    answer = ChatAnswer(exchange, body, card, await chat_plan(exchange, body, card))
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(answer.call))
    if body.stream:
        return await sse_answer(exchange, answer.chunks())
    return await json_answer(exchange, answer.completion())


async def chat_plan(exchange: Exchange, body: ChatBody, card: ModelCard) -> ChatPlan:
    """What the model is to be asked, and how its text will be read.

    Raises:
        TroupeError: something in the request cannot be used.
    """
    check_choices(body.n, exchange.options)
    prompt, tools = await read_chat(exchange, body, card)
    sampling = await exchange.aside(lambda: _sampling(body, exchange.options, tools))
    reading = await _reading(exchange, card, tools, prompt.chat_template, body.include_reasoning)
    reading = replace(reading, constrained=sampling.grammar is not None)
    sampling = replace(sampling, markers=reading.markers)
    if reading.template is not None:
        # Its patterns are written for a text with all special tokens.
        sampling = replace(sampling, skip_special_tokens=False)
    affinity = exchange.affinity(body) or conversation_key(card.id, prompt.messages, exchange.given.get("user"))
    return ChatPlan(prompt=prompt, sampling=sampling, reading=reading, affinity=affinity)


async def read_chat(exchange: Exchange, body: ChatBody, card: ModelCard) -> tuple[ChatPrompt, ToolSet | None]:
    """The conversation for the model's chat template, and the tools of the request.

    Raises:
        BadRequest: a message, a tool, a medium's URL, or how to open the turn, cannot be used.
    """
    await check_objects(exchange, card, body.chat_template)
    tools = await exchange.aside(lambda: read_tools(body.tools, body.tool_choice, body.parallel_tool_calls))
    if exchange.options.media_urls:
        body.messages = await until_disconnect(exchange.request.receive, inline_media(body.messages, exchange.options))
    prompt = await exchange.aside(lambda: chat_prompt(body, card, exchange.options, tools))
    if exchange.settled.fields.keys() & {"chat_template_kwargs", "documents", "reasoning_effort"}:
        info = await until_disconnect(exchange.request.receive, exchange.api.tokenizer_info(card.id))
        check_variables(exchange, card, _used_template(info, prompt.chat_template, tools))
    return prompt, tools


async def check_objects(exchange: Exchange, card: ModelCard, template: str | None = None) -> None:
    """List the keys of messages and tools that nobody reads among the ignored ones.

    Args:
        template: the request's own chat template, or the name of one of the model's.

    Raises:
        BadRequest: one is nearly a known one, or asks for something that cannot be done.
    """
    found = await exchange.aside(lambda: objects_of(exchange.settled.fields))
    source: str | None = ""
    if await exchange.aside(lambda: has_odd_keys(found)):
        info = await until_disconnect(exchange.request.receive, exchange.api.tokenizer_info(card.id))
        source = _used_template(info, template, exchange.settled.fields.get("tools"))
    exchange.ignore(await exchange.aside(lambda: unread_keys(found, source)))


def chat_prompt(body: ChatBody, card: ModelCard, options: ApiOptions, tools: ToolSet | None) -> ChatPrompt:
    """The conversation as the model's chat template gets it.

    Raises:
        BadRequest: a message, or how to open the turn, cannot be used.
    """
    opens = check_template_fields(body, options)
    extras = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    kwargs = {key: value for key, value in extras.items() if value is not None}
    return ChatPrompt(
        messages=template_messages(body.messages),
        tools=None if tools is None else tools.definitions,
        template_kwargs={**kwargs, **body.chat_template_kwargs},
        add_generation_prompt=opens,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        merge_roles=card.options.merge_consecutive_roles,
    )


def check_template_fields(body: ChatBody, options: ApiOptions) -> bool:
    """Whether the prompt opens the assistant's turn.

    Raises:
        BadRequest: the template, its variables or how to open the turn cannot be used.
    """
    if body.chat_template is not None and not options.allow_request_chat_template:
        raise UnsupportedParameter(
            "This server takes no chat template from requests (allow_request_chat_template is off).",
            param="chat_template",
        )
    opens = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    if opens and body.continue_final_message:
        raise BadRequest(
            "Invalid 'continue_final_message': it excludes add_generation_prompt; set one of them.",
            param="continue_final_message",
        )
    for key in _RESERVED & body.chat_template_kwargs.keys():
        raise BadRequest(
            f"Invalid 'chat_template_kwargs': {key} is not a variable of a template; leave it out.",
            param=f"chat_template_kwargs.{key}",
        )
    return opens


def _sampling(body: ChatBody, options: ApiOptions, tools: ToolSet | None) -> SamplingParams:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("Invalid 'top_logprobs': it needs logprobs to be true.", param="top_logprobs")
    check_logprobs("top_logprobs", body.top_logprobs, options)
    limits = [limit for limit in (body.max_completion_tokens, body.max_tokens) if limit is not None]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = body.sampling(options, max_tokens=min(limits, default=None), logprobs=logprobs)
    if tools is None:
        return sampling
    if sampling.grammar is not None:
        raise UnsupportedParameter(
            "A text that follows response_format cannot hold tool calls; leave out one of them, or set tool_choice "
            "to none.",
            param="response_format",
        )
    return replace(sampling, grammar=tools.grammar())


async def _reading(
    exchange: Exchange, card: ModelCard, tools: ToolSet | None, template: str | None, include_reasoning: bool
) -> AnswerFormat:
    """How the model writes its answers, from its options and, if they leave it open, from its tokenizer.

    Args:
        template: the request's own chat template, or the name of one of the model's.
    """
    options = card.options
    reading = AnswerFormat(
        tools=tools,
        reasoning=MARKERS.get(options.reasoning_parser or ""),
        include_reasoning=include_reasoning,
    )
    described = response_template.NAME in (options.tool_parser, options.reasoning_parser)
    if tools is None and not described:
        harmony = FAMILIES["harmony"] if options.reasoning_parser == "harmony" else None
        return replace(reading, family=harmony)
    info = await until_disconnect(exchange.request.receive, exchange.api.tokenizer_info(card.id))
    if described or (options.tool_parser is None and options.reasoning_parser is None and info["response_template"]):
        if not info["response_template"]:
            raise ModelError(f"Model {card.id!r} is to be read by a response_template, but its tokenizer has none.")
        await asyncio.to_thread(response_template.importable)
        answers = info["response_template"]
        markers = response_template.reasoning_markers(answers) or reading.reasoning
        return replace(reading, template=answers, reasoning=markers)
    family = options.tool_parser or family_of(_used_template(info, template, tools))
    if "harmony" in (family, options.reasoning_parser):
        return replace(reading, family=FAMILIES["harmony"], reasoning=MARKERS["harmony"])
    return replace(reading, family=FAMILIES[family])


def _used_template(info: Mapping[str, Any], template: str | None, tools: object) -> str | None:
    """The chat template that writes the request's prompt; None if a function writes it."""
    named: Mapping[str, str] = info.get("chat_templates") or {}
    default: str | None = info.get("chat_template")
    if template is not None:
        return named.get(template, template)
    return (named.get("tool_use") if tools else None) or default


def conversation_key(model: str, messages: Sequence[Mapping[str, Any]], user: object = None) -> str:
    """The same for every turn of a conversation: a digest of its user and all before the assistant first spoke.

    A hint for routing: of a long text it reads the length and samples, of many messages the first ones.
    """
    opening = list(itertools.islice(itertools.takewhile(lambda m: m["role"] != "assistant", messages), _KEYED))
    sketch = _sketch([model, user, opening], itertools.count())
    return hashlib.blake2b(json.dumps(sketch).encode(), digest_size=16).hexdigest()


def _sketch(value: Any, seen: Iterator[int]) -> Any:
    """A value with long texts replaced by their lengths and samples, and without what comes after many others."""
    if next(seen) > _KEYED:
        return None
    if isinstance(value, str) and len(value) > _SAMPLES * _SAMPLE:
        step = len(value) // _SAMPLES
        return [len(value), *(value[i : i + _SAMPLE] for i in range(0, len(value), step)), value[-_SAMPLE:]]
    if isinstance(value, Mapping):
        return {key[:_SAMPLE]: _sketch(held, seen) for key, held in itertools.islice(value.items(), _KEYED)}
    if isinstance(value, list):
        return [_sketch(held, seen) for held in value[:_KEYED]]
    return value
