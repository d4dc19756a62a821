"""The API: every route, under /v1, without it, and under a model's own path."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from deployments.client import ModelClient
from deployments.errors import BadRequest, ConfigError, MethodNotAllowed, RouteNotFound, TroupeError
from deployments.messages import ModelCard
from deployments.openai.api import Api
from deployments.openai.boundary import Boundary
from deployments.openai.chat import create_chat_completion
from deployments.openai.completions import create_completion
from deployments.openai.errors import error_response, internal_error
from deployments.openai.exchange import IGNORED_HEADER, SAMPLING_HEADER, Handler, endpoint
from deployments.openai.keys import ApiKeys
from deployments.openai.models import health, list_models, retrieve_model
from deployments.openai.options import ApiOptions
from deployments.openai.parsing.families import FAMILIES
from deployments.openai.parsing.reasoning import MARKERS
from deployments.openai.record import Recorder
from deployments.openai.tokens import detokenize, render_chat, render_completion, tokenize, tokenizer_info


@dataclass(frozen=True, slots=True)
class Route:
    """A path below /v1 and what answers there."""

    method: str
    path: str
    handler: Handler
    scoped: bool = True


ROUTES = (
    Route("POST", "/chat/completions", create_chat_completion),
    Route("POST", "/completions", create_completion),
    Route("POST", "/chat/completions/render", render_chat),
    Route("POST", "/completions/render", render_completion),
    Route("POST", "/tokenize", tokenize),
    Route("POST", "/detokenize", detokenize),
    Route("GET", "/tokenizer_info", tokenizer_info),
    Route("GET", "/health", health, scoped=False),
    Route("GET", "/models", list_models),
    # Last: its path takes everything below /models.
    Route("GET", "/models/{name:path}", retrieve_model, scoped=False),
)


def build_api(client: ModelClient, options: ApiOptions | None = None) -> FastAPI:
    """The OpenAI API over the models of `client`.

    Raises:
        ConfigError: an option names something that cannot be used.
    """
    options = options or ApiOptions()
    for card in client.models():
        _check_parsers(card)
    app = FastAPI(title="Troupe", redirect_slashes=False)
    app.add_middleware(Boundary, options=options, keys=ApiKeys(options))
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", SAMPLING_HEADER, IGNORED_HEADER],
        )
    app.add_exception_handler(HTTPException, _http_error)
    api = Api(client, options, None if options.record_dir is None else Recorder(options.record_dir))
    for route in ROUTES:
        _add(app, route, api)
    return app


def _check_parsers(card: ModelCard) -> None:
    for name, chosen, known in (
        ("tool_parser", card.options.tool_parser, FAMILIES),
        ("reasoning_parser", card.options.reasoning_parser, MARKERS),
    ):
        if chosen is not None and chosen not in known:
            raise ConfigError(f"Model {card.id!r} has {name}: {chosen!r}; known ones: {', '.join(known)}.")


def _add(app: FastAPI, route: Route, api: Api) -> None:
    answer = endpoint(route.handler, api)
    paths = [f"/v1{route.path}", route.path]
    if route.scoped:
        paths += [f"/models/{{model_id:path}}/v1{route.path}", f"/models/{{model_id:path}}{route.path}"]
    for path in paths:
        app.add_api_route(
            path,
            answer,
            methods=[route.method],
            response_model=None,
            include_in_schema=path.startswith("/v1/"),
            summary=(route.handler.__doc__ or "").partition("\n")[0],
        )


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
    response = error_response(problem)
    if error.headers:
        response.headers.update(error.headers)
    return response
