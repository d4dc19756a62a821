"""Request fields: validating a body against a schema, and handling keys that the schema does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import replace
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from deployments.config.explain import Fault, read_faults
from deployments.core.errors import BadRequest
from deployments.openai.fields.other_servers import Rows, Scope, Settled

MAX_WHOLE = 2**31 - 1
MAX_STRINGS = 1024
REQUEST_ID = r"[A-Za-z0-9._:/+=@-]{1,128}"
"""What a request may be called."""
_PART = 1000
_LEAST, _MOST = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def _no_boolean(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("input should be a number, not a boolean")
    return value


def _whole(value: object) -> object:
    _no_boolean(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _in_float32(value: float) -> float:
    if value and not _LEAST <= abs(value) <= _MOST:
        raise ValueError("input should be a number that float32 holds: 0, or between 1.2e-38 and 3.4e38 in size")
    return value


def _random_seed(value: object) -> object:
    """As in vLLM and llama.cpp, -1 asks for fresh randomness. Other negative numbers are seeds like positive ones."""
    return None if not isinstance(value, bool) and value in (-1, "-1") else value


def _strings(value: object) -> object:
    """One string or a list of them as a list without empty ones."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple):
        raise ValueError("input should be a string or a list of strings")
    check_count(values, MAX_STRINGS)
    if not all(isinstance(item, str) for item in values):
        raise ValueError("input should be a string or a list of strings")
    return [item for item in values if item]


def check_count(values: Sized, most: int) -> None:
    """Refuse too many values before pydantic looks at them, which it does with Python's lock held.

    Raises:
        ValueError: there are more than `most`.
    """
    if len(values) > most:
        raise ValueError(f"input should have at most {most} items, not {len(values)}")


def one_of(kinds: Mapping[type, Any], words: str) -> BeforeValidator:
    """A check before a union, for errors that name the field and what is wrong in the member that was meant.

    Args:
        kinds: the member that a value of each JSON type means.
        words: what the members are, for values of other types.
    """
    readers = {kind: TypeAdapter(member) for kind, member in kinds.items()}

    def read(value: object) -> object:
        if isinstance(value, BaseModel):
            return value
        reader = next((reader for kind, reader in readers.items() if isinstance(value, kind)), None)
        if reader is None:
            raise ValueError(f"input should be {words}")
        return reader.validate_python(value)

    return BeforeValidator(read)


Real = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False), AfterValidator(_in_float32)]
Whole = Annotated[int, BeforeValidator(_whole)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MAX_WHOLE)]
Seed = Annotated[Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None, BeforeValidator(_random_seed)]
Alternatives = Annotated[
    int, BeforeValidator(_whole), Field(ge=-1, le=MAX_WHOLE, description="Tokens to report beside each; -1 for all.")
]
Strings = Annotated[list[str], BeforeValidator(_strings, json_schema_input_type=str | list[str])]
RequestId = Annotated[str, Field(pattern=f"^{REQUEST_ID}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_WHOLE, strict=True)]


def is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_WHOLE


def _token_ids(value: object, validate: ValidatorFunctionWrapHandler) -> Any:
    """A long list is checked here: pydantic holds Python's lock for all of it, and makes an error of every wrong id."""
    if not isinstance(value, list) or len(value) <= _PART:
        return validate(value)
    wrong = next((index for index, item in enumerate(value) if not is_token_id(item)), None)
    return value if wrong is None else validate(value[: wrong + 1])


IdList = Annotated[list[TokenId], WrapValidator(_token_ids)]


class RequestObject(BaseModel):
    """A request's fields, or those of an object in it. Explicit nulls count as absent.

    Attributes:
        foreign: what is done with keys that are not fields; see `foreign_fields`.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), populate_by_name=True)

    foreign: ClassVar[Rows] = {}


class RequestBody(RequestObject):
    """The fields that all requests have."""

    computes: ClassVar[bool] = True
    """Whether the model computes states for the answer, or only its tokenizer is asked."""

    model: str = Field(
        default="", description="Id or alias of a configured model; optional if there is only one model."
    )

    _settled: Settled = PrivateAttr(default_factory=Settled)

    @property
    def settled(self) -> Settled:
        """The request's keys as they were sent, translated to fields."""
        return self._settled


class TurnFields(RequestBody):
    """Fields that decide when a request begins, if it has to wait; see `deployments/engine/base/turns.py`."""

    priority: Annotated[Whole, Field(ge=-MAX_WHOLE, le=MAX_WHOLE)] = Field(
        default=0, description="A request with a lower one begins earlier; above 0 it leaves room for the others."
    )
    user: str | None = Field(
        default=None, description="Who asks: users take turns. The header x-session-affinity overrides it."
    )


Body = TypeVar("Body", bound=RequestBody)


def parse_fields(
    schema: type[Body], given: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> tuple[Body, list[str]]:
    """A request's fields, and the places of its unknown keys.

    Args:
        given: the JSON object of the request.
        defaults: values for fields that the request leaves out. Those that this schema does not take are not used.

    Raises:
        UnsupportedParameter: a known key asks for something that cannot be done.
        BadRequest: a field is missing, a value cannot be used, or a key is nearly a known one.
    """
    settled = settle(schema, given)
    filled = {key: value for key, value in (defaults or {}).items() if key in schema.model_fields}
    for group in _ALTERNATIVES:
        if group & settled.fields.keys():
            filled = {key: value for key, value in filled.items() if key not in group}
    try:
        body = _validated(schema, filled, settled.fields)
    except ValidationError as error:
        raise settled.as_sent(bad_field(error)) from error
    body._settled = settled
    return body, settled.unknown


# A request that sends one of these leaves out no other one.
_ALTERNATIVES = (
    frozenset({"max_tokens", "max_completion_tokens"}),
    frozenset({"response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice"})
    | {"guided_grammar"},
)


def _validated(schema: type[Body], filled: Mapping[str, Any], fields: Mapping[str, Any]) -> Body:
    try:
        return schema.model_validate({**filled, **fields})
    except ValidationError as error:
        # A default may be meant for a route on which the field has another type: logprobs is a number or a boolean.
        wrong = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]} & filled.keys() - fields.keys()
        if not wrong:
            raise
        return schema.model_validate({**{k: v for k, v in filled.items() if k not in wrong}, **fields})


def settle(schema: type[RequestObject], given: Mapping[str, Any], place: str = "") -> Settled:
    """The keys of a request, and of the objects in it, that are fields of the schema or become some.

    Args:
        place: of the object in the request, such as `response_format.`.

    Raises:
        UnsupportedParameter: a known key asks for something that cannot be done.
        BadRequest: a key is nearly a known one, or two keys ask for different values of one field.
    """
    settled = Settled()
    settled.apply(given, scope_of(schema), place)
    for name, part in _parts(schema).items():
        value = settled.fields.get(name)
        if isinstance(value, Mapping):
            inner = settle(part, value, f"{settled.sent.get(name, place + name)}.")
            settled.fields[name] = inner.fields
            settled.unknown += inner.unknown
            settled.sent.update({f"{name}.{key}": shown for key, shown in inner.sent.items()})
    return settled


@cache
def scope_of(schema: type[RequestObject]) -> Scope:
    """The keys that a schema's object may have."""
    return Scope(schema.foreign, (field.alias or name for name, field in schema.model_fields.items()))


@cache
def _parts(schema: type[RequestObject]) -> dict[str, type[RequestObject]]:
    """The schemas of fields that are objects."""
    return {
        field.alias or name: part for name, field in schema.model_fields.items() for part in _objects(field.annotation)
    }


def _objects(annotation: Any) -> Iterator[type[RequestObject]]:
    if isinstance(annotation, type) and issubclass(annotation, RequestObject):
        yield annotation
    for argument in get_args(annotation):
        yield from _objects(argument)


def _of_any_member(faults: list[Fault]) -> Fault:
    """The first fault; that of a value which is none of several types says all of them, under the field's own name."""
    first = faults[0]
    if len(first.path) < 2 or not _is_type(first.path[-1]):
        return first
    members = [fault for fault in faults if fault.path[:-1] == first.path[:-1] and _is_type(fault.path[-1])]
    wanted = dict.fromkeys(fault.reason.removeprefix("input should be ") for fault in members)
    reason = "input should be " + " or ".join(wanted) if len(wanted) > 1 else first.reason
    return replace(first, path=first.path[:-1], place=first.place.rpartition(".")[0], reason=reason)


def _is_type(step: int | str) -> bool:
    """Whether a step of a place is pydantic's name of a type that the value could have had."""
    return isinstance(step, str) and (step in ("str", "int", "float", "bool") or step.startswith(("list[", "dict[")))


def bad_field(error: ValidationError, field: str | None = None) -> BadRequest:
    """The first fault of a validation, or the first of a field, for the client."""
    faults = [fault for fault in read_faults(error) if field is None or fault.path[:1] == (field,)]
    first = _of_any_member(faults)
    param = first.place
    if first.missing:
        return BadRequest(f"Missing required field {param!r}; add it.", param=param, code="missing_required_parameter")
    if not param:
        return BadRequest(f"Invalid request: {first.reason}.")
    return BadRequest(f"Invalid {param!r}: {first.reason}; got {first.got}.", param=param)
