"""GET /metrics: what Prometheus reads."""

from __future__ import annotations

from fastapi import Response

from deployments.openai.http.exchange import Exchange

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


async def show_metrics(exchange: Exchange) -> Response:
    """The metrics of all models and replicas, in Prometheus' text format."""
    return Response(await exchange.models.metrics(), media_type=_TEXT)
