"""One chat completion under way: from the call's events to OpenAI's objects."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import Response

from deployments.core.calls import ChatPrompt, GenerateCall, Prompt
from deployments.core.events import Accepted, Captured, Delta, Finished, PromptScores
from deployments.core.logprobs import TokenLogprob
from deployments.openai.chat.message import MessageFormat, MessageWriter
from deployments.openai.chat.plan import chat_plan
from deployments.openai.chat.schema import ChatBody, ChatChoice, ChatCompletion, ChunkChoice, MessageDelta
from deployments.openai.chat.unread import note_unread
from deployments.openai.fields.choices import Choice, Gathered, gather
from deployments.openai.fields.inside import CaptureHandle, capture_handle, inside_header
from deployments.openai.fields.logprobs import ChatLogprobs, chat_logprobs, prompt_logprobs
from deployments.openai.fields.sampling import check_stream_options, effective
from deployments.openai.fields.usage import RunningUsage, usage_object
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import DONE, Chunks, build, json_answer, sse, sse_answer, to_json

_NOTHING = Accepted(prompt_token_ids=((),), prompt_texts=(None,))


async def create_chat_completion(exchange: Exchange) -> Response:
    """Answer a conversation, at once or as a stream."""
    body, card = await exchange.read(ChatBody)
    check_stream_options(exchange.given)
    call, answer_format = await chat_plan(exchange, body, card)
    answer = ChatAnswer(exchange, body, call, answer_format)
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(call))
    exchange.headers.update(inside_header(call.sampling.capture, call.sampling.interventions))
    if body.stream:
        return await sse_answer(exchange, answer.chunks())
    return await json_answer(exchange, answer.completion())


class ChatAnswer:
    """The answer to one request."""

    def __init__(self, exchange: Exchange, body: ChatBody, call: GenerateCall, answer_format: MessageFormat) -> None:
        self._exchange = exchange
        self._body = body
        self._call = call
        self._format = answer_format
        self._created = int(time.time())
        self._id = exchange.answer_id
        self._model = body.model
        self._opening = _final_text(call.prompts[0]) if body.echo and body.continue_final_message else ""

    @property
    def _large(self) -> bool:
        return self._call.sampling.reports_vocabulary or self._exchange.large

    async def completion(self) -> bytes:
        """The whole answer."""
        gathered = await gather(self._exchange.generate(self._call), self._call.n)
        return await build(partial(self._whole, gathered), large=self._large)

    def _whole(self, gathered: Gathered) -> bytes:
        accepted = gathered.accepted
        answer: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice, accepted) for index, choice in enumerate(gathered.choices)],
            "usage": usage_object(gathered.usage),
            "system_fingerprint": accepted.fingerprint,
        }
        answer.update(self._prompt(accepted))
        scores = gathered.choices[0].prompt_scores
        if scores is not None:
            answer["prompt_logprobs"] = prompt_logprobs(scores)
        return to_json(answer)

    async def chunks(self) -> Chunks:
        """The answer as it comes."""
        usage = self._body.stream_options.usage(self._exchange.options)
        accepted = _NOTHING
        writers: dict[int, MessageWriter] = {}
        captures: dict[int, CaptureHandle] = {}
        async with aclosing(self._exchange.generate(self._call)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                        usage.accept(event)
                    case PromptScores():
                        if event.choice == 0:
                            yield await build(partial(self._prompt_chunk, event, usage), large=self._large)
                    case Captured():
                        captures[event.choice] = capture_handle(event.handle)
                    case Delta():
                        if event.choice not in writers:
                            writers[event.choice] = self._format.writer(accepted.prompt_texts[0], stream=True)
                            opening = partial(self._opening_chunk, event.choice, accepted, usage)
                            yield await build(opening, large=self._large)
                        usage.add(event)
                        capture = captures.get(event.choice)
                        chunks = partial(self._delta_chunks, event, writers[event.choice], usage, capture)
                        if data := await build(chunks, large=self._large):
                            yield data
                    case Finished():
                        if usage.last:
                            yield self._chunk([], usage, usage=usage_object(event.usage))
        yield DONE

    def _prompt_chunk(self, event: PromptScores, usage: RunningUsage) -> bytes:
        return self._chunk([], usage, prompt_logprobs=prompt_logprobs(event.scores))

    def _delta_chunks(
        self, event: Delta, writer: MessageWriter, usage: RunningUsage, capture: CaptureHandle | None
    ) -> bytes:
        choices = list(self._chunk_choices(event, writer, usage.every))
        if capture is not None and event.finish_reason is not None:
            choices[-1]["capture"] = capture
        return b"".join(self._chunk([choice], usage) for choice in choices)

    def _choice(self, index: int, choice: Choice, accepted: Accepted) -> ChatChoice:
        writer = self._format.writer(accepted.prompt_texts[0])
        writer.delta(choice.text, last=True)
        note_unread(self._exchange, writer.unread, self._call.model)
        shape: ChatChoice = {
            "index": index,
            "message": writer.message(self._opening),
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": writer.finish_reason(choice.finish_reason),
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            shape["token_ids"] = choice.token_ids
        if choice.capture is not None:
            shape["capture"] = capture_handle(choice.capture)
        return shape

    def _opening_chunk(self, index: int, accepted: Accepted, usage: RunningUsage) -> bytes:
        delta: MessageDelta = {"role": "assistant", "content": self._opening}
        choice: ChunkChoice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice], usage, **self._prompt(accepted))

    def _prompt(self, accepted: Accepted) -> Any:
        """What the client wants to know of its prompt."""
        shape: dict[str, Any] = {}
        if self._body.return_prompt_text:
            shape["prompt_text"] = accepted.prompt_texts[0]
        if self._body.return_token_ids:
            shape["prompt_token_ids"] = accepted.prompt_token_ids[0]
        return shape

    def _chunk_choices(self, event: Delta, writer: MessageWriter, every: bool) -> Iterator[ChunkChoice]:
        """What a delta adds, then its reason to end alone: many clients read no text from a chunk that has one.

        Args:
            every: a delta that adds nothing has a chunk as well.
        """
        ends = event.finish_reason is not None
        delta = writer.delta(event.text, last=ends)
        ids = event.token_ids if self._body.return_token_ids else ()
        if delta or event.logprobs or ids or (every and not ends):
            yield self._with_ids(
                {
                    "index": event.choice,
                    "delta": delta,
                    "logprobs": self._logprobs(event.logprobs or ()),
                    "finish_reason": None,
                },
                ids,
            )
        if event.finish_reason is not None:
            reason = writer.finish_reason(event.finish_reason)
            note_unread(self._exchange, writer.unread, self._call.model)
            last: ChunkChoice = {
                "index": event.choice,
                "delta": {},
                "logprobs": self._logprobs(()),
                "finish_reason": reason,
                "stop_reason": event.stop_reason,
            }
            yield self._with_ids(last, ())

    def _with_ids(self, choice: ChunkChoice, token_ids: Sequence[int]) -> ChunkChoice:
        if self._body.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(tokens, as_ids=self._body.return_tokens_as_token_ids)

    def _chunk(self, choices: list[ChunkChoice], counted: RunningUsage, **more: Any) -> bytes:
        return sse(
            {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._model,
                "system_fingerprint": self._exchange.fingerprint,
                "choices": choices,
                **counted.field(),
                **more,
            }
        )


def _final_text(prompt: Prompt) -> str:
    assert isinstance(prompt, ChatPrompt)
    content = prompt.messages[-1]["content"]
    return content if isinstance(content, str) else ""
