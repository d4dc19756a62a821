"""POST /v1/chat/completions."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from fastapi import Response

from deployments.errors import BadRequest, UnsupportedParameter
from deployments.messages import (
    Accepted,
    ChatPrompt,
    Delta,
    Finished,
    GenerateCall,
    ModelCard,
    PromptScores,
    SamplingParams,
)
from deployments.openai.answer import DONE, Chunks, checked, json_answer, sse, sse_answer, to_json
from deployments.openai.chat_schema import AssistantMessage, ChatBody, ChatChoice, ChatCompletion, ChunkChoice
from deployments.openai.choices import Choice, gather
from deployments.openai.conversation import template_messages
from deployments.openai.exchange import SAMPLING_HEADER, Exchange
from deployments.openai.logprobs import chat_logprobs, prompt_logprobs
from deployments.openai.options import ApiOptions
from deployments.openai.sampling import check_choices, check_logprobs, effective
from deployments.openai.usage import RunningUsage, usage_object


async def create_chat_completion(exchange: Exchange) -> Response:
    """Answer a conversation, at once or as a stream."""
    body, card = await exchange.read(ChatBody)
    chat = ChatAnswer(exchange, body, card)
    exchange.headers[SAMPLING_HEADER] = effective(chat.call)
    if body.stream:
        return await sse_answer(exchange, chat.chunks())
    return await json_answer(exchange, chat.completion())


def chat_prompt(body: ChatBody, card: ModelCard, options: ApiOptions) -> ChatPrompt:
    """The conversation as the model's chat template gets it.

    Raises:
        BadRequest: a message, or how to open the turn, cannot be used.
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
    extras = {"documents": body.documents, "reasoning_effort": body.reasoning_effort}
    kwargs = {key: value for key, value in extras.items() if value is not None}
    return ChatPrompt(
        messages=template_messages(body.messages, merge_roles=card.options.merge_consecutive_roles),
        template_kwargs={**kwargs, **body.chat_template_kwargs},
        add_generation_prompt=opens,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
    )


def _sampling(body: ChatBody, options: ApiOptions) -> SamplingParams:
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("Invalid 'top_logprobs': it needs logprobs to be true.", param="top_logprobs")
    check_logprobs("top_logprobs", body.top_logprobs, options)
    limits = [limit for limit in (body.max_completion_tokens, body.max_tokens) if limit is not None]
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return body.sampling(options, max_tokens=min(limits, default=None), logprobs=logprobs)


def conversation_key(model: str, messages: Sequence[Any]) -> str:
    """The same for every turn of a conversation: a digest of what stood before the assistant first spoke."""
    opening = []
    for message in messages:
        if message["role"] == "assistant":
            break
        opening.append(message)
    return hashlib.blake2b(json.dumps([model, opening]).encode(), digest_size=16).hexdigest()


class ChatAnswer:
    """One chat completion under way."""

    def __init__(self, exchange: Exchange, body: ChatBody, card: ModelCard) -> None:
        self._body = body
        self._client = exchange.client
        self._created = int(time.time())
        self._id = f"chatcmpl-{uuid4().hex}"
        self._model = body.model or card.id
        prompt = chat_prompt(body, card, exchange.options)
        check_choices(body.n, exchange.options)
        self._opening = _final_text(prompt) if body.echo and body.continue_final_message else ""
        self.call = GenerateCall(
            request_id=self._id,
            model=card.id,
            prompts=(prompt,),
            sampling=_sampling(body, exchange.options),
            n=body.n,
            affinity=exchange.affinity(body) or conversation_key(card.id, prompt.messages),
            stream=body.stream,
        )

    async def completion(self) -> bytes:
        """The whole answer."""
        gathered = await gather(checked(self._client.generate(self.call)), self.call.n)
        answer: ChatCompletion = {
            "id": self._id,
            "object": "chat.completion",
            "created": self._created,
            "model": self._model,
            "choices": [self._choice(index, choice) for index, choice in enumerate(gathered.choices)],
            "usage": usage_object(gathered.usage),
        }
        answer.update(self._prompt(gathered.accepted))
        scores = gathered.choices[0].prompt_scores
        if scores is not None:
            answer["prompt_logprobs"] = prompt_logprobs(scores)
        return to_json(answer)

    def _choice(self, index: int, choice: Choice) -> ChatChoice:
        message: AssistantMessage = {"role": "assistant", "content": self._opening + choice.text, "refusal": None}
        shape: ChatChoice = {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._body.return_token_ids:
            shape["token_ids"] = choice.token_ids
        return shape

    async def chunks(self) -> Chunks:
        """The answer as it comes."""
        usage = RunningUsage()
        opened: set[int] = set()
        accepted = Accepted(prompt_token_ids=(), prompt_texts=())
        async with aclosing(checked(self._client.generate(self.call))) as events:
            async for event in events:
                match event:
                    case Accepted():
                        accepted = event
                        usage.accept(event)
                    case PromptScores():
                        if event.choice == 0:
                            yield self._chunk([], usage, prompt_logprobs=prompt_logprobs(event.scores))
                    case Delta():
                        usage.add(event)
                        if event.choice not in opened:
                            opened.add(event.choice)
                            yield self._opening_chunk(event.choice, accepted, usage)
                        if (choice := self._chunk_choice(event)) is not None:
                            yield self._chunk([choice], usage)
                    case Finished():
                        if self._body.stream_options.include_usage:
                            yield self._chunk([], usage, usage=usage_object(event.usage))
        yield DONE

    def _opening_chunk(self, index: int, accepted: Accepted, usage: RunningUsage) -> bytes:
        choice: ChunkChoice = {
            "index": index,
            "delta": {"role": "assistant", "content": self._opening},
            "logprobs": None,
            "finish_reason": None,
        }
        return self._chunk([choice], usage, **self._prompt(accepted))

    def _prompt(self, accepted: Accepted) -> Any:
        """What the client wants to know of its prompt."""
        shape: dict[str, Any] = {}
        if self._body.return_prompt_text:
            shape["prompt_text"] = accepted.prompt_texts[0]
        if self._body.return_token_ids:
            shape["prompt_token_ids"] = list(accepted.prompt_token_ids[0])
        return shape

    def _chunk_choice(self, delta: Delta) -> ChunkChoice | None:
        wanted = delta.text or delta.finish_reason or delta.logprobs or self._body.return_token_ids
        if not wanted and not self._body.stream_options.continuous_usage_stats:
            return None
        choice: ChunkChoice = {
            "index": delta.choice,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta.logprobs or ()),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(delta.token_ids)
        return choice

    def _logprobs(self, tokens: Sequence[Any]) -> Any:
        if not self._body.logprobs:
            return None
        return chat_logprobs(tokens, as_ids=self._body.return_tokens_as_token_ids)

    def _chunk(self, choices: list[ChunkChoice], counted: RunningUsage, **more: Any) -> bytes:
        options = self._body.stream_options
        if options.continuous_usage_stats:
            more.setdefault("usage", usage_object(counted.so_far))
        elif options.include_usage:
            more.setdefault("usage", None)
        return sse(
            {
                "id": self._id,
                "object": "chat.completion.chunk",
                "created": self._created,
                "model": self._model,
                "choices": choices,
                **more,
            }
        )


def _final_text(prompt: ChatPrompt) -> str:
    content = prompt.messages[-1]["content"]
    return content if isinstance(content, str) else ""
