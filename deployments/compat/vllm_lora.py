"""vLLM's routes for adapters, which trainers call: https://docs.vllm.ai/en/latest/features/lora.html

They add and remove adapters as POST and DELETE of /admin/models do, and need an admin key as those do.
"""

from __future__ import annotations

from fastapi import Response
from pydantic import Field

from deployments.core.errors import BadRequest, NameTaken, RouteGone
from deployments.openai.fields.fields import RequestBody, parse_fields
from deployments.openai.http.exchange import Exchange


class LoadBody(RequestBody):
    """Body of /v1/load_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = False
    base_model_name: str | None = None


class UnloadBody(RequestBody):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str = Field(min_length=1)
    lora_int_id: int | None = None


async def load_adapter(exchange: Exchange) -> Response:
    """Add an adapter and place it beside its base, as vLLM does."""
    _check_open(exchange)
    body, _ = parse_fields(LoadBody, await exchange.read_object())
    base = body.base_model_name or _only_model(exchange)
    named = {"id": body.lora_name, "base": base, "adapter": body.lora_path}
    added = {**named, "replace": body.load_inplace, "load": True}
    try:
        _, new = await exchange.models.add_model(added)
    except NameTaken as error:
        raise BadRequest(error.message, param="lora_name") from None
    if not new and not body.load_inplace:
        raise BadRequest(
            f"The LoRA adapter {body.lora_name!r} has already been loaded; set load_inplace to read it again.",
            param="lora_name",
        )
    await exchange.models.load(body.lora_name)
    return Response(f"Success: LoRA adapter {body.lora_name!r} added successfully.", media_type="text/plain")


async def unload_adapter(exchange: Exchange) -> Response:
    """Remove an adapter, as vLLM does."""
    _check_open(exchange)
    body, _ = parse_fields(UnloadBody, await exchange.read_object())
    await exchange.models.remove_model(body.lora_name)
    return Response(f"Success: LoRA adapter {body.lora_name!r} removed successfully.", media_type="text/plain")


def _check_open(exchange: Exchange) -> None:
    if not exchange.options.vllm_lora_routes:
        raise RouteGone(
            f"{exchange.request.scope['path']} is off. Set api.vllm_lora_routes and api.admin_keys in the "
            "configuration, or add adapters with POST /admin/models."
        )
    exchange.api.keys.check_admin(exchange.request.headers)


def _only_model(exchange: Exchange) -> str:
    """The model that adapters are over, if there is one alone."""
    models = [card.id for card in exchange.models.models() if card.configured and card.parent is None]
    if len(models) != 1:
        raise BadRequest(
            f"Missing required field 'base_model_name'; this server has {', '.join(models[:20])}.",
            param="base_model_name",
            code="missing_required_parameter",
        )
    return models[0]
