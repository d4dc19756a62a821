"""POST /v1/messages: the answer, whole or as events; and the tokens of its prompt."""

from __future__ import annotations

from contextlib import aclosing
from functools import partial

from fastapi import Response

from deployments.core.calls import GenerateCall
from deployments.core.errors import TroupeError
from deployments.core.events import Accepted, Delta, Finished, FinishReason, Usage
from deployments.openai.chat.message import MessageFormat, MessageWriter
from deployments.openai.chat.unread import note_unread
from deployments.openai.fields.choices import Gathered, gather
from deployments.openai.fields.sampling import effective
from deployments.openai.fields.usage import RunningUsage
from deployments.openai.http.errors import messages_error_body
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import Chunks, build, json_answer, sse_answer, to_json, written
from deployments.openai.messages.blocks import BlockStream, content_blocks, event
from deployments.openai.messages.plan import asks_for_cache, message_plan, message_prompt
from deployments.openai.messages.schema import (
    Block,
    CountTokensBody,
    Message,
    MessagesBody,
    MessageUsage,
    StopReason,
    TokenCount,
)

_REASONS: dict[FinishReason, StopReason] = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def create_message(exchange: Exchange) -> Response:
    """Answer a conversation given as Anthropic's blocks, at once or as a stream of events."""
    exchange.headers["request-id"] = exchange.request_id
    body, card = await exchange.read(MessagesBody)
    call, answer_format = await message_plan(exchange, body, card)
    cached = await exchange.aside(lambda: asks_for_cache(exchange))
    answer = MessageAnswer(exchange, body.model, call, answer_format, cached=cached)
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(call))
    if body.stream:
        return await sse_answer(exchange, answer.chunks(), on_error=answer.error_event)
    return await json_answer(exchange, answer.message())


async def count_message_tokens(exchange: Exchange) -> Response:
    """Count the tokens of a message's prompt, tools and images included."""
    exchange.headers["request-id"] = exchange.request_id
    body, card = await exchange.read(CountTokensBody)
    prompt = await message_prompt(exchange, body, card)

    async def answer() -> bytes:
        rendered = await exchange.client.render(card.id, prompt)
        shape: TokenCount = {"input_tokens": len(rendered.token_ids)}
        return await written(shape)

    return await json_answer(exchange, answer())


class MessageAnswer:
    """One message under way.

    Args:
        model: as the request names it.
        cached: report which tokens of the prompt are cached. In this API a request asks for that; those of others all
            count as input.
    """

    def __init__(
        self, exchange: Exchange, model: str, call: GenerateCall, answer_format: MessageFormat, *, cached: bool
    ) -> None:
        self._exchange = exchange
        self._call = call
        self._format = answer_format
        self._id = exchange.answer_id
        self._model = model or call.model
        self._cached = cached

    async def message(self) -> bytes:
        """The whole answer."""
        gathered = await gather(self._exchange.generate(self._call), 1)
        return await build(partial(self._whole, gathered), large=self._exchange.large)

    def _whole(self, gathered: Gathered) -> bytes:
        (choice,) = gathered.choices
        writer = self._format.writer(gathered.accepted.prompt_texts[0])
        writer.delta(choice.text, last=True)
        note_unread(self._exchange, writer.unread, self._call.model)
        reason, sequence = _stop(writer, choice.finish_reason, choice.stop_reason)
        return to_json(self._object(content_blocks(writer.message()), reason, sequence, self._usage(gathered.usage)))

    async def chunks(self) -> Chunks:
        """The events of the answer as it comes."""
        stream, usage = BlockStream(), RunningUsage(last=False, every=False)
        reason: StopReason | None = None
        sequence: str | None = None
        writer: MessageWriter | None = None
        begun = False
        async with aclosing(self._exchange.generate(self._call)) as events:
            async for each in events:
                match each:
                    case Accepted():
                        usage.accept(each)
                        writer = self._format.writer(each.prompt_texts[0])
                    case Delta():
                        assert writer is not None
                        usage.add(each)
                        last = each.finish_reason is not None
                        pieces = [] if begun else [self._opening(usage.so_far)]
                        begun = True
                        pieces += stream.add(writer.delta(each.text, last=last))
                        if each.finish_reason is not None:
                            note_unread(self._exchange, writer.unread, self._call.model)
                            reason, sequence = _stop(writer, each.finish_reason, each.stop_reason)
                            pieces += stream.close()
                        if pieces:
                            yield b"".join(pieces)
                    case Finished():
                        stopped = {"stop_reason": reason, "stop_sequence": sequence}
                        yield event("message_delta", delta=stopped, usage=self._usage(each.usage))
        yield event("message_stop")

    def error_event(self, error: TroupeError) -> bytes:
        """The last event of a stream that fails."""
        return b"event: error\ndata: " + messages_error_body(error, self._exchange.request_id) + b"\n\n"

    def _opening(self, usage: Usage) -> bytes:
        begun = self._object([], None, None, {**self._usage(usage), "output_tokens": 0})
        return event("message_start", message=begun) + event("ping")

    def _object(
        self, content: list[Block], reason: StopReason | None, sequence: str | None, usage: MessageUsage
    ) -> Message:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": usage,
        }

    def _usage(self, usage: Usage) -> MessageUsage:
        cached = usage.cached_tokens if self._cached else 0
        return {
            "input_tokens": usage.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage.completion_tokens,
        }


def _stop(writer: MessageWriter, reason: FinishReason, stopped_by: str | int | None) -> tuple[StopReason, str | None]:
    """Why the answer ends, and the stop sequence that has ended it."""
    finished = writer.finish_reason(reason)
    if finished == "stop" and isinstance(stopped_by, str):
        return "stop_sequence", stopped_by
    return _REASONS[finished], None
