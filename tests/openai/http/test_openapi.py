"""The page at /docs: it says what the routes do, and its examples work."""

from __future__ import annotations

import re
from typing import Any

import jsonschema
import pytest
import requests

from deployments.openai.http.openapi import EXAMPLES
from deployments.openai.routes import ROUTES
from tests.openai.conftest import Serve, Server


@pytest.fixture(scope="module")
def description(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(server.url + "/openapi.json", timeout=5).json()
    return found


def validator(description: dict[str, Any], schema: dict[str, Any]) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**schema, "components": description["components"]})


def test_every_route_is_described(description: dict[str, Any]) -> None:
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    assert described == {(f"/v1{route.path.replace(':path', '')}", route.method) for route in ROUTES}
    for methods in description["paths"].values():
        for operation in methods.values():
            assert operation["summary"].endswith(".")
    assert "securitySchemes" not in description["components"]


def test_every_part_of_a_path_that_varies_is_a_parameter(description: dict[str, Any]) -> None:
    for path, methods in description["paths"].items():
        for operation in methods.values():
            named = [each["name"] for each in operation["parameters"] if each["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)


def test_the_schemas_are_schemas(description: dict[str, Any]) -> None:
    for schema in description["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


ASIDE = ("admin", "inside", "batches")
"""Routes that need a key, a model whose inside is open, or a state_dir: tests of their own ask those."""
WORKING = [route for route in ROUTES if route.path in EXAMPLES or (route.method == "GET" and route.tag not in ASIDE)]


@pytest.mark.parametrize("route", WORKING, ids=lambda route: route.name)
def test_examples_work_and_answers_conform(server: Server, description: dict[str, Any], route: Any) -> None:
    operation = description["paths"][f"/v1{route.path.replace(':path', '')}"][route.method.lower()]
    url = f"{server.url}/models/org/scripted/v1{route.path}" if route.scoped else f"{server.url}/v1{route.path}"
    url = url.replace("{name:path}", "org/scripted")
    response = requests.request(route.method, url, json=EXAMPLES.get(route.path), timeout=10)
    assert response.status_code == 200, response.text
    ((kind, answer),) = [each for each in operation["responses"]["200"]["content"].items() if "event" not in each[0]]
    assert response.headers["content-type"].partition(";")[0] == kind
    validator(description, answer["schema"]).validate(response.text if kind == "text/plain" else response.json())
    if route.body is not None:
        body = operation["requestBody"]["content"]["application/json"]
        validator(description, body["schema"]).validate(body["example"])
        wrong = requests.request(route.method, url, json={route_field(route): 5.5}, timeout=10)
        assert wrong.status_code == 400
        error = operation["responses"]["400"]["content"]["application/json"]["schema"]
        validator(description, error).validate(wrong.json())


def route_field(route: Any) -> str:
    return next(iter(EXAMPLES[route.path]))


def test_the_page(server: Server, serve: Serve) -> None:
    assert "swagger" in requests.get(server.url + "/docs", timeout=5).text
    guarded = serve(api_keys=["k"])
    headers = {"Authorization": "Bearer k"}
    description = requests.get(guarded.url + "/openapi.json", headers=headers, timeout=5).json()
    assert description["security"] == [{"key": []}]
