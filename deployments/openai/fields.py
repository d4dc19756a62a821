"""Request fields: how a body becomes a schema's instance, and what is done with the keys it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from deployments.errors import BadRequest, UnsupportedParameter

MAX_WHOLE = 2**31 - 1
REQUEST_ID = r"[A-Za-z0-9._:/+=@-]{1,128}"
"""What a request may be called."""


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("input should be a number, not a boolean")
    return value


def _whole(value: object) -> object:
    _no_boolean(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _strings(value: object) -> object:
    """One string or a list of them as a list without empty ones."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or not all(isinstance(item, str) for item in values):
        raise ValueError("input should be a string or a list of strings")
    return [item for item in values if item]


Real = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_WHOLE)]
Strings = Annotated[list[str], BeforeValidator(_strings, json_schema_input_type=str | list[str])]
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_WHOLE, strict=True)]


class RequestBody(BaseModel):
    """A request's fields. Explicit nulls are taken as absent before validation.

    Attributes:
        bookkeeping: keys that are accepted and change nothing, because nothing of the answer depends on them.
        refused: keys that are known and cannot be honoured, each with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    bookkeeping: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    model: str = Field(default="", description="Id or alias of a configured model; may be left out where there is one.")


Body = TypeVar("Body", bound=RequestBody)


def parse_fields(
    schema: type[Body], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[Body, list[str]]:
    """A request's fields, and the keys among them that nobody knows.

    Args:
        given: the JSON object of the request.
        defaults: values for fields that the request leaves out.

    Raises:
        UnsupportedParameter: a known field asks for something that cannot be done.
        BadRequest: a field is missing or its value cannot be used.
    """
    present = {key: value for key, value in given.items() if value is not None}
    for key, neutral in schema.refused.items():
        if key in present and present[key] not in neutral:
            raise UnsupportedParameter(f"This server does not support {key!r}; leave it out.", param=key)
    known = schema.model_fields.keys() | schema.bookkeeping | schema.refused.keys()
    unknown = [key for key in present if key not in known]
    filled = {key: value for key, value in (defaults or {}).items() if key in schema.model_fields}
    try:
        return schema.model_validate({**filled, **present}), unknown
    except ValidationError as error:
        raise _bad_field(error) from error


def _bad_field(error: ValidationError) -> BadRequest:
    first = error.errors(include_url=False, include_context=False)[0]
    param = _dotted(first["loc"])
    if first["type"] == "missing":
        return BadRequest(f"Missing required field {param!r}; add it.", param=param, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    where = f"Invalid {param!r}" if param else "Invalid request"
    got = "" if isinstance(first["input"], dict) and not param else f"; got {shown(first['input'])}"
    return BadRequest(f"{where}: {reason}{got}.", param=param or None)


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        if step == "[key]":  # pydantic's name for a key itself, after the key
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def shown(value: object) -> str:
    """A value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
