"""POST /v1/chat/completions: from the request to the call."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deployments.config.api import ApiOptions
from deployments.core.calls import GenerateCall, Grammar, SamplingParams
from deployments.core.errors import BadRequest, ModelError, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.chat.call_grammar import call_grammar
from deployments.openai.chat.message import MessageFormat
from deployments.openai.chat.prompt import ChatInput, check_objects, read_chat, used_template
from deployments.openai.chat.schema import ChatBody, TemplateFields
from deployments.openai.chat.tools import ToolSet, read_tools
from deployments.openai.fields.sampling import GenerationBody, check_choices, check_logprobs
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import Exchange
from deployments.openai.parsing import response_template
from deployments.openai.parsing.rendering import takes_tools
from deployments.openai.parsing.syntax import MARKERS, CallSyntax
from deployments.routing.hint import text_blocks

# A conversation's key: the number of values, and of a long text the number of samples and their length.
_KEYED = 200
_SAMPLES, _SAMPLE = 32, 32


async def chat_plan(exchange: Exchange, body: ChatBody, card: ModelCard) -> tuple[GenerateCall, MessageFormat]:
    """What the model is asked, and how its text is read.

    Raises:
        TroupeError: something in the request cannot be used.
    """
    check_choices(body.n, exchange.options)
    chat = await chat_input(exchange, body, body.messages, card)
    sampling = await exchange.aside(lambda: _sampling(body, exchange.options))
    return await chat_call(exchange, card, body, chat, sampling, include_reasoning=body.include_reasoning)


async def chat_input(exchange: Exchange, body: TemplateFields, messages: list[Any], card: ModelCard) -> ChatInput:
    """The conversation of a request, and its tools.

    Raises:
        BadRequest: a tool cannot be used, or a key is nearly a known one.
    """
    await check_objects(exchange, card, body.chat_template)
    parallel = body.parallel_tool_calls if isinstance(body, ChatBody) else True
    tools = await exchange.aside(lambda: read_tools(body.tools, body.tool_choice, parallel), weight=4)
    return ChatInput.from_fields(body, messages, tools)


async def chat_call(
    exchange: Exchange,
    card: ModelCard,
    body: GenerationBody,
    chat: ChatInput,
    sampling: SamplingParams,
    *,
    include_reasoning: bool,
) -> tuple[GenerateCall, MessageFormat]:
    """What the model is asked to make of a conversation, and how its text is read."""
    prompt = await read_chat(exchange, chat, card)
    found = await _message_format(exchange, card, chat.tools, chat.chat_template)
    sampling = await exchange.aside(lambda: constrained(sampling, chat.tools, found))
    answers = replace(
        found,
        include_reasoning=include_reasoning,
        constrained=sampling.grammar is not None,
        continued=prompt.continue_final_message,
    )
    # A template's patterns are written for a text with all special tokens.
    skips = sampling.skip_special_tokens and answers.template is None
    given = exchange.affinity(body)
    affinity = given or conversation_key(card.id, prompt.messages, exchange.given.get("user"))
    call = GenerateCall(
        request_id=exchange.name_call(body),
        model=card.id,
        prompts=(prompt,),
        sampling=replace(sampling, markers=answers.markers, skip_special_tokens=skips),
        n=body.n,
        truncate_prompt=body.truncate_prompt_tokens,
        reasoning=answers.before_answer,
        affinity=affinity,
        blocks=() if given else text_blocks(card.id, [prompt.tools, prompt.messages]),
        stream=body.stream,
        owner=exchange.owner,
    )
    return call, answers


def _sampling(body: ChatBody, options: ApiOptions) -> SamplingParams:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("Invalid 'top_logprobs': it needs logprobs to be true.", param="top_logprobs")
    check_logprobs("top_logprobs", body.top_logprobs, options)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return body.sampling(options, max_tokens=body.limit, logprobs=logprobs)


def constrained(sampling: SamplingParams, tools: ToolSet | None, answers: MessageFormat) -> SamplingParams:
    """Parameters of an answer that may, or must, call tools, and of a reasoning that is limited.

    Raises:
        UnsupportedParameter: another constraint excludes calls, or the model's reasoning has no markers.
    """
    if sampling.thinking is not None and answers.reasoning is None:
        if sampling.thinking.optional:
            return constrained(replace(sampling, thinking=None), tools, answers)
        raise UnsupportedParameter(
            "The reasoning of this model has no known markers; leave thinking_token_budget out.",
            param="thinking_token_budget",
        )
    if sampling.thinking is not None and tools is not None and answers.answers is not None:
        around = tuple(call.around for call in answers.answers.syntax.calls if call.begins)
        sampling = replace(sampling, thinking=replace(sampling.thinking, calls=around))
    if tools is not None:
        sampling = _with_tools(sampling, tools, answers.call_syntax)
    if sampling.thinking is not None and sampling.grammar is None:
        return replace(sampling, grammar=Grammar(kind="any", source="", param="thinking_token_budget"))
    return sampling


def _with_tools(sampling: SamplingParams, tools: ToolSet, syntax: CallSyntax | None) -> SamplingParams:
    """Parameters of an answer with calls in the model's own format; in JSON if that format was not proved."""
    other = sampling.grammar
    if other is not None and (tools.forced or syntax is None or other.kind == "lark"):
        raise UnsupportedParameter(
            "A text that follows response_format cannot hold tool calls; leave out one of them, or set tool_choice "
            "to none.",
            param="response_format",
        )
    return replace(sampling, grammar=tools.grammar() if syntax is None else call_grammar(syntax, tools, other))


async def _message_format(
    exchange: Exchange, card: ModelCard, tools: ToolSet | None, template: str | None
) -> MessageFormat:
    """How the model writes its answers, from its options and, if they leave it open, from its tokenizer.

    Args:
        template: the request's own chat template, or the name of one of the model's.
    """
    options = card.options
    info = await until_disconnect(exchange.request.receive, exchange.api.tokenizer_facts(exchange.client, card))
    own = info["response_template"]
    described = response_template.NAME in (options.tool_parser, options.reasoning_parser)
    if described or (own and options.tool_parser is None and options.reasoning_parser is None):
        if not own:
            raise ModelError(f"Model {card.id!r} is to be read by a response_template, but its tokenizer has none.")
        await asyncio.to_thread(response_template.importable)
        marks = response_template.reasoning_markers(own) or MARKERS.get(options.reasoning_parser or "")
        return MessageFormat(tools=tools, template=own, reasoning=marks)
    # A template of the request is rendered in a process with limits only; the model writes as its own one shows.
    own_template = template if template in (info.get("chat_templates") or {}) else None
    source = used_template(info, own_template, tools)
    if tools is not None and options.tools_without_template and options.tool_parser is None:
        # As the tools were written: see model_loaders/prompts/written_tools.py.
        takes = await asyncio.to_thread(takes_tools, source)
        options = options if takes else replace(options, tool_parser="hermes")
    answers = await exchange.api.answer_format(info, source, options)
    return MessageFormat(tools=tools, answers=answers, reasoning=answers.syntax.reasoning)


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
