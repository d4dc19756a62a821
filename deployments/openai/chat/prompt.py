"""The prompt of a conversation, whichever route it came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.config.api import ApiOptions
from deployments.core.calls import ChatPrompt
from deployments.core.collector import let_go
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.chat.media_urls import inline_media
from deployments.openai.chat.messages import Media, read_messages
from deployments.openai.chat.schema import TemplateFields
from deployments.openai.chat.template_variables import check_variables
from deployments.openai.chat.tools import ToolSet
from deployments.openai.fields.objects import has_odd_keys, objects_of, unread_keys
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import Exchange

# Arguments of apply_chat_template that do not reach the template, or have a request field of their own.
_RESERVED = {
    *("messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput:
    """A conversation, and what shapes its prompt.

    Attributes:
        messages: as the client sent them.
        tools: those the model may call.
        template_kwargs: variables of the chat template.
        add_generation_prompt: open the assistant's turn; None opens it unless the final message is continued.
        continue_final_message: leave the last message open.
        chat_template: the request's own chat template, or the name of one of the model's.
    """

    messages: Sequence[object]
    tools: ToolSet | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None

    @classmethod
    def from_fields(cls, fields: TemplateFields, messages: Sequence[object], tools: ToolSet | None = None) -> ChatInput:
        extras = {"documents": fields.documents, "reasoning_effort": fields.reasoning_effort}
        kwargs = {key: value for key, value in extras.items() if value is not None}
        return cls(
            messages=messages,
            tools=tools,
            template_kwargs={**kwargs, **fields.chat_template_kwargs},
            add_generation_prompt=fields.add_generation_prompt,
            continue_final_message=fields.continue_final_message,
            chat_template=fields.chat_template,
        )


def check_template_fields(chat: ChatInput, options: ApiOptions) -> bool:
    """Whether the prompt opens the assistant's turn.

    Raises:
        BadRequest: the template, its variables or how to open the turn cannot be used.
    """
    if chat.chat_template is not None and not options.allow_request_chat_template:
        raise UnsupportedParameter(
            "This server takes no chat template from requests (allow_request_chat_template is off).",
            param="chat_template",
        )
    opens = not chat.continue_final_message if chat.add_generation_prompt is None else chat.add_generation_prompt
    if opens and chat.continue_final_message:
        raise BadRequest(
            "Invalid 'continue_final_message': it excludes add_generation_prompt; set one of them.",
            param="continue_final_message",
        )
    for key in _RESERVED & chat.template_kwargs.keys():
        raise BadRequest(
            f"Invalid 'chat_template_kwargs': {key} is not a variable of the template; leave it out.",
            param=f"chat_template_kwargs.{key}",
        )
    return opens


def chat_prompt(chat: ChatInput, card: ModelCard, options: ApiOptions) -> tuple[ChatPrompt, Media]:
    """The conversation as the model's chat template gets it, and its parts that are not text.

    Raises:
        BadRequest: a message, or how to open the turn, cannot be used.
    """
    opens = check_template_fields(chat, options)
    messages, media = read_messages(chat.messages)
    prompt = ChatPrompt(
        messages=messages,
        tools=None if chat.tools is None else chat.tools.definitions,
        template_kwargs=chat.template_kwargs,
        add_generation_prompt=opens,
        continue_final_message=chat.continue_final_message,
        chat_template=chat.chat_template,
        merge_roles=card.options.merge_consecutive_roles,
        write_tools=card.options.tools_without_template,
    )
    return prompt, media


async def inlined_prompt(exchange: Exchange, chat: ChatInput, card: ModelCard) -> tuple[ChatPrompt, Media]:
    """`chat_prompt`, after what its media name by URL was fetched.

    Raises:
        BadRequest: a message, a medium's URL, or how to open the turn, cannot be used.
    """
    prompt, media = await exchange.aside(lambda: chat_prompt(chat, card, exchange.options))
    exchange.keep(chat.messages, prompt.messages)
    await fetch_media(exchange, media)
    return prompt, media


async def fetch_media(exchange: Exchange, media: Media) -> None:
    """Put what media name by URL into the messages, if the server allows it.

    Raises:
        BadRequest: a medium's URL cannot be used.
    """
    if media and exchange.options.media_urls:
        await until_disconnect(exchange.request.receive, inline_media(media, exchange.options))


async def read_chat(exchange: Exchange, chat: ChatInput, card: ModelCard) -> ChatPrompt:
    """`inlined_prompt` of a request whose template variables are to have an effect.

    Raises:
        BadRequest: also if the chat template does not read a variable.
    """
    prompt, _ = await inlined_prompt(exchange, chat, card)
    if exchange.settled.fields.keys() & {"chat_template_kwargs", "documents", "reasoning_effort"}:
        info = await until_disconnect(exchange.request.receive, exchange.client.tokenizer_info(card.id))
        check_variables(exchange, card, used_template(info, chat.chat_template, chat.tools))
    return prompt


def check_special_tokens(asked: bool | None) -> None:
    """Refuse special tokens before a prompt that a chat template writes.

    Raises:
        UnsupportedParameter: they are asked for.
    """
    if asked:
        raise UnsupportedParameter(
            "A chat template writes its special tokens itself; leave 'add_special_tokens' out.",
            param="add_special_tokens",
        )


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
        info = await until_disconnect(exchange.request.receive, exchange.client.tokenizer_info(card.id))
        source = used_template(info, template, exchange.settled.fields.get("tools"))

    def unread() -> list[str]:
        try:
            return unread_keys(found, source)
        finally:
            let_go(found)  # In steps, and not on the event loop.

    exchange.ignore(await exchange.aside(unread))


def used_template(info: Mapping[str, Any], template: str | None, tools: object) -> str | None:
    """The chat template that writes the request's prompt; None if a function writes it."""
    named: Mapping[str, str] = info.get("chat_templates") or {}
    default: str | None = info.get("chat_template")
    if template is not None:
        return named.get(template, template)
    return (named.get("tool_use") if tools else None) or default
