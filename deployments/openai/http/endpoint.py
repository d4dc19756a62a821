"""An endpoint of FastAPI around the handler of a route: whatever is raised becomes an error for the client."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from fastapi import Request, Response

from deployments.core.errors import BadRequest, ModelNotFound, TroupeError, Unavailable, VersionMismatch
from deployments.openai.http.api import Api
from deployments.openai.http.cancel import Disconnected
from deployments.openai.http.errors import error_response, internal_error
from deployments.openai.http.exchange import FINGERPRINT_HEADER, Exchange, Handler

logger = logging.getLogger(__name__)

_CLIENT_CLOSED = 499
_VERSIONS = 3


def endpoint(handler: Handler, api: Api) -> Callable[[Request], Awaitable[Response]]:
    """A FastAPI endpoint around a handler, which answers with OpenAI's JSON whatever is raised.

    Caught here and not in exception handlers of the application, because Ray Serve replaces some of those.
    """

    async def answer(request: Request) -> Response:
        exchange = Exchange(api, request, request_id_of(request))
        try:
            response = await _answer(handler, exchange)
        except TroupeError as error:
            response = error_response(exchange.as_sent(error), request.scope)
        except Disconnected:
            response = Response(status_code=_CLIENT_CLOSED)
        except Exception as error:
            logger.exception("Request %s to %s failed", exchange.request_id, request.scope["path"])
            response = error_response(internal_error(error), request.scope)
        if exchange.fingerprint:
            exchange.headers[FINGERPRINT_HEADER] = exchange.fingerprint
        for name, value in exchange.headers.items():
            response.headers.setdefault(name, value)
        return response

    return answer


async def _answer(handler: Handler, exchange: Exchange) -> Response:
    """The answer; a model's default that the request's own fields do not go with is left out.

    A request whose calls would be answered by two versions of its model begins again, and so does one for a model that
    came while the server runs.
    """
    exchange.read_headers()
    versions = 1
    discovered = {""}
    while True:
        try:
            return await handler(exchange)
        except BadRequest as error:
            if not exchange.without_default(error):
                raise
        except ModelNotFound as error:
            if error.model in discovered or not await exchange.models.discover(error.model):
                raise
            discovered.add(error.model)
        except VersionMismatch:
            if not exchange.client.begin_again():
                raise
            versions += 1
            if versions > _VERSIONS:
                raise Unavailable("The model's files change too often; try again.", retry_after=5) from None


def request_id_of(request: Request) -> str:
    return str(request.scope["state"]["request_id"])
