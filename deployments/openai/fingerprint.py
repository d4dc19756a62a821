"""GET /fingerprint: what a model's fingerprint is made of."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from typing_extensions import TypedDict

from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, written


class Fingerprint(TypedDict):
    """Two fingerprints with the same parts are equal; `digest` begins with the 12 digits of a part."""

    model: str
    fingerprint: str
    weights: dict[str, Any]
    setup: dict[str, Any]


async def show_fingerprint(exchange: Exchange) -> Response:
    """The fingerprint of a model and what it is made of: its weights, and how they are served. Loads the model."""
    card = exchange.find_model(exchange.request.query_params.get("model"))

    async def answer() -> bytes:
        return await written(await exchange.client.fingerprint_parts(card.id))

    return await json_answer(exchange, answer())
