"""POST /v1/responses: the answer, whole or as events. Nothing is stored."""

from __future__ import annotations

import time
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from fastapi import Response

from deployments.core.calls import GenerateCall
from deployments.core.errors import TroupeError
from deployments.core.events import Accepted, Captured, Delta, Finished, Usage
from deployments.openai.chat.message import MessageFormat, MessageWriter
from deployments.openai.chat.unread import note_unread
from deployments.openai.fields.choices import Gathered, gather
from deployments.openai.fields.inside import CaptureHandle, capture_handle, inside_header
from deployments.openai.fields.logprobs import chat_logprobs
from deployments.openai.fields.sampling import check_stream_options, effective
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import Chunks, build, json_answer, sse_answer, to_json
from deployments.openai.responses.items import ItemStream, output_items
from deployments.openai.responses.messages import name_items
from deployments.openai.responses.plan import response_plan, wants_logprobs
from deployments.openai.responses.schema import Item, ResponseObject, ResponsesBody, ResponseUsage


async def create_response(exchange: Exchange) -> Response:
    """Answer a conversation given as items, at once or as a stream of events."""
    body, card = await exchange.read(ResponsesBody)
    exchange.rename = partial(name_items, given=body.input, instructions=body.instructions)
    check_stream_options(exchange.given)
    call, answer_format = await response_plan(exchange, body, card)
    answer = ResponseAnswer(exchange, body, call, answer_format)
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(call))
    exchange.headers.update(inside_header(call.sampling.capture, call.sampling.interventions))
    if body.stream:
        return await sse_answer(exchange, answer.chunks(), on_error=answer.error_events)
    return await json_answer(exchange, answer.response())


class ResponseAnswer:
    """One response under way."""

    def __init__(
        self, exchange: Exchange, body: ResponsesBody, call: GenerateCall, answer_format: MessageFormat
    ) -> None:
        self._exchange = exchange
        self._body = body
        self._call = call
        self._format = answer_format
        self._created = int(time.time())
        self._id = exchange.answer_id
        self._model = body.model
        self._stream = ItemStream()
        self._capture: CaptureHandle | None = None

    async def response(self) -> bytes:
        """The whole answer."""
        gathered = await gather(self._exchange.generate(self._call), 1)
        return await build(
            partial(self._whole, gathered), large=self._call.sampling.reports_vocabulary or self._exchange.large
        )

    def _whole(self, gathered: Gathered) -> bytes:
        (choice,) = gathered.choices
        self._capture = None if choice.capture is None else capture_handle(choice.capture)
        writer = self._format.writer(gathered.accepted.prompt_texts[0])
        writer.delta(choice.text, last=True)
        note_unread(self._exchange, writer.unread, self._call.model)
        status = _status(choice.finish_reason)
        items = output_items(writer.message(), status, self._logprobs(choice.logprobs))
        return to_json(self._object(status, items, usage_of(gathered.usage)))

    async def chunks(self) -> Chunks:
        """The events of the answer as it comes."""
        stream, status, begun = self._stream, _status(None), False
        writer: MessageWriter | None = None
        async with aclosing(self._exchange.generate(self._call)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        writer = self._format.writer(event.prompt_texts[0], stream=True)
                    case Captured():
                        self._capture = capture_handle(event.handle)
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
                            note_unread(self._exchange, writer.unread, self._call.model)
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
        shape: ResponseObject = {
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
            "temperature": self._call.sampling.temperature,
            "text": self._exchange.given.get("text") or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [{"parameters": {}, "strict": None, **tool} for tool in body.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self._call.sampling.top_p,
            "truncation": "disabled",
            "usage": usage,
            "metadata": self._exchange.given.get("metadata") or {},
        }
        if self._capture is not None:
            shape["capture"] = self._capture
        return shape


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
