"""POST /v1/responses: the stateless part of the Responses API, over the same machinery as chats."""

from __future__ import annotations

import time
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from fastapi import Response

from deployments.core.errors import TroupeError
from deployments.core.events import Accepted, Delta, Finished, Usage
from deployments.core.model_card import ModelCard
from deployments.openai.chat.answer import ChatPlan, chat_events
from deployments.openai.chat.message import MessageWriter
from deployments.openai.chat.plan import chat_plan, check_objects
from deployments.openai.chat.schema import ChatBody
from deployments.openai.fields.choices import Gathered, gather
from deployments.openai.fields.fields import parse_fields
from deployments.openai.fields.logprobs import chat_logprobs
from deployments.openai.fields.sampling import check_stream_options, effective
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import Chunks, build, json_answer, sse_answer, to_json
from deployments.openai.responses.items import ItemStream, output_items
from deployments.openai.responses.plan import chat_fields, name_items, wants_logprobs
from deployments.openai.responses.schema import Item, ResponseObject, ResponsesBody, ResponseUsage

# Fields of a chat, and those of a response that they come from, for error messages.
_SENT_AS = {
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


async def create_response(exchange: Exchange) -> Response:
    """Answer a conversation given as items, at once or as a stream of events."""
    body, card = await exchange.read(ResponsesBody)
    try:
        return await _answer(exchange, body, card)
    except TroupeError as error:
        name_items(error, body.input, body.instructions)
        raise


async def _answer(exchange: Exchange, body: ResponsesBody, card: ModelCard) -> Response:
    check_stream_options(exchange.given)
    await check_objects(exchange, card)
    chat = await exchange.aside(lambda: _chat(exchange, body, card))
    answer = ResponseAnswer(exchange, body, chat, card, await chat_plan(exchange, chat, card))
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(answer.call))
    if body.stream:
        return await sse_answer(exchange, answer.chunks(), on_error=answer.error_events)
    return await json_answer(exchange, answer.response())


def _chat(exchange: Exchange, body: ResponsesBody, card: ModelCard) -> ChatBody:
    """The chat request that asks the same."""
    fields = chat_fields(body, body.settled.fields)
    for ours, sent in _SENT_AS.items():
        if ours in fields and ours not in body.settled.fields:
            exchange.settled.sent.setdefault(ours, exchange.settled.sent.get(sent, sent))
    chat, _ = parse_fields(ChatBody, fields, exchange.defaults(card))
    return chat


class ResponseAnswer:
    """One response under way.

    Attributes:
        call: what the model is asked.
    """

    def __init__(
        self, exchange: Exchange, body: ResponsesBody, chat: ChatBody, card: ModelCard, plan: ChatPlan
    ) -> None:
        self._exchange = exchange
        self._body = body
        self._chat = chat
        self._plan = plan
        self._created = int(time.time())
        self._id = exchange.name_answer("resp_", body.request_id)
        self._model = body.model or card.id
        self._stream = ItemStream()
        self.call = plan.call(self._id, card, chat, stream=body.stream)

    async def response(self) -> bytes:
        """The whole answer."""
        gathered = await gather(chat_events(self._exchange, self.call, self._plan), 1)
        return await build(partial(self._whole, gathered), large=self.call.sampling.reports_vocabulary)

    def _whole(self, gathered: Gathered) -> bytes:
        (choice,) = gathered.choices
        writer = self._plan.writer(gathered.accepted)
        writer.delta(choice.text, last=True)
        status = _status(choice.finish_reason)
        items = output_items(writer.message(), status, self._logprobs(choice.logprobs))
        return to_json(self._object(status, items, usage_of(gathered.usage)))

    async def chunks(self) -> Chunks:
        """The events of the answer as it comes."""
        stream, status, begun = self._stream, _status(None), False
        writer: MessageWriter | None = None
        async with aclosing(chat_events(self._exchange, self.call, self._plan)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        writer = self._plan.writer(event)
                    case Delta():
                        if not begun:
                            begun = True
                            yield self._opening()
                        assert writer is not None
                        last = event.finish_reason is not None
                        status = _status(event.finish_reason)
                        delta = writer.delta(event.text, last=last)
                        pieces = [*stream.add(delta, self._logprobs(event.logprobs or ()))]
                        if last:
                            pieces += stream.finish(status)
                        if pieces:
                            yield b"".join(pieces)
                    case Finished():
                        whole = self._object(status, stream.items, usage_of(event.usage))
                        yield stream.event(f"response.{status}", response=whole)

    def error_events(self, error: TroupeError) -> bytes:
        """The last events of a stream that fails."""
        failed = self._object("failed", self._stream.items, None)
        failed["error"] = {"code": "server_error", "message": error.message}
        fields = {"code": error.code, "message": error.message, "param": error.param}
        return self._stream.event("error", **fields) + self._stream.event("response.failed", response=failed)

    def _opening(self) -> bytes:
        begun = self._object("in_progress", [], None)
        stream = self._stream
        return stream.event("response.created", response=begun) + stream.event("response.in_progress", response=begun)

    def _logprobs(self, tokens: Any) -> list[Any]:
        if not wants_logprobs(self._body):
            return []
        return [*chat_logprobs(tokens, as_ids=self._body.return_tokens_as_token_ids)["content"]]

    def _object(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        items: list[Item],
        usage: ResponseUsage | None,
    ) -> ResponseObject:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "model": self._model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": self.call.sampling.temperature,
            "text": self._exchange.given.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"parameters": {}, "strict": None, **tool} for tool in body.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.call.sampling.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": self._exchange.given.get("metadata") or {},
        }


def _status(finish_reason: str | None) -> Literal["completed", "incomplete"]:
    return "incomplete" if finish_reason == "length" else "completed"


def usage_of(usage: Usage) -> ResponseUsage:
    """Token counts as the Responses API has them."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }
