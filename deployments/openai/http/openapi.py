"""The OpenAPI description of the routes, shown at /docs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode
from typing_extensions import TypedDict

from deployments.openai.http.route import Route

_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What is 27 + 15?"}], "temperature": 0}
_TEXT: dict[str, Any] = {"prompt": "What is 27 + 15?", "max_tokens": 16, "temperature": 0}

EXAMPLES: dict[str, dict[str, Any]] = {
    "/chat/completions": _CHAT,
    "/chat/completions/render": _CHAT,
    "/completions": _TEXT,
    "/completions/render": _TEXT,
    "/responses": {"input": "What is 27 + 15?", "temperature": 0},
    "/messages": {"max_tokens": 64, **_CHAT},
    "/messages/count_tokens": {"messages": _CHAT["messages"]},
    "/embeddings": {"input": "What is 27 + 15?"},
    "/score": {"prompt": "27 + 15 = ", "choices": ["42", "43"]},
    "/decisions": {"input": "27 + 15 = 42", "questions": [{"type": "predicate", "instructions": "The sum is right."}]},
    "/tokenize": {"prompt": "What is 27 + 15?"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
"""A request to each route that works, by path."""

_REF = "#/components/schemas/{model}"


class ErrorObject(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(TypedDict):
    error: ErrorObject


class BlockErrorObject(TypedDict):
    type: str
    message: str


class BlockErrorResponse(TypedDict):
    """Of the Messages API."""

    type: Literal["error"]
    error: BlockErrorObject
    request_id: str


_ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or unknown.",
    "404": "The model or path does not exist.",
    "413": "The body is larger than the server reads.",
    "415": "The content type is not JSON, or not a form on a route that takes a file.",
    "429": "The queue has reached its limit; see the header Retry-After.",
    "500": "The model, or a hook of its loader, failed.",
    "503": "Try again: out of memory, or a replica was lost.",
    "504": "The model's loader has not returned in time.",
}
_HEADERS = {
    "x-request-id": {"schema": {"type": "string"}, "description": "The request's own id, or a new one."},
    "x-troupe-sampling": {"schema": {"type": "string"}, "description": "The effective sampling parameters, as JSON."},
    "x-troupe-ignored": {"schema": {"type": "string"}, "description": "Unknown request fields."},
    "x-troupe-unread": {"schema": {"type": "string"}, "description": "A marker of a tool call in the content."},
}


def openapi(routes: Sequence[Route], version: str, *, keys: bool) -> dict[str, Any]:
    """The description of the routes under /v1, in OpenAPI 3.1.

    Args:
        keys: the server asks for API keys.
    """
    schemas, components = _schemas(routes)
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = f"/v1{route.path.replace(':path', '')}"
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, schemas)
    description: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "Troupe",
            "version": version,
            "description": "Any Hugging Face model with the OpenAI API. Every path below also answers without /v1 "
            "and, for one model, under /models/{id}/v1.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if keys:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}]
    return description


_Key = tuple[str, str]


def _schemas(routes: Sequence[Route]) -> tuple[dict[_Key, Any], dict[str, Any]]:
    """References to the schemas of all bodies, answers and events, and the schemas themselves."""
    wanted: list[tuple[_Key, JsonSchemaMode, TypeAdapter[Any]]] = [
        (("", "error"), "serialization", TypeAdapter(ErrorResponse)),
        (("messages", "error"), "serialization", TypeAdapter(BlockErrorResponse)),
    ]
    for route in routes:
        wanted.append(((route.name, "answer"), "serialization", TypeAdapter(route.answer)))
        if route.body is not None:
            wanted.append(((route.name, "body"), "validation", TypeAdapter(route.body)))
        if route.event is not None:
            wanted.append(((route.name, "event"), "serialization", TypeAdapter(route.event)))
    references, definitions = TypeAdapter.json_schemas(wanted, ref_template=_REF)
    return {key: _standard(schema) for (key, _), schema in references.items()}, _standard(definitions["$defs"])


_KINDS = {str: "text/plain", bytes: "application/octet-stream"}
_STANDARD = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}


def _standard(schema: Any) -> Any:
    """Limits that pydantic wrote under its own names, where they stand before a validator, under JSON Schema's."""
    if isinstance(schema, dict):
        return {
            _STANDARD.get(key, key) if isinstance(value, int | float) else key: _standard(value)
            for key, value in schema.items()
        }
    return [_standard(item) for item in schema] if isinstance(schema, list) else schema


def _operation(route: Route, schemas: dict[_Key, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {_KINDS.get(route.answer, "application/json"): {"schema": schemas[route.name, "answer"]}}
    if route.tag == "audio":
        content["text/plain"] = {"schema": {"type": "string"}}
        content["text/vtt"] = {"schema": {"type": "string"}}
    if route.event is not None:
        content["text/event-stream"] = {"schema": schemas[route.name, "event"]}
    blocks = route.tag == "messages"
    error = {"application/json": {"schema": schemas["messages" if blocks else "", "error"]}}
    errors = {"529" if blocks and status == "503" else status: text for status, text in _ERRORS.items()}
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "tags": [route.tag],
        "parameters": _parameters(route),
        "responses": {
            "200": {"description": "The answer.", "content": content, "headers": _HEADERS},
            **{status: {"description": text, "content": error} for status, text in errors.items()},
        },
    }
    if route.body is not None:
        body: dict[str, Any] = {"schema": schemas[route.name, "body"]}
        if route.path in EXAMPLES:
            body["example"] = EXAMPLES[route.path]
        kind = "multipart/form-data" if route.form else "application/json"
        operation["requestBody"] = {"required": True, "content": {kind: body}}
    return operation


def _parameters(route: Route) -> list[dict[str, Any]]:
    string = {"type": "string"}
    parameters: list[dict[str, Any]] = [{"name": name, "in": "query", "schema": string} for name in route.query]
    if "{" in route.path:
        name = route.path.partition("{")[2].partition("}")[0].partition(":")[0]
        parameters.append({"name": name, "in": "path", "required": True, "schema": string})
    return parameters
