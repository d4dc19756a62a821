"""GET /v1/modules: what can be captured and changed inside a model; POST /v1/vectors: vectors for interventions."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Response
from typing_extensions import TypedDict

from deployments.core.errors import BadRequest
from deployments.openai.fields.inside import MOST_LETTERS
from deployments.openai.http.body import read_bytes
from deployments.openai.http.cancel import until_disconnect
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_response


class ModuleTap(TypedDict):
    """A tensor of a module. `rows` says how it is sliced by sequence: tokens, flat, last or once."""

    tap: str
    rows: Literal["tokens", "flat", "last", "once"] | None
    shape: list[int]
    dtype: str
    calls: int
    capturable: bool
    steerable: bool
    reason: str | None


ModuleObject = TypedDict(
    "ModuleObject",
    {"name": str, "class": str, "capturable": bool, "steerable": bool, "reason": str | None, "taps": list[ModuleTap]},
)


class ModuleList(TypedDict):
    """The modules in their order; `aliases` are further names of taps."""

    object: Literal["list"]
    data: list[ModuleObject]
    aliases: dict[str, str]


class UploadedVector(TypedDict):
    id: str


async def list_modules(exchange: Exchange) -> Response:
    """What can be captured and changed inside a model, and why not."""
    asked = exchange.request.query_params
    exchange.ignore([key for key in asked if key not in ("model", "match")])
    pattern = asked.get("match", "")
    if pattern.count("{") != pattern.count("}"):
        raise BadRequest(
            f"Invalid 'match': a brace of {pattern[:200]!r} is not closed, or not opened; patterns look like "
            "model.layers.{0,3}.mlp.",
            param="match",
        )
    if len(pattern) > MOST_LETTERS:
        raise BadRequest(f"Invalid 'match': it has {len(pattern)} letters; send at most {MOST_LETTERS}.", param="match")
    card = exchange.find_model(asked.get("model"))
    found: dict[str, Any] = await until_disconnect(exchange.request.receive, exchange.models.modules(card.id, pattern))
    return json_response(found)


async def create_vector(exchange: Exchange) -> Response:
    """Upload a vector for interventions, as a safetensors file with one tensor named vector; equal bytes, equal id."""
    raw = bytes(await read_bytes(exchange.request, exchange.options))
    if not raw:
        raise BadRequest("The body is empty; send a safetensors file with one tensor 'vector'.", code="vector_shape")
    shape: UploadedVector = {"id": await exchange.models.captures.put_vector(raw)}
    return json_response(shape)
