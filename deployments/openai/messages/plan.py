"""POST /v1/messages: from the request to the call, over the same machinery as chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, ThinkingBudget
from deployments.core.collector import let_go
from deployments.core.errors import BadRequest, UnsupportedParameter, shown
from deployments.core.model_card import ModelCard
from deployments.openai.chat.message import MessageFormat
from deployments.openai.chat.plan import chat_call
from deployments.openai.chat.prompt import ChatInput, read_chat
from deployments.openai.chat.schema import TemplateFields
from deployments.openai.chat.tools import ToolSet, read_tools
from deployments.openai.fields.fields import parse_fields
from deployments.openai.fields.objects import block_objects, unread_keys
from deployments.openai.http.exchange import Exchange
from deployments.openai.messages.conversation import Conversation
from deployments.openai.messages.schema import MessagesBody, PromptFields

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


async def message_plan(exchange: Exchange, body: MessagesBody, card: ModelCard) -> tuple[GenerateCall, MessageFormat]:
    """What the model is asked, and how its text is read.

    Raises:
        TroupeError: something in the request cannot be used.
    """
    exchange.take_turn(body.priority, body.metadata.user_id or body.user)
    chat = await _chat_input(exchange, body, card)
    sampling = await exchange.aside(lambda: _sampling(exchange, body))
    shown = body.thinking is None or body.thinking.type != "disabled"
    return await chat_call(exchange, card, body, chat, sampling, include_reasoning=shown)


async def message_prompt(exchange: Exchange, body: PromptFields, card: ModelCard) -> ChatPrompt:
    """The prompt of a message.

    Raises:
        TroupeError: something in the request cannot be used.
    """
    return await read_chat(exchange, await _chat_input(exchange, body, card), card)


async def _chat_input(exchange: Exchange, body: PromptFields, card: ModelCard) -> ChatInput:
    await exchange.aside(lambda: _check_keys(exchange))
    conversation = await exchange.aside(lambda: Conversation(body.system, body.messages))
    exchange.rename = conversation.rename
    tools = await exchange.aside(lambda: _tools(body), weight=4)
    given = {"chat_template_kwargs": {**_switches(body), **body.chat_template_kwargs} or None}
    fields, _ = parse_fields(TemplateFields, given, exchange.defaults(card))
    chat = ChatInput.from_fields(fields, conversation.messages, tools)
    return replace(chat, continue_final_message=conversation.continues, add_generation_prompt=None)


def _switches(body: PromptFields) -> dict[str, Any]:
    """The variables that chat templates read for the fields of this API."""
    switches: dict[str, Any] = {}
    if body.thinking is not None:
        on = body.thinking.type != "disabled"
        switches |= {"enable_thinking": on, "thinking": on}
    if body.output_config.effort is not None:
        switches["reasoning_effort"] = body.output_config.effort
    return switches


def asks_for_cache(exchange: Exchange) -> bool:
    """Whether something in the request has a `cache_control`."""
    given = exchange.given
    return "cache_control" in given or any("cache_control" in each for each, _, _ in block_objects(given))


def _check_keys(exchange: Exchange) -> None:
    """List the keys of blocks and tools that nobody reads among the ignored ones."""
    found = block_objects(exchange.settled.fields)
    try:
        exchange.ignore(unread_keys(found, ""))
    finally:
        let_go(found)


def _sampling(exchange: Exchange, body: MessagesBody) -> SamplingParams:
    wanted = body.output_config.format
    if wanted is not None:
        if body.response_format is not None:
            raise BadRequest(
                "Invalid 'response_format': a text can follow one constraint, and 'output_config.format' is one "
                "already.",
                param="response_format",
            )
        body = body.model_copy(update={"response_format": wanted})
        exchange.settled.sent.setdefault("response_format", "output_config.format")
    sampling = body.sampling(exchange.options, max_tokens=body.max_tokens, logprobs=None)
    thinking = body.thinking
    if thinking is None or thinking.budget_tokens is None or thinking.type == "disabled":
        return sampling
    return replace(sampling, thinking=ThinkingBudget(thinking.budget_tokens, optional=True))


def _tools(body: PromptFields) -> ToolSet | None:
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(body.tools)]
    choice, parallel = _choice(body.tool_choice)
    return read_tools(tools, choice, parallel)


def _tool(tool: object, place: str) -> dict[str, Any]:
    """A tool as chats have it. Those that Anthropic runs, or whose schema only its models know, are refused by name."""
    if not isinstance(tool, Mapping):
        raise BadRequest(f"Invalid '{place}': input should be an object; got {shown(tool)}.", param=place)
    if tool.get("type") not in (None, "custom"):
        raise UnsupportedParameter(
            f"This server does not support the tool {shown(tool.get('type'))} in '{place}'; send a tool with a name "
            "and an input_schema, which the client runs.",
            param=f"{place}.type",
        )
    if not isinstance(tool.get("name"), str) or not isinstance(tool.get("input_schema"), Mapping):
        raise BadRequest(f"Invalid '{place}': input should have a name and an input_schema.", param=place)
    function = {key: tool[key] for key in ("name", "description", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": {**function, "parameters": tool["input_schema"]}}


def _choice(choice: Any) -> tuple[Any, bool]:
    """The choice among the tools as chats have it, and whether several calls in one answer are wanted."""
    if choice is None:
        return None, True
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    parallel = not (isinstance(choice, Mapping) and choice.get("disable_parallel_tool_use"))
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}, parallel
    if kind not in _CHOICES:
        raise BadRequest(
            f"Invalid 'tool_choice': input should be an object with type auto, any, tool or none; got {shown(choice)}.",
            param="tool_choice",
        )
    return _CHOICES[kind], parallel
