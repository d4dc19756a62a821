"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import Response

from deployments.core.calls import GenerateCall
from deployments.core.events import Accepted, Captured, Delta, Finished, PromptScores
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.openai.completions.plan import completion_plan
from deployments.openai.completions.schema import CompletionBody, CompletionChoice, TextCompletion
from deployments.openai.fields.choices import Choice, gather
from deployments.openai.fields.inside import CaptureHandle, capture_handle, inside_header
from deployments.openai.fields.logprobs import CompletionLogprobs, TextOffsets, completion_logprobs, prompt_logprobs
from deployments.openai.fields.sampling import check_stream_options, effective
from deployments.openai.fields.usage import RunningUsage, usage_object
from deployments.openai.http.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.http.streaming import DONE, Chunks, build, json_answer, sse, sse_answer, to_json


async def create_completion(exchange: Exchange) -> Response:
    """Continue prompts, at once or as a stream."""
    body, card = await exchange.read(CompletionBody)
    check_stream_options(exchange.given)
    call = await exchange.aside(lambda: completion_plan(exchange, body, card))
    completion = CompletionAnswer(exchange, body, call)
    exchange.headers[SAMPLING_HEADER] = await exchange.aside(lambda: effective(call))
    exchange.headers.update(inside_header(call.sampling.capture, call.sampling.interventions))
    if body.stream:
        return await sse_answer(exchange, completion.chunks())
    return await json_answer(exchange, completion.completion())


@dataclass(slots=True)
class Streamed:
    """What a streamed choice remembers: prompt scores not yet sent, where its next token begins, and its capture."""

    scores: tuple[TokenLogprob | None, ...] = ()
    offsets: TextOffsets = field(default_factory=TextOffsets)
    capture: CaptureHandle | None = None


class CompletionAnswer:
    """One text completion under way."""

    def __init__(self, exchange: Exchange, body: CompletionBody, call: GenerateCall) -> None:
        self._body = body
        self._exchange = exchange
        self._call = call
        self._created = int(time.time())
        self._id = exchange.answer_id
        self._model = body.model
        self._count = len(body.prompt) * body.n

    @property
    def _large(self) -> bool:
        return self._call.sampling.reports_vocabulary or self._exchange.large

    async def completion(self) -> bytes:
        """The whole answer."""
        gathered = await gather(self._exchange.generate(self._call), self._count)
        answer: TextCompletion = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": [
                await self._choice(index, choice, gathered.accepted) for index, choice in enumerate(gathered.choices)
            ],
            "usage": usage_object(gathered.usage),
            "system_fingerprint": gathered.accepted.fingerprint,
        }
        return await build(lambda: to_json(answer), large=self._large)

    async def _choice(self, index: int, choice: Choice, accepted: Accepted) -> CompletionChoice:
        assert choice.finish_reason != "tool_calls"
        shape: CompletionChoice = {
            "index": index,
            "text": choice.text,
            "logprobs": None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.logprobs is not None:
            echoed = choice.prompt_scores if self._body.echo else None
            tokens = [*(echoed or ()), *choice.logprobs]
            shape["logprobs"] = await self._logprobs(tokens, index, accepted)
        shape.update(self._extras(index, choice.token_ids, accepted))
        if self._body.prompt_logprobs is not None and choice.prompt_scores is not None:
            scores = choice.prompt_scores
            shape["prompt_logprobs"] = await build(lambda: prompt_logprobs(scores), large=self._large)
        if choice.capture is not None:
            shape["capture"] = capture_handle(choice.capture)
        return shape

    def _extras(self, index: int, token_ids: Sequence[int], accepted: Accepted) -> Any:
        if not self._body.return_token_ids:
            return {}
        return {"token_ids": token_ids, "prompt_token_ids": self._prompt_ids(index, accepted)}

    def _prompt_ids(self, index: int, accepted: Accepted) -> Sequence[int]:
        return accepted.prompt_token_ids[index // self._body.n]

    async def _logprobs(
        self, tokens: Sequence[TokenLogprob | None], index: int, accepted: Accepted, offsets: TextOffsets | None = None
    ) -> CompletionLogprobs:
        first = None
        if tokens and tokens[0] is None:
            prompt_ids = self._prompt_ids(index, accepted)
            exchange = self._exchange
            text = await exchange.api.first_text(exchange.client, self._call.model, prompt_ids[0])
            first = Candidate(token_id=prompt_ids[0], token=text, bytes=text.encode(), logprob=0.0)
        as_ids = self._body.return_tokens_as_token_ids
        return await build(
            lambda: completion_logprobs(tokens, offsets=offsets, as_ids=as_ids, first=first), large=self._large
        )

    async def chunks(self) -> Chunks:
        """The answer as it comes."""
        usage = self._body.stream_options.usage(self._exchange.options)
        accepted = Accepted(prompt_token_ids=(), prompt_texts=())
        streamed = [Streamed() for _ in range(self._count)]
        async with aclosing(self._exchange.generate(self._call)) as events:
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                        usage.accept(event)
                    case PromptScores():
                        streamed[event.choice].scores = event.scores
                    case Captured():
                        streamed[event.choice].capture = capture_handle(event.handle)
                    case Delta():
                        usage.add(event)
                        yield await self._chunks_of(event, streamed[event.choice], accepted, usage)
                    case Finished():
                        if usage.last:
                            yield self._chunk([], usage, usage=usage_object(event.usage))
        yield DONE

    async def _chunks_of(self, delta: Delta, streamed: Streamed, accepted: Accepted, usage: RunningUsage) -> bytes:
        """The chunk of a delta's text, and the chunk of its reason to end: many clients read no text from the last."""
        scores = streamed.scores and (self._body.prompt_logprobs is not None or self._body.echo)
        ends = delta.finish_reason is not None
        chunks = b""
        if not ends or delta.text or delta.logprobs or scores or (delta.token_ids and self._body.return_token_ids):
            choice = await self._chunk_choice(delta, streamed, accepted)
            chunks = await build(lambda: self._chunk([choice], usage), large=self._large)
        if ends:
            last = self._last_choice(delta, accepted)
            if streamed.capture is not None:
                last["capture"] = streamed.capture
            chunks += await build(lambda: self._chunk([last], usage), large=self._large)
        return chunks

    def _last_choice(self, delta: Delta, accepted: Accepted) -> CompletionChoice:
        assert delta.finish_reason != "tool_calls"
        shape: CompletionChoice = {
            "index": delta.choice,
            "text": "",
            "logprobs": None if self._body.logprobs is None else completion_logprobs(()),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        shape.update(self._extras(delta.choice, (), accepted))
        return shape

    async def _chunk_choice(self, delta: Delta, streamed: Streamed, accepted: Accepted) -> CompletionChoice:
        shape: CompletionChoice = {"index": delta.choice, "text": delta.text, "logprobs": None, "finish_reason": None}
        scores, streamed.scores = streamed.scores, ()
        if self._body.prompt_logprobs is not None and scores:
            shape["prompt_logprobs"] = await build(lambda: prompt_logprobs(scores), large=self._large)
        if self._body.logprobs is not None:
            tokens = [*(scores if self._body.echo else ()), *(delta.logprobs or ())]
            shape["logprobs"] = await self._logprobs(tokens, delta.choice, accepted, streamed.offsets)
        shape.update(self._extras(delta.choice, delta.token_ids, accepted))
        return shape

    def _chunk(self, choices: list[CompletionChoice], counted: RunningUsage, **more: Any) -> bytes:
        chunk = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        named = {"system_fingerprint": self._exchange.fingerprint}
        return sse({**chunk, **named, "choices": choices, **counted.field(), **more})
