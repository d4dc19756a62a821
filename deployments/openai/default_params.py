"""The check of `api.default_params` at start: what a request could not send is not a default either."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from deployments.config.api import ApiOptions
from deployments.core.calls import Grammar
from deployments.core.errors import BadRequest, TroupeError
from deployments.openai.chat.prompt import ChatInput, check_template_fields
from deployments.openai.chat.schema import ChatBody
from deployments.openai.chat.tools import read_tools
from deployments.openai.completions.schema import CompletionBody
from deployments.openai.embeddings import EmbeddingsBody
from deployments.openai.fields.constraint import constraint_problem
from deployments.openai.fields.fields import RequestBody, bad_field, scope_of, settle
from deployments.openai.fields.objects import objects_of, unread_keys
from deployments.openai.fields.other_servers import Means, Refused, Spread, nearest
from deployments.openai.fields.sampling import check_choices, check_logprobs
from deployments.openai.responses.schema import ResponsesBody
from deployments.openai.scores.schema import DecisionsBody, ScoreBody
from deployments.openai.transcriptions.schema import TranscriptionBody, TranslationBody

_SCHEMAS: tuple[type[RequestBody], ...] = (
    *(ChatBody, CompletionBody, ResponsesBody, EmbeddingsBody),
    *(ScoreBody, DecisionsBody, TranscriptionBody, TranslationBody),
)
# What a request is about cannot be left out of it.
_OF_A_REQUEST = frozenset(
    {"model", "messages", "prompt", "prompts", "input", "file", "questions", "choices", "stream"}
    | {"request_id", "uuid"}
)


def default_faults(
    params: Mapping[str, Any], options: ApiOptions, *, more: tuple[type[RequestBody], ...] = ()
) -> list[str]:
    """What is wrong with a model's defaults: the key, and a sentence.

    A value is right if a route takes it; it is not used on routes on which the field has another type.

    Args:
        more: schemas of routes that are not in `deployments.openai`.
    """
    schemas = (*_SCHEMAS, *more)
    faults = [(key, fault) for key, value in params.items() if (fault := _fault(key, value, schemas)) is not None]
    return [f"default_params.{key}: {fault}" for key, fault in faults or _together(params, options)]


def _fault(key: str, value: Any, schemas: tuple[type[RequestBody], ...]) -> str | None:
    if key in _OF_A_REQUEST:
        return "a request sets this itself; remove it"
    own = [schema for schema in schemas if key in scope_of(schema).own]
    if not own:
        return _unknown(key, schemas)
    found = [_wrong(schema, key, value) for schema in own]
    return None if None in found else found[0]


def _unknown(key: str, schemas: tuple[type[RequestBody], ...]) -> str:
    for schema in schemas:
        row = schema.foreign.get(key)
        if isinstance(row, Means):
            return f"another server's field; this server has {row.target}"
        if isinstance(row, Refused):
            return "not supported by this server; remove it"
        if isinstance(row, Spread):
            return "write its keys in its place"
        if row is not None:
            return "has no effect on an answer; remove it"
    close = nearest(key, frozenset[str]().union(*(scope_of(schema).own for schema in schemas)))
    return "unknown request field" + (f" (did you mean {close!r}?)" if close else "")


def _wrong(schema: type[RequestBody], key: str, value: Any) -> str | None:
    """Why a schema does not take a field's value; None if it does."""
    try:
        settled = settle(schema, {key: value})
        if settled.unknown:
            return f"unknown key {settled.unknown[0]!r}"
        schema.model_validate(settled.fields)
    except TroupeError as error:
        return error.message
    except ValidationError as error:
        # Fields that are missing are those of a request.
        if any(fault["loc"][:1] == (key,) and fault["type"] != "missing" for fault in error.errors()):
            return bad_field(error, key).message
    return None


def _together(params: Mapping[str, Any], options: ApiOptions) -> list[tuple[str, str]]:
    """Values that do not go with each other, or are more than the server's limits."""
    fitting = {key: value for key, value in params.items() if key in ChatBody.model_fields}
    fitting = {key: value for key, value in fitting.items() if _wrong(ChatBody, key, value) is None}
    body = ChatBody.model_validate({"messages": [], **settle(ChatBody, fitting).fields})
    given = (
        params.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_output_len")
    )
    limit = min((int(value) for value in given if value is not None), default=None)
    try:
        check_choices(body.n, options)
        check_logprobs("top_logprobs", body.top_logprobs, options)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        _check_grammar(body.sampling(options, max_tokens=limit, logprobs=logprobs).grammar)
        if body.tools or (isinstance(body.tool_choice, str) and body.tool_choice != "required"):
            unread_keys(objects_of({"tools": body.tools}), "")
            read_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
        check_template_fields(ChatInput.from_fields(body, body.messages), options)
    except TroupeError as error:
        return [(re.split(r"[.\[]", error.param or "")[0], error.message)]
    return []


def _check_grammar(grammar: Grammar | None) -> None:
    """Refuse a constraint that no answer can be held to."""
    problem = None if grammar is None else constraint_problem(grammar)
    if grammar is not None and problem is not None:
        raise BadRequest(f"Invalid {grammar.param!r}: {problem}", param=grammar.param)
