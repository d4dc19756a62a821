"""GET /version."""

from __future__ import annotations

from fastapi import Response
from typing_extensions import TypedDict

from deployments.core.installed import server_version
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import to_json


class Version(TypedDict):
    version: str


async def show_version(exchange: Exchange) -> Response:
    """The version of this server."""
    shape: Version = {"version": server_version()}
    return Response(to_json(shape), media_type="application/json")
