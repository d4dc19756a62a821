"""Keywords of JSON schemas: a misspelt one would hold nothing, since a schema may have keywords of its own."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

from llguidance import LLMatcher

from deployments.core.errors import BadRequest, shown
from deployments.openai.fields.other_servers import nearest

DATA = frozenset({"const", "default", "enum", "example", "examples"})
"""Keywords whose values are data, not schemas."""
NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"})
"""Keywords whose values are schemas by name."""
_SCHEMAS = frozenset(
    {"items", "additionalItems", "prefixItems", "unevaluatedItems", "contains", "contentSchema", "propertyNames"}
    | {"additionalProperties", "unevaluatedProperties", "not", "if", "then", "else", "allOf", "anyOf", "oneOf"}
)
_KEYWORDS = (
    frozenset({"type", "format", "pattern", "required", "title", "description", "multipleOf", "uniqueItems", "xml"})
    | {"maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum", "maxLength", "minLength", "maxItems", "minItems"}
    | {"maxContains", "minContains", "maxProperties", "minProperties", "dependentRequired", "deprecated", "readOnly"}
    | {"writeOnly", "contentEncoding", "contentMediaType", "nullable", "discriminator", "externalDocs", "id"}
    | {"$ref", "$id", "$schema", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"}
    | {"$vocabulary", "$comment"}
    | DATA
    | NAMED
    | _SCHEMAS
)
# Names of three letters are too easily those of something else: `note`, `ids`.
_SPELLED = frozenset(keyword for keyword in _KEYWORDS if len(keyword) > 3)


TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_LONG = 1000


def check_keywords(schema: Mapping[str, Any] | bool, param: str) -> None:
    """Refuse a schema with a keyword that is nearly one of JSON Schema's, an unknown type, or an expression that cannot
    be followed.

    Raises:
        BadRequest: it names the keyword, its place in the schema and what it may be.
    """
    left: list[tuple[str, Any]] = [("", schema)]
    while left:
        place, each = left.pop()
        if isinstance(each, list):
            left += [(f"{place}[{index}]", item) for index, item in enumerate(each)]
        elif isinstance(each, Mapping):
            for key in each.keys() - _KEYWORDS:
                if (close := nearest(key, _SPELLED)) is not None:
                    name = f"{place}.{key}".removeprefix(".")[:200]
                    raise BadRequest(
                        f"Invalid {param!r}: the schema has the unknown keyword {name!r}; did you mean {close!r}?",
                        param=param,
                    )
            _check_values(place, each, param)
            left += _within(place, each)


def _check_values(place: str, schema: Mapping[str, Any], param: str) -> None:
    kinds = schema.get("type")
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if isinstance(kind, str) and kind not in TYPES:
            close = nearest(kind, frozenset(TYPES))
            meant = f"did you mean {close!r}?" if close else f"the types are {', '.join(TYPES)}."
            name = f"{place}.type".removeprefix(".")[:200]
            raise BadRequest(
                f"Invalid {param!r}: the schema has the unknown type {shown(kind)} at {name!r}; {meant}", param=param
            )
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and len(pattern) <= _LONG and (problem := _pattern_problem(pattern)) is not None:
        name = f"{place}.pattern".removeprefix(".")[:200]
        raise BadRequest(
            f"Invalid {param!r}: the expression {shown(pattern)} at {name!r} cannot be followed: {problem}.",
            param=param,
        )


@functools.lru_cache(maxsize=1024)
def _pattern_problem(pattern: str) -> str | None:
    """Why texts cannot be held to a regular expression; None if they can."""
    try:
        source = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))
        found = str(LLMatcher.validate_grammar(source, None)).strip()
    except (ValueError, RecursionError) as error:
        found = str(error).strip()
    return found.splitlines()[-1].removeprefix("error: ")[:300] if found else None


def _within(place: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas within one, and their places."""
    for key in schema.keys() & (NAMED | _SCHEMAS):
        value, where = schema[key], f"{place}.{key}"
        if key in _SCHEMAS:
            yield where, value
        elif isinstance(value, Mapping):
            yield from ((f"{where}.{name}", named) for name, named in value.items())
