"""Routes for operators, which need an admin key: where models are loaded; load, unload, drain."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.openai.fields.fields import RequestBody, parse_fields
from deployments.openai.http.exchange import Exchange
from deployments.openai.models import json_response


class ModelBody(RequestBody):
    """A model by its id or alias."""


class DrainBody(RequestBody):
    """Whether to refuse new requests."""

    drain: bool = Field(default=True, description="false takes requests again.")


class ReplicaList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]


class AdminAnswer(TypedDict):
    model: NotRequired[str]
    loaded: NotRequired[bool]
    unloaded: NotRequired[bool]
    draining: NotRequired[bool]


async def list_replicas(exchange: Exchange) -> Response:
    """Every replica: its device, its models with their engines' counters, its loads and evictions."""
    exchange.api.keys.check_admin(exchange.request.headers)
    return json_response({"object": "list", "data": await exchange.models.status()})


async def load_model(exchange: Exchange) -> Response:
    """Load a model now; the answer comes when it is there."""
    exchange.api.keys.check_admin(exchange.request.headers)
    _, card = await exchange.read(ModelBody)
    await exchange.models.load(card.id)
    return json_response({"model": card.id, "loaded": True})


async def unload_model(exchange: Exchange) -> Response:
    """Unload a model from every replica once nobody uses it; a later request loads it again."""
    exchange.api.keys.check_admin(exchange.request.headers)
    _, card = await exchange.read(ModelBody)
    return json_response({"model": card.id, "unloaded": await exchange.models.unload(card.id)})


async def drain(exchange: Exchange) -> Response:
    """Refuse new requests and end those that run, or take requests again."""
    exchange.api.keys.check_admin(exchange.request.headers)
    body, _ = parse_fields(DrainBody, await exchange.read_object())
    await exchange.models.drain(body.drain)
    return json_response({"draining": body.drain})
