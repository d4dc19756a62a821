"""Routes for operators, which need an admin key: where models are loaded; load, unload, drain."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from deployments.config.explain import nearest
from deployments.config.model import ModelEntry
from deployments.core.errors import BadRequest
from deployments.openai.fields.fields import RequestBody, parse_fields
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_response

_OF_THE_CONFIGURATION = frozenset({"pinned", "preload", "profile_dir", "variants"})


class ModelBody(RequestBody):
    """A model by its id or alias."""


class AddedModel(RequestBody):
    """A model that is added while the server runs: `like` and `model_name`, or an adapter: `base` and `adapter`."""

    id: str = Field(min_length=1, max_length=512, description="The name that clients send as model.")
    like: str | None = Field(
        default=None, min_length=1, description="Id of the model whose loader and options are used."
    )
    model_name: str | None = Field(
        default=None, min_length=1, max_length=4096, description="A folder, or a name on the Hub."
    )
    base: str | None = Field(default=None, min_length=1, description="Id of the model that an adapter changes.")
    adapter: str | None = Field(
        default=None, min_length=1, max_length=4096, description="Folder of a PEFT adapter over base."
    )
    aliases: list[str] | None = Field(default=None, description="Other names of the same model.")
    engine: dict[str, Any] | None = Field(default=None, description="Options of its engine, in place of those of like.")
    api: dict[str, Any] | None = Field(default=None, description="Options of its requests, in place of those of like.")
    replace: bool = Field(default=False, description="Replace an added model of this id.")
    load: bool = Field(default=False, description="Load it now; the answer comes when it is loaded.")


class DrainBody(RequestBody):
    """Whether to refuse new requests."""

    drain: bool = Field(default=True, description="false takes requests again.")


class ReplicaList(TypedDict):
    object: Literal["list"]
    data: list[dict[str, Any]]


class ModelState(TypedDict):
    """A model, an adapter over the model `parent`, or a folder that is neither.

    `origin` is where it comes from (yaml, post, folder or hub), `state` is ready, settling (it is being written),
    refused or gone, and `reason` says why it is not ready.
    """

    model: str
    kind: Literal["model", "adapter"]
    aliases: list[str]
    parent: str | None
    origin: Literal["yaml", "post", "folder", "hub"]
    like: str | None
    source: str | None
    state: Literal["ready", "settling", "refused", "gone"]
    reason: str | None
    replicas: NotRequired[list[dict[str, str]]]


class ModelStates(TypedDict):
    object: Literal["list"]
    data: list[ModelState]


class RemovedModel(TypedDict):
    model: str
    deleted: bool
    unloaded: int


class AdminAnswer(TypedDict):
    model: NotRequired[str]
    loaded: NotRequired[bool]
    unloaded: NotRequired[bool]
    draining: NotRequired[bool]


async def list_added(exchange: Exchange) -> Response:
    """Every model and every folder that is not one, with its state; with `?refresh`, folders are searched first."""
    exchange.api.keys.check_admin(exchange.request.headers)
    refresh = "refresh" in exchange.request.query_params
    return json_response({"object": "list", "data": await exchange.models.model_states(refresh=refresh)})


async def add_model(exchange: Exchange) -> Response:
    """Add a model while the server runs.

    A folder or a model of the Hub, served like one of the configuration, or an adapter over a model.
    """
    exchange.api.keys.check_admin(exchange.request.headers)
    given = await exchange.read_object()
    body, unknown = parse_fields(AddedModel, given)
    if unknown:
        raise _unknown_field(unknown[0])
    state, new = await exchange.models.add_model(body.model_dump(exclude_none=True))
    if body.load:
        await exchange.models.load(body.id)
    response = json_response(state)
    response.status_code = 201 if new else 200
    return response


def _unknown_field(key: str) -> BadRequest:
    if key in _OF_THE_CONFIGURATION:
        why = ": only models of the configuration have it; leave it out"
    elif key in ModelEntry.model_fields:
        why = ": an added model has it from the model that like or base names; leave it out"
    else:
        why = nearest(key, AddedModel.model_fields)
    return BadRequest(f"Unknown field {key[:100]!r}{why}.", param=key[:100], code="unknown_parameter")


async def remove_model(exchange: Exchange) -> Response:
    """Remove a model that was added: new requests get 404, running ones end, then it is unloaded."""
    exchange.api.keys.check_admin(exchange.request.headers)
    name = exchange.request.path_params["name"]
    unloaded = await exchange.models.remove_model(name)
    return json_response({"model": name, "deleted": True, "unloaded": unloaded})


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
