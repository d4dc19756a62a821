"""What is served, and how it is: /v1/models, /fingerprint, /health, /metrics and /version."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired

from fastapi import Response
from typing_extensions import TypedDict

from deployments.core.installed import server_version
from deployments.core.model_card import ModelCard
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, json_response, written

_METRICS = "text/plain; version=0.0.4; charset=utf-8"


class ModelObject(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    fingerprint: NotRequired[str]
    max_model_len: NotRequired[int]
    answers: NotRequired[Mapping[str, Any]]


class Fingerprint(TypedDict):
    """Two fingerprints with the same parts are equal; `digest` begins with the 12 digits of a part."""

    model: str
    fingerprint: str
    weights: dict[str, Any]
    setup: dict[str, Any]


class Version(TypedDict):
    version: str


class Health(TypedDict):
    status: Literal["ok"]
    replicas: NotRequired[list[str]]
    data: NotRequired[list[dict[str, Any]]]


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelObject]


async def list_models(exchange: Exchange) -> Response:
    """Every model, then every alias and variant; under a model's own path that model alone."""
    client = exchange.models
    scoped = exchange.request.path_params.get("model_id")
    cards = client.models() if scoped is None else [client.resolve(scoped)]
    data = [_model_object(card.id, card) for card in cards]
    data += [_model_object(alias, client.resolve(alias)) for card in cards for alias in card.aliases]
    return json_response({"object": "list", "data": data})


async def retrieve_model(exchange: Exchange) -> Response:
    """One model by its id or an alias."""
    name = exchange.request.path_params["name"]
    return json_response(_model_object(name, exchange.models.resolve(name)))


async def health(exchange: Exchange) -> Response:
    """The server accepts requests; with `?verbose`, and a key if keys are set, every replica as a line and as data."""
    if "verbose" not in exchange.request.query_params:
        await exchange.models.ready()
        return json_response({"status": "ok"})
    exchange.api.keys.check(exchange.request.headers)
    replicas = await exchange.models.status()
    return json_response({"status": "ok", "replicas": [_line(replica) for replica in replicas], "data": replicas})


async def show_fingerprint(exchange: Exchange) -> Response:
    """The fingerprint of a model and what it is made of: its weights, and how they are served. Loads the model."""
    card = exchange.find_model(exchange.request.query_params.get("model"))

    async def answer() -> bytes:
        return await written(await exchange.client.fingerprint_parts(card.id))

    return await json_answer(exchange, answer())


async def show_metrics(exchange: Exchange) -> Response:
    """The metrics of all models and replicas, in Prometheus' text format."""
    return Response(await exchange.models.metrics(), media_type=_METRICS)


async def show_version(exchange: Exchange) -> Response:
    """The version of this server."""
    return json_response({"version": server_version()})


def _model_object(name: str, card: ModelCard) -> ModelObject:
    shape: ModelObject = {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "troupe",
        "root": card.id,
        "parent": card.id if card.variant else card.parent,
    }
    if card.fingerprint:
        shape["fingerprint"] = card.fingerprint
    if card.max_model_len is not None:
        shape["max_model_len"] = card.max_model_len
    if card.answers is not None:
        shape["answers"] = card.answers
    return shape


def _line(replica: dict[str, Any]) -> str:
    """A replica's status as one line."""
    models = [
        f"{model['id']} ({model['kind']}: {model['sequences']} running, {model['waiting']} waiting)"
        for model in replica["models"]
    ]
    models += [f"{model} (loading)" for model in replica["loading"]]
    return (
        f"{replica.get('replica', 'local')} on {replica['device']}, pid {replica['pid']}"
        f"{', draining' if replica['draining'] else ''}: {', '.join(models) or 'no model'}; "
        f"{replica['waiting']} waiting for a model, {replica['loads']} loads, {replica['evictions']} evictions"
    )
