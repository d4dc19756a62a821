"""Bare text as the types of a schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.openai.parsing.typed import dumps, typed

NOTE = {"$defs": {"Note": {"type": ["string", "null"]}, "Box": {"type": "object"}, "a/b": {"type": "integer"}}}
OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}


def read(schema: Any, text: str, **root: Any) -> Any:
    return typed(text, "v", {"properties": {"v": schema}, **root})


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "123", "123"),
        ({"type": "string"}, " null\n", " null\n"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        (OPTIONAL, "123", "123"),
        (OPTIONAL, "true", "true"),
        (OPTIONAL, "null", None),
        (OPTIONAL, "None", None),
        (OPTIONAL, "[1]", "[1]"),
        ({"type": ["string", "null"]}, "0150", "0150"),
        ({"type": "string", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "5", "5"),
        ({"oneOf": [{"type": "string"}]}, "5", "5"),
        ({"oneOf": [{"const": "5"}, {"const": "6"}]}, "5", "5"),
        ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "5", "5"),
        ({"allOf": [{"type": ["string", "integer"]}, {"type": "string"}]}, "5", "5"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": ["1", "2"]}, "\n1\n", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"enum": ["on", 1, None]}, "null", None),
        ({"enum": ["on", 1, None]}, "1", 1),
        ({"enum": ["1", 1]}, "1", 1),
        ({"const": "7"}, "7", "7"),
        ({"const": True}, "True", True),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "140.0", 140),
        ({"type": "integer"}, "0150", "0150"),
        ({"type": "integer"}, "soon", "soon"),
        ({"type": "number"}, "5", 5),
        ({"type": "number"}, "-6.25e1", -62.5),
        ({"type": ["integer", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "5", 5),
        ({"type": ["integer", "string"]}, "0150", "0150"),
        ({"type": ["boolean", "string"]}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "1", "1"),
        ({"type": "null"}, "None", None),
        ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
        ({"type": "object"}, "{'a': true, 'b': null}", {"a": True, "b": None}),
        ({"type": "object"}, "{a: 1}", {"a": 1}),
        ({"type": "object"}, "{'a'", "{'a'"),
        ({"type": "array"}, "['x', (1, 2)]", ["x", [1, 2]]),
        ({"type": "array"}, "{1, 2}", "{1, 2}"),
        ({"type": "array"}, "[b'x']", "[b'x']"),
        ({"type": "array"}, '["x"]', ["x"]),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, '{"a": 1}', {"a": 1}),
        ({"anyOf": [{"type": "object"}, {"type": "string"}]}, "{'a': 1}", "{'a': 1}"),
        ({"$ref": "#/$defs/Note"}, "12", "12"),
        ({"$ref": "#/$defs/Note"}, "null", None),
        ({"$ref": "#/$defs/Box"}, '{"a": 1}', {"a": 1}),
        ({"$ref": "#/$defs/a~1b"}, "12", 12),
        ({"$ref": "#/$defs/none"}, "12", "12"),
        ({"anyOf": [{"$ref": "#/$defs/Note"}, {"$ref": "#/$defs/Box"}]}, "1", "1"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "number"}, "-Infinity", "-Infinity"),
        ({"type": "number"}, "1e999", "1e999"),
        ({"type": "file"}, "12", "12"),
        ({"not": {"type": "string"}}, "12", 12),
        ({"not": {"type": ["string", "null"]}}, "soon", "soon"),
        ({"not": {"const": 5}}, "12", "12"),
        ({}, "12", "12"),
        (True, "[1]", [1]),
        (None, '{"a": 1}', {"a": 1}),
        (None, "true", "true"),
        (None, "null", "null"),
    ],
)
def test_values(schema: Any, text: str, value: Any) -> None:
    found = read(schema, text, **NOTE)
    assert (found, type(found)) == (value, type(value))


def test_a_schema_that_refers_to_itself_ends() -> None:
    assert read({"$ref": "#/properties/v"}, "12") == "12"
    assert read({"$ref": "#"}, "12") == "12"


def test_properties_that_a_pattern_names() -> None:
    schema = {"patternProperties": {"^n_": {"type": "integer"}, "(": {"type": "null"}}}
    assert [typed("12", key, schema) for key in ("n_a", "a")] == [12, "12"]


def test_where_properties_are_found() -> None:
    number = {"type": "integer"}
    for root in (
        {"allOf": [{"properties": {"w": number}}]},
        {"anyOf": [{"properties": {}}, {"properties": {"w": number}}]},
        {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"w": number}}}},
        {"additionalProperties": number},
    ):
        assert typed("5", "w", root) == 5
    assert typed("5", "w", {}) == "5"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_arguments_are_always_json(value: Any) -> None:
    def never(name: str) -> None:
        raise AssertionError(name)

    assert set(json.loads(dumps({"v": value}), parse_constant=never)) == {"v"}


@given(
    JSON.filter(lambda value: "NaN" not in json.dumps(value)),
    st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array", None]),
)
def test_a_text_is_never_lost(value: Any, kind: str | None) -> None:
    text = json.dumps(value)
    found = read({} if kind is None else {"type": kind}, text)
    assert found == text or json.loads(json.dumps(found)) == value or found is None
    dumps({"v": found})
