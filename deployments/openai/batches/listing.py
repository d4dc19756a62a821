"""Parts of lists, as files and batches have them, and who has them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi import Response

from deployments.batches.client import BatchClient, Page
from deployments.core.errors import BadRequest, BatchesOff, BatchNotFound, FileMissing
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_response


def batches_of(exchange: Exchange) -> BatchClient:
    """Files and batches.

    Raises:
        BatchesOff: the server has none.
    """
    if exchange.api.batches is None:
        raise BatchesOff(
            "This server keeps no files and batches. Start it with --state-dir FOLDER (args.state_dir in its "
            "configuration), and without api.batches.enabled: false. `troupe batch` needs neither."
        )
    return exchange.api.batches


Find = Callable[[str, str], Awaitable[Mapping[str, Any]]]
_KEYS = ("limit", "after", "order")
_PURPOSES = ("batch", "batch_output")


async def asked_page(exchange: Exchange, find: Find, *, default: int, most: int, keys: tuple[str, ...] = ()) -> Page:
    """The part of a list that the query asks for.

    Args:
        find: one of the list, by its id and owner.
        keys: further parameters that the route has.

    Raises:
        BadRequest: a parameter cannot be used.
    """
    query = exchange.request.query_params
    exchange.ignore([key for key in query if key not in (*_KEYS, *keys)])
    limit, order = query.get("limit", str(default)), query.get("order", "desc")
    if not limit.isdecimal() or len(limit) > 9 or not 1 <= int(limit) <= most:
        raise BadRequest(f"Invalid 'limit' {limit[:80]!r}: input should be a number from 1 to {most}.", param="limit")
    if order not in ("asc", "desc"):
        raise BadRequest(f"Invalid 'order' {order[:80]!r}: input should be asc or desc.", param="order")
    if query.get("purpose") is not None and query["purpose"] not in _PURPOSES:
        purposes = " or ".join(_PURPOSES)
        raise BadRequest(
            f"Invalid 'purpose' {query['purpose'][:80]!r}: files have the purpose {purposes}.", param="purpose"
        )
    if (after := query.get("after")) is not None:
        try:
            await find(after, exchange.owner)
        except (FileMissing, BatchNotFound) as error:
            raise BadRequest(f"Invalid 'after': {error.message}", param="after") from error
    return Page(limit=int(limit), after=after, purpose=query.get("purpose"), newest_first=order == "desc")


def list_response(data: Sequence[dict[str, Any]], more: bool) -> Response:
    """A part of a list; OpenAI's schema has a text for the ids, also where there are none."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else ("", "")
    return json_response({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": more})
