"""GET /version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import Response
from typing_extensions import TypedDict

from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import to_json


class Version(TypedDict):
    version: str


def server_version() -> str:
    """The version of the installed package; 0 if it is not installed."""
    try:
        return version("troupe-serve")
    except PackageNotFoundError:
        return "0"


async def show_version(exchange: Exchange) -> Response:
    """The version of this server."""
    shape: Version = {"version": server_version()}
    return Response(to_json(shape), media_type="application/json")
