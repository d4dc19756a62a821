"""Every route with its fields and an example: docs/reference/routes.md, from the OpenAPI description of the server."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import requests

from deployments.openai.fields.sampling import GenerationBody
from deployments.openai.http.openapi import EXAMPLES, openapi
from deployments.openai.http.route import Route
from deployments.openai.routes import ROUTES
from tests.docs.reference.schema import Schema, default_of, fields, resolved, type_of

SHARED = tuple(GenerationBody.model_fields)
ADMIN_KEY = "an-admin-key"
SERVER = {"admin_keys": [ADMIN_KEY]}
"""The `api` section of the server that answers the examples, with the demo model."""
_BODIES = {
    **EXAMPLES,
    "/admin/load": {"model": "demo"},
    "/admin/unload": {"model": "demo"},
    "/admin/drain": {"drain": False},
}
_PATHS = {
    "/models/{name:path}": "/models/demo",
    "/health": "/health?verbose=1",
    "/modules": "/modules?match=model.norm",
}
_UNSHOWN = {
    *("POST /admin/models", "DELETE /admin/models/{name:path}", "GET /records", "GET /records/{record}"),
    "GET /metrics",
    *("POST /vectors", "GET /captures/{capture}", "DELETE /captures/{capture}"),
    *(route.name for route in ROUTES if route.tag == "batches"),
}
"""Routes whose example needs a folder of the machine, a record, a capture or a file, or whose answer is not JSON."""
COUNTERS = ("GET /admin/replicas", "GET /health")
"""Routes whose numbers depend on what else has happened."""
# What differs between two answers to one request.
_CHANGES = {
    *("id", "created", "created_at", "completed_at", "version", "pid", "system_fingerprint", "fingerprint"),
    *("device", "packages"),
}
_FINGERPRINT = "troupe-w4d661fe9a1d7-sca8c8cbf39a8"
_SHOWN_AS = {
    "created": 1790000000,
    "created_at": 1790000000,
    "completed_at": 1790000001,
    "pid": 4711,
    "budget_bytes": 10737418240,
    "system_fingerprint": "troupe-w1b0e8a4c9f27-s5d3f60e7a812",
    "fingerprint": "troupe-w1b0e8a4c9f27-s5d3f60e7a812",
}
_LONG = 8


def described() -> dict[str, Any]:
    return openapi(ROUTES, "0", keys=False)


def examples(url: str) -> dict[str, Any]:
    """The answer of a server to the example of each route, by the route's name."""
    found: dict[str, Any] = {}
    for route in sorted(ROUTES, key=lambda route: route.path == "/admin/unload"):
        if not route.form and route.name not in _UNSHOWN:
            headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
            path = f"{url}/v1{_PATHS.get(route.path, route.path)}"
            answer = requests.request(route.method, path, json=_BODIES.get(route.path), headers=headers, timeout=60)
            assert answer.status_code == 200, (route.name, answer.text)
            found[route.name] = answer.json()
    return found


def page(answers: Mapping[str, Any]) -> str:
    """The page's generated part.

    Args:
        answers: to the examples, by the route's name.
    """
    description = described()
    parts = [_shared(description)]
    seen: dict[Any, str] = {}
    for route in ROUTES:
        parts.append("\n".join(_section(route, description, answers, seen)))
        if route.body is not None:
            seen.setdefault(route.body, route.path)
    return "\n\n".join(parts)


def _shared(description: dict[str, Any]) -> str:
    schemas = description["components"]["schemas"]
    body = schemas["ChatBody"]
    wanted = {**body, "properties": {name: body["properties"][name] for name in SHARED}}
    text = (
        "## Text generation\n\nChat completions, completions and responses share these fields. A `stream` is described"
    )
    return f"{text} [here](api.md#streams).\n\n" + "\n".join(_request(wanted, schemas))


def anchor(title: str) -> str:
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _section(
    route: Route, description: dict[str, Any], answers: Mapping[str, Any], seen: Mapping[Any, str]
) -> Iterator[str]:
    schemas = description["components"]["schemas"]
    operation = description["paths"][f"/v1{route.path.replace(':path', '')}"][route.method.lower()]
    yield f"## {route.method} {_shown(route.path)}\n\n{operation['summary']}"
    for parameter in operation["parameters"]:
        if parameter["in"] == "query":
            yield f"\nQuery: `{parameter['name']}`."
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        yield from _body(route, resolved(content["schema"], schemas), schemas, seen)
    yield from _example(route, answers)
    yield from _answer(operation, schemas)


def _body(route: Route, body: Schema, schemas: Mapping[str, Schema], seen: Mapping[Any, str]) -> Iterator[str]:
    if route.body in seen:
        title = f"{route.method} {seen[route.body]}"
        yield f"\nThe fields are those of [`{title}`](#{anchor(title)})."
        return
    if route.form:
        yield "\nThe body is a form (`multipart/form-data`)."
    shares = route.body is not None and issubclass(route.body, GenerationBody)
    own = {name: field for name, field in body["properties"].items() if not shares or name not in SHARED}
    if shares:
        yield "\nThe fields are those of [text generation](#text-generation), and:"
    yield ""
    yield from _request({**body, "properties": own}, schemas)


def _request(body: Schema, schemas: Mapping[str, Schema]) -> Iterator[str]:
    yield "| field | value | default | |\n|---|---|---|---|"
    rows: dict[str, list[tuple[str, str, str]]] = {}  # alternatives can have a field of the same name
    for path, field, required in fields(body, schemas):
        default = "required" if required else default_of(field)
        rows.setdefault(path, []).append((type_of(field, schemas), default, field.get("description", "")))
    for path, found in rows.items():
        cells = (" or ".join(filter(None, dict.fromkeys(cell))) for cell in zip(*found, strict=True))
        yield f"| `{path}` | {' | '.join(cells)} |"


def _shown(path: str) -> str:
    return path.replace("{name:path}", "{id}")


def _example(route: Route, answers: Mapping[str, Any]) -> Iterator[str]:
    if route.name not in answers:
        return
    body = _BODIES.get(route.path)
    request = f"{route.method} /v1{_PATHS.get(route.path, route.path)}" + ("" if body is None else f"\n\n{_json(body)}")
    yield f"\n```http\n{request}\n```\n\n```json\n{_json(shortened(answers[route.name]))}\n```"


def _answer(operation: Mapping[str, Any], schemas: Mapping[str, Schema]) -> Iterator[str]:
    contents = operation["responses"]["200"]["content"]
    for kind, title in (("application/json", "answer"), ("text/event-stream", "event of a stream")):
        if kind in contents and (rows := list(_answer_rows(contents[kind]["schema"], schemas))):
            yield f"\n| {title} | |\n|---|---|"
            yield from rows


def _answer_rows(schema: Schema, schemas: Mapping[str, Schema]) -> Iterator[str]:
    for path, field, always in fields(schema, schemas):
        yield f"| `{path}` | {type_of(field, schemas)}{'' if always else ', not in every answer'} |"


def _json(value: Any) -> str:
    """JSON in lines that are not too long."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= 110 or not isinstance(value, dict | list) or not value:
        return line
    if isinstance(value, list):
        inner = ",\n".join(_json(item) for item in value)
    else:
        inner = ",\n".join(f"{json.dumps(key)}: {_json(item)}" for key, item in value.items())
    inner = "\n".join(f"  {row}" for row in inner.splitlines())
    return f"[\n{inner}\n]" if isinstance(value, list) else f"{{\n{inner}\n}}"


def shortened(value: Any) -> Any:
    """An answer with long lists cut and numbers rounded, as the page shows it."""
    if isinstance(value, dict):
        return {
            key: _SHOWN_AS[key] if key in _SHOWN_AS and item is not None else shortened(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        kept = value if len(value) <= _LONG or not isinstance(value[0], int | float) else [*value[:3], "…"]
        return [shortened(item) for item in kept]
    if isinstance(value, str):
        return re.sub(r"[0-9a-f]{32}", "5af0733f93304549a7a2e2e148c696e5", re.sub(r"\bpid \d+", "pid 4711", value))
    return round(value, 4) if isinstance(value, float) else value


def same(shown: Any, found: Any, key: str = "") -> bool:
    """Whether an answer is what the page shows, apart from what changes with each request and each processor.

    Args:
        key: of the object that has it; the route's name for a whole answer.
    """
    if key in _CHANGES:
        return type(shown) is type(found)
    if key in COUNTERS:
        return same(_uncounted(shown), _uncounted(found))
    if isinstance(shown, dict) and isinstance(found, dict):
        return shown.keys() == found.keys() and all(same(shown[name], found[name], name) for name in shown)
    if isinstance(shown, list) and isinstance(found, list):
        return len(shown) == len(found) and all(map(same, shown, found))
    if isinstance(shown, int | float) and isinstance(found, int | float) and not isinstance(shown, bool):
        return math.isclose(shown, found, rel_tol=0.05, abs_tol=0.01)
    return bool(shown == found)


def _uncounted(value: Any) -> Any:
    """A value with every number replaced by 0."""
    if isinstance(value, dict):
        return {key: _uncounted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_uncounted(item) for item in value]
    return 0 if isinstance(value, int | float) else value
