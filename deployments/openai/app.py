"""The API: every route, under /v1, without it, and under a model's own path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from deployments.batches.client import BatchClient
from deployments.config.api import ApiOptions
from deployments.core.client import ModelClient
from deployments.core.errors import BadRequest, MethodNotAllowed, RouteNotFound, TroupeError
from deployments.core.installed import server_version
from deployments.openai.fields.inside import INSIDE_HEADER
from deployments.openai.http.api import Api
from deployments.openai.http.endpoint import endpoint
from deployments.openai.http.errors import error_response, internal_error
from deployments.openai.http.exchange import FINGERPRINT_HEADER, IGNORED_HEADER, SAMPLING_HEADER
from deployments.openai.http.keys import ApiKeys
from deployments.openai.http.middleware import RequestMiddleware
from deployments.openai.http.openapi import openapi
from deployments.openai.http.paths import TidyPaths
from deployments.openai.http.route import Route, methods
from deployments.openai.page.page import PageMiddleware, document
from deployments.openai.record.answered import RESUMED_HEADER
from deployments.openai.record.recorder import Recorder
from deployments.openai.routes import ROUTES

_EXPOSED = (
    *("x-request-id", "retry-after", SAMPLING_HEADER, IGNORED_HEADER, FINGERPRINT_HEADER, RESUMED_HEADER),
    INSIDE_HEADER,
)

AddRoutes = Callable[[FastAPI, Api, Sequence[Route]], None]
"""Adds routes to an application that has those of the API."""


def build_api(
    client: ModelClient,
    options: ApiOptions | None = None,
    *,
    names_requests: bool = True,
    more: AddRoutes | None = None,
    batches: BatchClient | None = None,
) -> FastAPI:
    """The OpenAI API over the models of `client`.

    Args:
        names_requests: see `RequestMiddleware`.
        more: routes beside those of `ROUTES`.
        batches: files and batches; None if the server has none.

    Raises:
        ConfigError: an option names something that cannot be used.
    """
    options = options or ApiOptions()
    keys = ApiKeys(options)
    guarded = bool(options.api_keys or options.api_keys_file)
    app = FastAPI(title="Troupe", redirect_slashes=False, docs_url=None, redoc_url=None)
    app.openapi = cache(partial(openapi, ROUTES, server_version(), keys=guarded))  # type: ignore[method-assign]
    paths = TidyPaths(name for card in client.models() for name in (card.id, *card.aliases))
    app.add_middleware(RequestMiddleware, options=options, keys=keys, paths=paths, names_requests=names_requests)
    app.add_middleware(PageMiddleware, paths=paths, routes=ROUTES)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_EXPOSED,
        )
    app.add_exception_handler(HTTPException, _http_error)
    recorder = None if options.record_dir is None else Recorder(options.record_dir, options.record_max_bytes)
    api = Api(client, options, keys, recorder, batches)
    app.add_api_route("/docs", show_docs, methods=methods("GET"), include_in_schema=False)
    for route in ROUTES:
        _add(app, route, api)
    if more is not None:
        more(app, api, ROUTES)
    return app


async def show_docs(request: Request) -> Response:
    """Swagger, which shows the routes and sends requests to them."""
    return document("docs.html", request.scope)


def _add(app: FastAPI, route: Route, api: Api) -> None:
    answer = endpoint(route.handler, api)
    paths = [f"/v1{route.path}", route.path]
    if route.scoped:
        paths += [f"/models/{{model_id:path}}/v1{route.path}", f"/models/{{model_id:path}}{route.path}"]
    for path in paths:
        app.add_api_route(path, answer, methods=methods(route.method), response_model=None)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    problem: TroupeError
    if error.status_code == 404:
        problem = RouteNotFound(f"No route {request.method} {path}; see /docs.")
    elif error.status_code == 405:
        problem = MethodNotAllowed(f"{path} does not answer {request.method}; see /docs.")
    elif error.status_code < 500:
        problem = BadRequest(str(error.detail))
    else:
        problem = internal_error(error)
    response = error_response(problem, request.scope)
    if error.headers:
        response.headers.update(error.headers)
    return response
