"""POST /v1/responses: from the request to the call, over the same machinery as chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.core.calls import GenerateCall, SamplingParams
from deployments.core.errors import BadRequest, UnsupportedParameter, shown
from deployments.core.model_card import ModelCard
from deployments.openai.chat.message import MessageFormat
from deployments.openai.chat.plan import chat_call
from deployments.openai.chat.prompt import ChatInput, check_objects
from deployments.openai.chat.schema import AnswerFields
from deployments.openai.chat.tools import ToolSet, read_tools
from deployments.openai.fields.constraint import ResponseFormat
from deployments.openai.fields.fields import parse_fields
from deployments.openai.fields.sampling import check_logprobs
from deployments.openai.http.exchange import Exchange
from deployments.openai.responses.messages import item_messages
from deployments.openai.responses.schema import ResponsesBody

_LOGPROBS = "message.output_text.logprobs"
# What may be asked for and is never there to include.
_EMPTY_INCLUDES = ("reasoning.encrypted_content",)


async def response_plan(exchange: Exchange, body: ResponsesBody, card: ModelCard) -> tuple[GenerateCall, MessageFormat]:
    """What the model is asked, and how its text is read.

    Raises:
        TroupeError: something in the request cannot be used.
    """
    fields = _answer_fields(exchange, body, card)
    await check_objects(exchange, card, fields.chat_template)
    chat = await exchange.aside(lambda: ChatInput.from_fields(fields, _messages(body), _tools(body)))
    sampling = await exchange.aside(lambda: _sampling(exchange, body, fields))
    return await chat_call(exchange, card, body, chat, sampling, include_reasoning=fields.include_reasoning)


def _answer_fields(exchange: Exchange, body: ResponsesBody, card: ModelCard) -> AnswerFields:
    """What a chat has fields for and a response has not: from fields of other names, else from the model's defaults."""
    given = {
        "max_tokens": body.max_output_tokens,
        "reasoning_effort": body.reasoning.effort,
        "chat_template_kwargs": body.chat_template_kwargs or None,
    }
    if body.max_output_tokens is not None:
        _note_sent(exchange, "max_tokens", "max_output_tokens")
    if body.reasoning.effort is not None:
        _note_sent(exchange, "reasoning_effort", "reasoning.effort")
    fields, _ = parse_fields(AnswerFields, given, exchange.defaults(card))
    return fields


def _note_sent(exchange: Exchange, ours: str, field: str) -> None:
    """Let errors about a field of a chat name that of the response."""
    if ours not in exchange.settled.fields:
        sent = exchange.settled.sent
        sent.setdefault(ours, sent.get(field, field))


def _sampling(exchange: Exchange, body: ResponsesBody, fields: AnswerFields) -> SamplingParams:
    check_logprobs("top_logprobs", body.top_logprobs, exchange.options)
    logprobs = (body.top_logprobs or 0) if wants_logprobs(body) else None
    constrained = _constrained(exchange, body)
    return constrained.sampling(exchange.options, max_tokens=fields.limit, logprobs=logprobs)


def _constrained(exchange: Exchange, body: ResponsesBody) -> ResponsesBody:
    """The request with its `text.format` as a response_format."""
    wanted = body.text.format
    if wanted is None or wanted.type == "text":
        return body
    if body.response_format is not None:
        raise BadRequest(
            "Invalid 'response_format': a text can follow one constraint, and 'text.format' is one already.",
            param="response_format",
        )
    _note_sent(exchange, "response_format", "text.format")
    return body.model_copy(update={"response_format": ResponseFormat(type=wanted.type, schema=wanted.schema_)})


def wants_logprobs(body: ResponsesBody) -> bool:
    """Whether the text's log-probabilities are asked for.

    Raises:
        UnsupportedParameter: something else is to be included.
    """
    for name in body.include:
        if name not in (_LOGPROBS, *_EMPTY_INCLUDES):
            raise UnsupportedParameter(f"This server does not support including {shown(name)}.", param="include")
    return _LOGPROBS in body.include or bool(body.top_logprobs)


def _tools(body: ResponsesBody) -> ToolSet | None:
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    return read_tools(tools, _tool_choice(body.tool_choice), body.parallel_tool_calls)


def _tool(tool: object, place: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, Mapping) else tool
        raise UnsupportedParameter(
            f"This server does not support '{place}' of type {shown(kind)}; use functions.", param=f"{place}.type"
        )
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _tool_choice(choice: Any) -> Any:
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = [_named(tool) for tool in choice.get("tools") or ()]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    return _named(choice)


def _named(tool: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": tool.get("name") if isinstance(tool, Mapping) else tool}}


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise BadRequest("Invalid 'input': there is no item; send at least one.", param="input")
    return item_messages(body.input, "input", messages)
