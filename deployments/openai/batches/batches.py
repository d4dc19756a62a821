"""/v1/batches: requests of a file, computed when no live requests need the model."""

from __future__ import annotations

from fastapi import Response

from deployments.openai.batches.listing import asked_page, batches_of, list_response
from deployments.openai.batches.schema import BatchBody
from deployments.openai.fields.fields import parse_fields
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_response


async def create_batch(exchange: Exchange) -> Response:
    """Compute the requests of an uploaded file."""
    batches = batches_of(exchange)
    body, unknown = parse_fields(BatchBody, await exchange.read_object())
    exchange.ignore(unknown)
    fields = body.model_dump(include={"input_file_id", "endpoint", "completion_window", "metadata"})
    expires = body.output_expires_after
    fields["output_expires_after"] = None if expires is None else expires.seconds
    return json_response(await batches.create_batch(exchange.owner, fields))


async def list_batches(exchange: Exchange) -> Response:
    """The batches of this API key, the newest first."""
    batches = batches_of(exchange)
    page = await asked_page(exchange, batches.batch, default=20, most=100)
    return list_response(*await batches.batches(exchange.owner, page))


async def retrieve_batch(exchange: Exchange) -> Response:
    """A batch: its status, its counts and the ids of its files."""
    return json_response(await batches_of(exchange).batch(_asked(exchange), exchange.owner))


async def cancel_batch(exchange: Exchange) -> Response:
    """Cancel a batch. The lines that are done stay in its output file."""
    return json_response(await batches_of(exchange).cancel_batch(_asked(exchange), exchange.owner))


def _asked(exchange: Exchange) -> str:
    return str(exchange.request.path_params["batch_id"])
