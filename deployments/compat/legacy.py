"""Routes of older servers, answered by the current ones: engines, /generate, token_check.

Every answer has a `Deprecation` header (RFC 9745) and a `Link` to the route that replaces it.

    GET  /v1/engines, /v1/engines/{model}                    OpenAI before 2022, transformers-openai-api (jquesnelle)
    POST /v1/engines/{model}/completions, …                  the same
    POST /api/v1/chat/completions, /api/v1/token_check       FastChat
    POST /generate, /batch_generate                          fastapi_tritonserver
    GET  /                                                   transformers-openai-api
    POST /v1/edits                                           OpenAI before 2024, simpleAI: 410
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

from fastapi import FastAPI, Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.compat.vllm_lora import load_adapter, unload_adapter
from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, TextPrompt
from deployments.core.errors import BadRequest, RouteGone, Unavailable, UnsupportedParameter
from deployments.core.events import Delta, Event
from deployments.core.model_card import ModelCard
from deployments.openai.fields.choices import gather
from deployments.openai.fields.fields import Count, Real, RequestBody, Strings, TokenId, Whole, parse_fields
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import GENERATE
from deployments.openai.fields.sampling import GenerationBody, check_choices, check_no_budget
from deployments.openai.http.api import Api
from deployments.openai.http.endpoint import endpoint
from deployments.openai.http.exchange import Exchange, Handler
from deployments.openai.http.route import Route, methods
from deployments.openai.http.streaming import DONE, Chunks, json_answer, json_response, sse, sse_answer, written

# The day they came, as RFC 9745 writes it: they have never been anything but compatible.
_SINCE = "@1795132800"
_OF_ENGINES = ("/completions", "/chat/completions", "/embeddings")


def add_legacy_routes(app: FastAPI, api: Api, routes: Sequence[Route]) -> None:
    """Add the older routes to an application that has the current ones."""
    for prefix in ("/v1/engines", "/engines"):
        for route in routes:
            if route.path in _OF_ENGINES:
                _add(app, api, route.method, f"{prefix}/{{model_id:path}}{route.path}", route.handler, route.path)
        _add(app, api, "GET", prefix, list_engines, "/models")
        _add(app, api, "GET", f"{prefix}/{{name:path}}", retrieve_engine, "/models")
    for route in routes:
        if route.path == "/chat/completions":
            _add(app, api, "POST", "/api/v1/chat/completions", route.handler, route.path)
    _add(app, api, "POST", "/api/v1/token_check", token_check, "/tokenize")
    _add(app, api, "POST", "/generate", generate, "/chat/completions")
    _add(app, api, "POST", "/batch_generate", generate, "/chat/completions")
    _add(app, api, "GET", "/", root, "/models")
    for path in ("/v1/edits", "/edits"):
        _add(app, api, "POST", path, edits, "/chat/completions")
    for path, handler in (("/v1/load_lora_adapter", load_adapter), ("/v1/unload_lora_adapter", unload_adapter)):
        _add(app, api, "POST", path, handler, "/admin/models")


def _add(app: FastAPI, api: Api, method: str, path: str, handler: Handler, successor: str) -> None:
    async def answer(exchange: Exchange) -> Response:
        exchange.headers["deprecation"] = _SINCE
        exchange.headers["link"] = f'</v1{successor}>; rel="successor-version"'
        return await handler(exchange)

    app.add_api_route(path, endpoint(answer, api), methods=methods(method), response_model=None)


class Engine(TypedDict):
    id: str
    object: Literal["engine"]
    owner: str
    ready: bool


async def list_engines(exchange: Exchange) -> Response:
    """Every model and alias, as OpenAI listed engines."""
    cards = exchange.models.models()
    names = [*(card.id for card in cards), *(alias for card in cards for alias in card.aliases)]
    return json_response({"object": "list", "data": [_engine(name) for name in names]})


async def retrieve_engine(exchange: Exchange) -> Response:
    """One model by its id or an alias."""
    name = exchange.request.path_params["name"]
    exchange.models.resolve(name)
    return json_response(_engine(name))


def _engine(name: str) -> Engine:
    return {"id": name, "object": "engine", "owner": "troupe", "ready": True}


async def root(exchange: Exchange) -> Response:
    """The name of this server and its models."""
    models = [card.id for card in exchange.models.models()]
    return json_response({"message": f"Troupe serves {', '.join(models)}; see /docs.", "models": models})


async def edits(exchange: Exchange) -> Response:
    """Not supported: the client has to say how the model is asked to edit a text."""
    raise RouteGone(
        "/v1/edits is gone, as at OpenAI. Send instruction and input in a message to /v1/chat/completions: "
        '{"role": "user", "content": "<instruction>\\n\\n<input>"}; or have them in the model\'s chat template.'
    )


class TokenCheck(RequestBody):
    """One prompt of /api/v1/token_check."""

    prompt: str
    max_tokens: Count = 0


class Fit(TypedDict):
    fits: bool
    tokenCount: int
    contextLength: int


async def token_check(exchange: Exchange) -> Response:
    """Whether prompts and `max_tokens` tokens after them fit the context of their models."""
    given = await exchange.read_object()
    prompts = given.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, dict) for prompt in prompts):
        raise BadRequest(
            "Invalid 'prompts': input should be a list of objects with model, prompt and max_tokens.", param="prompts"
        )
    checks = await exchange.aside(lambda: [_read_check(exchange, *each) for each in enumerate(prompts)])

    async def answer() -> bytes:
        return await written({"prompts": [await _fit(exchange, check, card) for check, card in checks]})

    return await json_answer(exchange, answer())


def _read_check(exchange: Exchange, index: int, prompt: dict[str, Any]) -> tuple[TokenCheck, ModelCard]:
    check, unknown = parse_fields(TokenCheck, prompt)
    exchange.ignore([f"prompts[{index}].{key}" for key in unknown])
    return check, exchange.find_model(prompt.get("model"))


async def _fit(exchange: Exchange, check: TokenCheck, card: ModelCard) -> Fit:
    rendered = await exchange.client.render(card.id, TextPrompt(text=check.prompt))
    count = len(rendered.token_ids)
    return {
        "fits": count + check.max_tokens <= rendered.max_model_len,
        "tokenCount": count,
        "contextLength": rendered.max_model_len,
    }


class GenerateBody(GenerationBody):
    """What /generate and /batch_generate of fastapi_tritonserver take: each prompt is a user's message."""

    foreign: ClassVar[Rows] = GENERATE

    prompt: str | None = None
    prompts: Annotated[list[str], Field(min_length=1)] | None = Field(default=None, description="Of /batch_generate.")
    image: str | None = Field(default=None, description="A data: URI; images come before the prompt.")
    images: list[str] = Field(default_factory=list)
    uuid: str | None = Field(default=None, max_length=128, description="Returned as id.")
    timeout: Annotated[Real, Field(gt=0)] = Field(default=6000, description="Seconds.")
    max_output_len: Count = 16
    len_penalty: Real = Field(
        default=1.0, description="For beam search, if the model's backend supports it; 0 and 1 are off."
    )
    beam_width: Annotated[Whole, Field(ge=1, le=64)] = 1
    random_seed: Whole | None = None
    end_id: TokenId | None = None
    stop_words: Strings = Field(default_factory=list)

    def messages(self) -> list[list[dict[str, Any]]]:
        """A conversation for every prompt."""
        pictures = [self.image, *self.images] if self.image is not None else self.images
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        texts = self.prompts or [self.prompt or ""]
        if not parts:
            return [[{"role": "user", "content": text}] for text in texts]
        return [[{"role": "user", "content": [*parts, {"type": "text", "text": text}]}] for text in texts]


async def generate(exchange: Exchange) -> Response:
    """The answers to prompts as plain texts."""
    body, card = await exchange.read(GenerateBody)
    batch = exchange.request.scope["path"].endswith("/batch_generate")
    if (body.prompts if batch else body.prompt) is None or (body.prompt if batch else body.prompts) is not None:
        name = "prompts" if batch else "prompt"
        raise BadRequest(f"Missing required field '{name}'; add it, and no other prompt.", param=name)
    if batch and body.stream:
        raise UnsupportedParameter("/batch_generate does not stream; leave 'stream' out.", param="stream")
    check_choices(len(body.prompts or [""]), exchange.options)
    request_id = body.uuid or body.request_id or str(uuid4())
    call = await exchange.aside(lambda: _call(exchange, body, card))
    events = exchange.generate(call)
    if body.stream and not batch:
        return await sse_answer(exchange, _pieces(events, request_id))

    async def answer() -> bytes:
        try:
            async with asyncio.timeout(body.timeout):
                gathered = await gather(events, len(call.prompts))
        except TimeoutError:
            raise Unavailable(f"The answer was not complete after the timeout of {body.timeout:g} s.") from None
        texts = [choice.text for choice in gathered.choices]
        return await written({"texts": texts, "id": request_id} if batch else {"text": texts[0], "id": request_id})

    return await json_answer(exchange, answer())


def _call(exchange: Exchange, body: GenerateBody, card: ModelCard) -> GenerateCall:
    return GenerateCall(
        request_id=f"gen-{uuid4().hex}",
        model=card.id,
        prompts=tuple(ChatPrompt(messages=messages) for messages in body.messages()),
        sampling=_sampling(exchange, body),
        truncate_prompt=body.truncate_prompt_tokens,
        affinity=exchange.affinity(body),
        stream=body.stream,
    )


def _sampling(exchange: Exchange, body: GenerateBody) -> SamplingParams:
    check_no_budget(body)
    sampling = body.sampling(exchange.options, max_tokens=body.max_output_len, logprobs=None)
    if not _is_off(body):
        exchange.settled.sent.setdefault("generate_kwargs", "len_penalty")
    if body.beam_width > 1:
        exchange.settled.sent.setdefault("num_beams", "beam_width")
    return replace(
        sampling,
        num_beams=max(sampling.num_beams, body.beam_width),
        seed=sampling.seed if body.random_seed is None else body.random_seed,
        extra={**sampling.extra, **({} if _is_off(body) else {"length_penalty": body.len_penalty})},
        stop=(*sampling.stop, *body.stop_words),
        stop_token_ids=sampling.stop_token_ids if body.end_id is None else (*sampling.stop_token_ids, body.end_id),
    )


def _is_off(body: GenerateBody) -> bool:
    return body.len_penalty in (0.0, 1.0)


async def _pieces(events: AsyncGenerator[Event, None], request_id: str) -> Chunks:
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Delta) and event.text:
                yield sse({"text": event.text, "id": request_id})
    yield DONE
