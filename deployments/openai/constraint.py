"""Request fields that constrain the text: OpenAI's response_format, vLLM's structured_outputs and older guided_*."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import BadRequest, UnsupportedParameter
from deployments.messages import Grammar
from deployments.openai.fields import shown


class JsonSchemaFormat(BaseModel):
    """A schema that the answer follows, always strictly."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """What the answer's text is: anything, a JSON object, or JSON that follows a schema."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(BaseModel):
    """One constraint on the text, in vLLM's names; `grammar` is a Lark grammar."""

    model_config = ConfigDict(extra="ignore")

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


def schema_grammar(schema: Mapping[str, Any] | bool) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(schema, separators=(",", ":")))


def response_grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """The constraint of a response_format.

    Raises:
        BadRequest: the schema is missing.
    """
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar(kind="json_object", source="")
    schema = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    if schema is None:
        raise BadRequest(
            "Missing required field 'response_format.json_schema.schema'; send the schema, or type json_object.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    return schema_grammar(schema)


def structured_grammar(wanted: StructuredOutputs | None) -> Grammar | None:
    """The constraint of structured_outputs.

    Raises:
        BadRequest: there are several, or one of a kind that cannot be followed.
    """
    if wanted is None:
        return None
    for name in ("structural_tag", "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"):
        if getattr(wanted, name):
            raise UnsupportedParameter(
                f"This server does not support 'structured_outputs.{name}'; leave it out.",
                param=f"structured_outputs.{name}",
            )
    found: list[Grammar] = []
    if wanted.json_ is not None:
        found.append(schema_grammar(_schema(wanted.json_, "structured_outputs.json")))
    if wanted.regex is not None:
        found.append(Grammar(kind="regex", source=wanted.regex))
    if wanted.choice is not None:
        found.append(_choice(wanted.choice, "structured_outputs.choice"))
    if wanted.grammar is not None:
        found.append(Grammar(kind="lark", source=wanted.grammar))
    if wanted.json_object:
        found.append(Grammar(kind="json_object", source=""))
    return only_one(found, "structured_outputs")


def guided_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The constraint of guided_json, guided_regex, guided_choice and guided_grammar, of which one may be there."""
    found: list[Grammar] = []
    if (schema := fields.get("guided_json")) is not None:
        found.append(schema_grammar(_schema(schema, "guided_json")))
    if (pattern := fields.get("guided_regex")) is not None:
        found.append(Grammar(kind="regex", source=pattern))
    if (choices := fields.get("guided_choice")) is not None:
        found.append(_choice(choices, "guided_choice"))
    if (grammar := fields.get("guided_grammar")) is not None:
        found.append(Grammar(kind="lark", source=grammar))
    return only_one(found, "guided_json")


def only_one(found: list[Grammar], param: str) -> Grammar | None:
    """The constraint, where there is one."""
    if len(found) > 1:
        kinds = ", ".join(grammar.kind for grammar in found)
        raise BadRequest(f"Invalid {param!r}: a text can follow one constraint; got {kinds}.", param=param)
    return found[0] if found else None


def _schema(given: Mapping[str, Any] | str, param: str) -> Mapping[str, Any] | bool:
    if not isinstance(given, str):
        return given
    try:
        schema = json.loads(given)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict | bool):
        raise BadRequest(f"Invalid {param!r}: input should be a JSON schema; got {shown(given)}.", param=param)
    return schema


def _choice(choices: list[str], param: str) -> Grammar:
    if not choices or not all(choices):
        raise BadRequest(f"Invalid {param!r}: input should be a list of texts, none of them empty.", param=param)
    return Grammar(kind="choice", source=json.dumps(choices))
