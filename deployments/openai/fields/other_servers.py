"""Request keys of other servers: the fields that they are translated to, or why they are refused.

`foreign_fields` has the table. A key that has no row and is not a field is unknown. It is refused if it
nearly is a known name, otherwise it is accepted and reported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from deployments.core.errors import BadRequest, TroupeError, UnsupportedParameter, shown

Given = Mapping[str, Any]

MAX_UNKNOWN = 100
"""Unknown fields of a request, each compared with the known ones and named in a header; more are an error."""


@dataclass(frozen=True, slots=True)
class Harmless:
    """No value of this key changes an answer: it is accepted and not read."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A key for a feature that this server does not have.

    Attributes:
        neutral: the values that ask for nothing, which are accepted.
        instead: what to do, for the error message.
    """

    neutral: tuple[Any, ...] = ()
    instead: str = "leave it out"


@dataclass(frozen=True, slots=True)
class Means:
    """A key for a feature that this server has under another name.

    Attributes:
        target: the field of ours, for the documentation; a dot leads into an object.
        convert: the fields of ours that ask for the same, from the key's value and the whole request. It raises
            ValueError, with the reason, for a value that no field of ours can express.
    """

    target: str
    convert: Callable[[Any, Given], Given]


@dataclass(frozen=True, slots=True)
class Spread:
    """An object whose keys are read as if they stood beside it."""


Row = Harmless | Refused | Means | Spread
Rows = Mapping[str, Row]


def refused(names: str, *neutral: Any, instead: str = "leave it out") -> dict[str, Row]:
    """Rows of keys, with white space between them, that are refused."""
    return dict.fromkeys(names.split(), Refused(neutral, instead))


class Scope:
    """The keys that an object of a request may have.

    Args:
        rows: of the table.
        fields: the names of ours. A row wins over a field of its name.
    """

    def __init__(self, rows: Rows, fields: Iterable[str]) -> None:
        self.rows = rows
        self.own = frozenset(fields) - rows.keys()
        self._known = frozenset((*self.own, *rows))

    def check_near(self, key: str, place: str) -> None:
        """Refuse a key that is likely a misspelling of a known one."""
        close = nearest(key, self._known)
        if close is not None:
            name = (place + key)[:100]
            raise BadRequest(
                f"Unknown field {name!r}; did you mean {place + close!r}?", param=name, code="unknown_parameter"
            )


@dataclass(slots=True)
class Settled:
    """The keys of one object of a request, after the table was applied.

    Attributes:
        fields: fields of ours, with their values as they were sent or converted.
        sent: the key that gave a field its value, if it has another name.
        unknown: the places of keys that nobody knows.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    sent: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def apply(self, given: Given, scope: Scope, place: str = "") -> None:
        """Add the keys of an object.

        Args:
            given: the object; keys that are null count as absent.
            place: of the object in the request, such as `options.`.

        Raises:
            UnsupportedParameter: a key asks for something that cannot be done.
            BadRequest: a key is nearly one that is known, or two keys give one field different values.
        """
        present = {key: value for key, value in given.items() if value is not None}
        for key, value in present.items():
            if key in scope.own:
                self._set(key, value, place + key)
        for key in present:
            if key in scope.rows:
                self._apply_row(key, present, scope, place)
            elif key not in scope.own:
                scope.check_near(key, place)
                self.unknown.append(place + key)
                check_unknown(len(self.unknown))

    def _apply_row(self, key: str, given: Given, scope: Scope, place: str) -> None:
        row, value, name = scope.rows[key], given[key], place + key
        if isinstance(row, Refused) and not asks_nothing(value, row.neutral):
            raise UnsupportedParameter(f"This server does not support {name!r}; {row.instead}.", param=name)
        if isinstance(row, Spread):
            if not isinstance(value, Mapping):
                raise BadRequest(f"Invalid {name!r}: input should be an object; got {shown(value)}.", param=name)
            self.apply(value, scope, f"{name}.")
        if isinstance(row, Means):
            try:
                converted = row.convert(value, given)
            except ValueError as error:
                raise UnsupportedParameter(
                    f"This server does not support {name!r} with the value {shown(value)}: {error}.", param=name
                ) from None
            for ours, own_value in converted.items():
                self._set(ours, own_value, name)

    def _set(self, name: str, value: Any, key: str) -> None:
        outer, _, inner = name.partition(".")
        values = self.fields
        if inner:
            held = self.fields.get(outer, {})
            if not isinstance(held, Mapping):
                return  # Validation says what is wrong with it.
            values = self.fields[outer] = dict(held)
        last = inner or name
        if last in values and values[last] != value:
            other = self.sent.get(name, name)
            raise BadRequest(
                f"Invalid {key!r}: it means the same as {other!r}, which has another value; send one of them.",
                param=key,
            )
        values[last] = value
        if key != name:
            self.sent.setdefault(name, key)

    def as_sent(self, error: TroupeError) -> TroupeError:
        """An error about a field, renamed to the key that the request has."""
        if error.param is None:
            return error
        for name, key in self.sent.items():
            if error.param == name or error.param.startswith((f"{name}.", f"{name}[")):
                error.message = error.message.replace(f"{name!r}", f"{key!r}")
                if repr(key) not in error.message:
                    error.message += f" (It was sent as {key!r}.)"
                error.param = key
                break
        return error


def check_unknown(count: int) -> None:
    """Refuse a request with more unknown fields than any client has by mistake.

    Raises:
        BadRequest: there are more than `MAX_UNKNOWN`.
    """
    if count > MAX_UNKNOWN:
        raise BadRequest(
            f"The request has more than {MAX_UNKNOWN} unknown fields; leave them out.", code="unknown_parameter"
        )


def asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of those, or its text as a form sends it."""
    if value in neutral:
        return True
    if not isinstance(value, str):
        return False
    try:
        return json.loads(value.lower()) in neutral
    except (ValueError, RecursionError):
        return False


def _plain(name: str) -> str:
    """A name without the differences between spellings: case, hyphens, underscores."""
    return "".join(letter for letter in name.lower() if letter not in "_-. ")


@lru_cache(maxsize=4096)
def nearest(key: str, known: frozenset[str]) -> str | None:
    """The known name that a key is likely a misspelling of.

    Names that differ only in case or hyphens count, and names a slip away: one for up to eight letters, two for longer
    ones. In names of up to five letters a replaced letter does not count, because `top_k` and `top_p` differ by one,
    nor does an ending of two letters, because of `session` and `session_id`.
    """
    plain = _plain(key[:64])
    if not plain:
        return None
    best: tuple[int, str] | None = None
    letters = _letters(plain)
    for name, other, others in _spelled(known):
        shorter, longer = (plain, other) if len(plain) <= len(other) else (other, plain)
        allowed = 0 if len(shorter) < 3 else 1 if len(shorter) <= 8 else 2
        ending = len(longer) - len(shorter)
        # A slip changes which letters there are by two at most; counting them is much cheaper than counting slips.
        if ending > allowed or (letters ^ others).bit_count() > 2 * allowed:
            continue
        if ending == 2 and longer.startswith(shorter):
            continue
        slips = _slips(plain, other)
        if slips == 1 and len(plain) == len(other) <= 5 and sorted(plain) != sorted(other):
            continue
        if slips <= allowed and (best is None or slips < best[0]):
            best = (slips, name)
    return best[1] if best is not None else None


@lru_cache(maxsize=256)
def _spelled(known: frozenset[str]) -> list[tuple[str, str, int]]:
    """Names in order, each also without differences in spelling, and its letters."""
    return [(name, plain := _plain(name), _letters(plain)) for name in sorted(known)]


def _letters(text: str) -> int:
    """Which letters a text has, as bits; letters that share a bit make it look more alike."""
    bits = 0
    for letter in text:
        bits |= 1 << (ord(letter) % 61)
    return bits


def _slips(first: str, second: str) -> int:
    """Letters inserted, left out, replaced or swapped with the next one (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, last, row = row, before, [i]
        for j, b in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
