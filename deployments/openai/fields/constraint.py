"""Request fields that constrain the text: OpenAI's response_format, vLLM's structured_outputs and older guided_*."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark
from pydantic import BeforeValidator, Field

from deployments.core.calls import Grammar
from deployments.core.errors import BadRequest, grammar_error, shown
from deployments.core.json_text.writer import JsonWriter
from deployments.openai.fields.fields import RequestObject, check_count
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import RESPONSE_FORMAT, STRUCTURED_OUTPUTS
from deployments.openai.fields.schema_keywords import check_keywords


class JsonSchemaFormat(RequestObject):
    """A schema that the answer follows, always strictly."""

    name: str | None = Field(default=None, description="Name of the schema; no effect.")
    description: str | None = Field(default=None, description="Description of the schema; no effect.")
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(default=None, description="Accepted; the schema is always enforced.")


class ResponseFormat(RequestObject):
    """What the answer's text is: anything, a JSON object, or JSON that follows a schema.

    The schema is in `json_schema`, as at OpenAI, or beside the type, as in llama.cpp and at Together.
    """

    foreign: ClassVar[Rows] = RESPONSE_FORMAT

    type: Literal["text", "json_object", "json_schema"] = Field(description="What the text is.")
    json_schema: JsonSchemaFormat | None = Field(default=None, description="The schema, with the type json_schema.")
    schema_: dict[str, Any] | bool | None = Field(
        default=None, alias="schema", description="The schema in this place, as in llama.cpp."
    )


def _few(value: object) -> object:
    if isinstance(value, list):
        check_count(value, _MAX_CHOICES)
    return value


Choices = Annotated[list[str], Field(fail_fast=True), BeforeValidator(_few)]


class StructuredOutputs(RequestObject):
    """One constraint on the text, in vLLM's names; `grammar` is Lark or GBNF."""

    foreign: ClassVar[Rows] = STRUCTURED_OUTPUTS

    json_: dict[str, Any] | str | None = Field(default=None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = Field(default=None, description="An expression that matches the whole text.")
    choice: Choices | None = Field(default=None, description="Texts, one of which is the answer.")
    grammar: str | None = Field(default=None, description="A grammar in Lark or GBNF.")
    json_object: bool | None = Field(default=None, description="The text is a JSON object.")


_MAX_SOURCE = 2**21
_MAX_CHOICES = 100_000
_LONG = 16_384
_VALIDATE = """
import llguidance, sys
source = llguidance.LLMatcher.grammar_from_json_schema(sys.stdin.read())
sys.stdout.write(llguidance.LLMatcher.validate_grammar(source, None))
"""


def schema_grammar(schema: Mapping[str, Any] | bool, param: str = "response_format") -> Grammar:
    """The constraint of a JSON schema.

    Raises:
        BadRequest: its text is too long, or a keyword is misspelt.
    """
    check_keywords(schema, param)
    return Grammar(kind="json_schema", source=_source(schema, param), param=param)


def _source(value: Any, param: str) -> str:
    text = JsonWriter(ascii=True).text(value, _MAX_SOURCE)
    if text is None:
        raise _too_long(param)
    return text


def _too_long(param: str) -> BadRequest:
    return BadRequest(f"Invalid {param!r}: a constraint has at most {_MAX_SOURCE} characters.", param=param)


@functools.lru_cache(maxsize=256)
def grammar_problem(source: str) -> str | None:
    """Why the JSON text of a schema cannot be expressed as a grammar; None if it can."""
    if len(source) > _LONG:
        return _problem(_validated_aside(source))
    return _llguidance_problem(LLMatcher.grammar_from_json_schema, source)


def _validated_aside(source: str) -> str:
    """The same in a process of its own: llguidance holds Python's lock for a good part of a second."""
    command = [sys.executable, "-c", _VALIDATE]
    ended = subprocess.run(command, input=source, capture_output=True, text=True, encoding="utf-8")
    return ended.stdout if ended.returncode == 0 else ended.stderr.strip().rpartition("\n")[2].partition(": ")[2]


def _llguidance_problem(read: Callable[[str], str], source: str) -> str | None:
    """Why llguidance cannot read a source or follow what it read; None if it can."""
    try:
        return _problem(str(LLMatcher.validate_grammar(read(source), None)))
    except (ValueError, RecursionError) as error:
        return _problem(str(error))


def _problem(text: str) -> str | None:
    return grammar_error(text) if text.strip() else None


def unfollowable(schema: Mapping[str, Any], param: str) -> str | None:
    """Why a JSON schema cannot be expressed as a grammar; None if it can.

    Raises:
        BadRequest: its text is too long, or a keyword is misspelt.
    """
    check_keywords(schema, param)
    return grammar_problem(_source(schema, param))


def constraint_problem(grammar: Grammar) -> str | None:
    """Why no text can be held to a constraint, as far as that is known without a model; None if it can."""
    if grammar.kind == "json_schema":
        return grammar_problem(grammar.source)
    if grammar.kind == "regex":
        try:
            re.compile(grammar.source)
        except (re.error, OverflowError, RecursionError) as error:
            # Rust's expressions have classes that Python's lack.
            return str(error) if _llguidance_problem(LLMatcher.grammar_from_regex, grammar.source) else None
    if grammar.kind == "lark":
        return _llguidance_problem(LLMatcher.grammar_from_lark, grammar.source)
    return None


def response_grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """The constraint of a response_format.

    Raises:
        BadRequest: the schema is missing, or does not go with the type.
    """
    if wanted is None:
        return None
    nested = wanted.json_schema.schema_ if wanted.json_schema is not None else None
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise _misplaced("json_schema", wanted.type, "it needs type json_schema")
    if wanted.type == "text" and wanted.schema_ is not None:
        raise _misplaced("schema", wanted.type, "it needs type json_schema or json_object")
    if nested is not None and wanted.schema_ is not None and nested != wanted.schema_:
        raise _misplaced("schema", wanted.type, "json_schema.schema is another one; send one of them")
    schema = wanted.schema_ if nested is None else nested
    if schema is not None:
        return schema_grammar(schema)
    if wanted.type == "json_schema":
        raise BadRequest(
            "Missing required field 'response_format.json_schema.schema'; send the schema, or type json_object.",
            param="response_format.json_schema",
            code="missing_required_parameter",
        )
    return None if wanted.type == "text" else Grammar(kind="json_object", source="")


def _misplaced(key: str, kind: str, why: str) -> BadRequest:
    param = f"response_format.{key}"
    return BadRequest(f"Invalid {param!r}: {why}; got type {kind}.", param=param)


def structured_grammar(wanted: StructuredOutputs | None) -> Grammar | None:
    """The constraint of structured_outputs.

    Raises:
        BadRequest: there is none, or there are several.
    """
    if wanted is None:
        return None
    grammar = _constraint(
        {
            "structured_outputs.json": wanted.json_,
            "structured_outputs.regex": wanted.regex,
            "structured_outputs.choice": wanted.choice,
            "structured_outputs.grammar": wanted.grammar,
            "structured_outputs.json_object": wanted.json_object or None,
        }
    )
    if grammar is None:
        raise BadRequest(
            "Invalid 'structured_outputs': it needs json, regex, choice, grammar or json_object; leave it out for text "
            "without a constraint.",
            param="structured_outputs",
        )
    return grammar


def guided_grammar(fields: Mapping[str, Any]) -> Grammar | None:
    """The constraint of guided_json, guided_regex, guided_choice and guided_grammar, of which one may be there."""
    return _constraint({name: fields.get(name) for name in _GUIDED})


_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def _constraint(given: Mapping[str, Any]) -> Grammar | None:
    """The constraint among fields of which one at most is not None; the last part of a field's name is its kind."""
    return only_one([_read(param, value) for param, value in given.items() if value is not None])


def _read(param: str, value: Any) -> Grammar:
    kind = param.removeprefix("structured_outputs.").removeprefix("guided_")
    if kind == "json":
        return schema_grammar(_schema(value, param), param)
    if kind == "choice":
        return _choice(value, param)
    if kind == "json_object":
        return Grammar(kind="json_object", source="", param=param)
    if len(value) > _MAX_SOURCE:
        raise _too_long(param)
    return Grammar(kind="regex", source=value, param=param) if kind == "regex" else _written_grammar(value, param)


def _written_grammar(text: str, param: str) -> Grammar:
    """A Lark grammar; one in GBNF (llama.cpp, `root ::= …`) is translated."""
    try:
        return Grammar(kind="lark", source=any_to_lark(text), param=param)
    except (GbnfToLarkError, RecursionError) as error:
        raise BadRequest(f"Invalid {param!r}: the GBNF grammar cannot be read: {error}", param=param) from None


def only_one(found: list[Grammar]) -> Grammar | None:
    """The constraint, if there is one.

    Raises:
        BadRequest: there are several.
    """
    if len(found) > 1:
        first, second = found[0].param, found[1].param
        raise BadRequest(
            f"Invalid {second!r}: a text can follow one constraint, and {first!r} is one already.", param=second
        )
    return found[0] if found else None


def _schema(given: Mapping[str, Any] | str, param: str) -> Mapping[str, Any] | bool:
    if not isinstance(given, str):
        return given
    if len(given) > _MAX_SOURCE:
        raise _too_long(param)
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
    return Grammar(kind="choice", source=_source(choices, param), param=param)
