"""Request fields for the inside of a model: `capture` and `interventions`."""

from __future__ import annotations

import base64
import binascii
import json
import math
from array import array
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from deployments.config.explain import nearest
from deployments.core.calls import Capture, Intervention, Positions, Vector, Window
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.core.model_card import ModelCard
from deployments.openai.fields.fields import Real, RequestBody, Whole, one_of

INSIDE_HEADER = "x-troupe-inside"
MOST_BYTES = 16 << 20
_MOST_NUMBERS = 16384
_MOST_POSITIONS = 65536
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
Index = Annotated[Whole, Field(ge=-(2**31), lt=2**31)]
MOST_LETTERS = 512
"""Of the pattern of a module's name."""
Pattern = Annotated[str, Field(min_length=1, max_length=MOST_LETTERS)]


def _unknown_key(key: str, known: list[str]) -> PydanticCustomError:
    return PydanticCustomError("unknown_key", "there is no such key{meant}", {"meant": nearest(key, known)})


class _Strict(BaseModel):
    # A misspelt key must not leave a model unchanged in silence.
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _knows_its_keys(cls, given: Any) -> Any:
        known = [field.alias or name for name, field in cls.model_fields.items()]
        if not isinstance(given, dict):
            return given
        faults: list[InitErrorDetails] = [
            {"type": _unknown_key(str(key)[:100], known), "loc": (str(key)[:100],), "input": value}
            for key, value in given.items()
            if key not in known
        ]
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults[:1])
        return {key: value for key, value in given.items() if value is not None}


class PositionWindow(_Strict):
    """Positions `from` to before `to`, of the prompt or of the generated tokens."""

    start: Index = Field(default=0, alias="from", description="The first position; negative counts from the end.")
    end: Index | None = Field(default=None, alias="to", description="The position after the last; none is the end.")
    of: Literal["prompt", "generated"] = Field(default="prompt", description="What the positions count.")


Word = Literal["last_prompt", "prompt", "generated", "all"]
PositionList = Annotated[list[Index], Field(min_length=1, max_length=_MOST_POSITIONS)]
AskedPositions = Annotated[
    Word | PositionList | PositionWindow,
    one_of(
        {str: Word, list: PositionList, dict: PositionWindow},
        "last_prompt, prompt, generated, all, a list of whole numbers, or an object with from, to and of",
    ),
]


def _positions(asked: AskedPositions) -> Positions:
    if isinstance(asked, PositionWindow):
        return Window(start=asked.start, end=asked.end, of=asked.of)
    return asked if isinstance(asked, str) else tuple(asked)


class CaptureFields(_Strict):
    """States to capture."""

    modules: list[Pattern] = Field(
        min_length=1, max_length=64, description="Patterns of module names.", examples=[["model.layers.{1,3}"]]
    )
    positions: AskedPositions = Field(default="last_prompt", description="The tokens whose states are captured.")
    dtype: Literal["native", "float32", "float16"] = Field(default="native", description="Of the tensors.")
    returned: Literal["handle", "inline"] = Field(
        default="handle", alias="return", description="A handle of a file, or the file itself as base64."
    )

    def read(self) -> Capture:
        """As the engine gets it."""
        return Capture(
            modules=tuple(self.modules),
            positions=_positions(self.positions),
            dtype=self.dtype,
            inline=self.returned == "inline",
        )


class VectorFields(_Strict):
    """Numbers: an uploaded vector, one of the loader's, or base64 data."""

    id: str | None = Field(default=None, max_length=100, description="Of a vector sent to /v1/vectors.")
    name: str | None = Field(default=None, max_length=200, description="Of a vector of the loader.")
    dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="Of data.")
    shape: list[Annotated[Whole, Field(ge=1)]] | None = Field(
        default=None, min_length=1, max_length=2, description="Of data: [width], or [positions or modules, width]."
    )
    data: str | None = Field(default=None, description="Little-endian numbers, as base64.")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = [name for name in ("id", "name", "data") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("input should have one of id, name and data")
        if self.data is not None and self.shape is None:
            raise ValueError("data needs its shape")
        return self

    def read(self, place: str) -> Vector:
        """As the engine gets it.

        Raises:
            BadRequest: the data do not fit the shape.
        """
        if self.data is None:
            return Vector(id=self.id or "", name=self.name or "")
        try:
            data = base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError):
            raise _bad_vector(place, "its data should be base64") from None
        shape = tuple(self.shape or ())
        wanted = math.prod(shape) * _SIZES[self.dtype]
        if len(data) != wanted:
            raise _bad_vector(place, f"shape {list(shape)} of {self.dtype} takes {wanted} bytes, not {len(data)}")
        return Vector(data=data, dtype=self.dtype, shape=shape)


Span = Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=2, max_length=2)]
Numbers = Annotated[list[Real], Field(min_length=1, max_length=_MOST_NUMBERS)]


AskedVector = Annotated[
    VectorFields | Numbers,
    one_of({list: Numbers, dict: VectorFields}, "a list of numbers, or an object with id, name, or shape and data"),
]


class InterventionFields(_Strict):
    """A change of what a module gives, or of what it is given."""

    module: Pattern = Field(description="Pattern of module names.", examples=["model.layers.2"])
    op: Literal["add", "scale", "zero", "set", "clamp", "hook"] = Field(description="What is done.")
    vector: AskedVector | None = Field(default=None, description="For add, set and clamp.")
    scale: Real = Field(default=1.0, description="Factor of add and scale.")
    norm_match: bool = Field(default=False, description="Bring the vector of add to the norm of the state first.")
    positions: AskedPositions = Field(default="all", description="The tokens whose states are changed.")
    features: list[Span] | None = Field(
        default=None, min_length=1, max_length=1024, description="Columns to change, as ranges [start, end)."
    )
    value: Real | None = Field(default=None, description="What clamp brings the coordinate to.")
    min: Real | None = Field(default=None, description="Lower bound of clamp.")
    max: Real | None = Field(default=None, description="Upper bound of clamp.")
    name: str | None = Field(default=None, min_length=1, max_length=200, description="Of the loader's hook, for hook.")
    args: Any = Field(default_factory=dict, description="Arguments of the hook.")

    @model_validator(mode="after")
    def _fits_its_op(self) -> Self:
        needs = {"add": "vector", "set": "vector", "hook": "name", "scale": "scale"}.get(self.op)
        if needs is not None and (needs not in self.model_fields_set or getattr(self, needs) is None):
            raise ValueError(f"op {self.op} needs {needs}")
        if self.op == "clamp" and self.value is None and self.min is None and self.max is None:
            raise ValueError("op clamp needs value, min or max")
        if self.op == "clamp" and self.vector is None and self.features is None:
            raise ValueError("op clamp needs vector or features")
        for name in self.model_fields_set - {"module", "op", "positions"}:
            if name not in _OF_OP[self.op] and getattr(self, name) is not None:
                raise ValueError(f"op {self.op} does not read {name}; leave it out")
        if self.value is not None and (self.min is not None or self.max is not None):
            raise ValueError("clamp takes value, or min and max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError("min should not be above max")
        return self

    def read(self, place: str) -> Intervention:
        """As the engine gets it.

        Raises:
            BadRequest: the vector cannot be read.
        """
        vector = self.vector
        if isinstance(vector, list):
            read: Vector | None = Vector(data=_little_endian(vector), shape=(len(vector),))
        else:
            read = None if vector is None else vector.read(f"{place}.vector")
        return Intervention(
            module=self.module,
            op=self.op,
            vector=read,
            scale=self.scale,
            norm_match=self.norm_match,
            positions=_positions(self.positions),
            features=None if self.features is None else tuple((start, end) for start, end in self.features),
            value=self.value,
            min=self.min,
            max=self.max,
            name=self.name or "",
            args=json.dumps(self.args, sort_keys=True),
        )


_OF_OP = {
    "add": {"vector", "scale", "norm_match", "features"},
    "scale": {"scale", "features"},
    "zero": {"features"},
    "set": {"vector", "features"},
    "clamp": {"vector", "features", "value", "min", "max"},
    "hook": {"name", "args"},
}


class TensorShape(TypedDict):
    shape: list[int]
    dtype: str


class CaptureHandle(TypedDict):
    """Where the captured states of a choice are; `data` in the place of `url` and `expires` if they are inline."""

    id: str
    url: NotRequired[str]
    bytes: int
    expires: NotRequired[int]
    positions: list[int]
    tensors: dict[str, TensorShape]
    data: NotRequired[str]


def capture_handle(handle: Mapping[str, Any]) -> CaptureHandle:
    """What a model answers as the object of a choice."""
    return cast(CaptureHandle, dict(handle))


def read_interventions(given: list[InterventionFields]) -> tuple[Intervention, ...]:
    """The interventions of a request, in order.

    Raises:
        BadRequest: a vector cannot be read, or all of them are too large.
    """
    found = tuple(each.read(f"interventions[{index}]") for index, each in enumerate(given))
    size = sum(len(each.vector.data) for each in found if each.vector is not None)
    if size > MOST_BYTES:
        raise _bad_vector("interventions", f"its vectors have {size} bytes; send at most {MOST_BYTES}")
    return found


def inside_header(capture: Capture | None, interventions: tuple[Intervention, ...]) -> dict[str, str]:
    """The response header that says what was read; none for most requests."""
    if capture is None and not interventions:
        return {}
    captured = 0 if capture is None else len(capture.modules)
    return {INSIDE_HEADER: f"captured={captured} interventions={len(interventions)}"}


def _little_endian(numbers: list[float]) -> bytes:
    values = array("f", numbers)
    if array("H", [1]).tobytes() != b"\x01\x00":
        values.byteswap()
    return values.tobytes()


def _bad_vector(place: str, reason: str) -> BadRequest:
    return BadRequest(f"Invalid {place!r}: {reason}.", param=place, code="vector_shape")


NEVER_LEFT_OUT = frozenset({"capture", "interventions"})
"""Defaults that a request either has or is refused for."""


def check_variant(schema: type[RequestBody], card: ModelCard) -> None:
    """Refuse a variant on a route that cannot do what makes it one.

    Raises:
        UnsupportedParameter: the route has no such field.
    """
    if not schema.computes:
        return
    lacking = (NEVER_LEFT_OUT & card.options.default_params.keys()) - schema.model_fields.keys()
    if lacking:
        raise UnsupportedParameter(
            f"Model {card.variant or card.id!r} has default {min(lacking)}, which this route cannot honor; send "
            f"{card.id!r}.",
            param="model",
        )
