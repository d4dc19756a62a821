"""What can be captured or changed inside a model, by the names of its modules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from deployments.core.errors import BadRequest
from deployments.engine.inside.layout import WHOLE, Layout, Side
from deployments.engine.inside.names import Names

_SUFFIX = re.compile(r"(?P<path>[^:#]*)(?::(?P<tap>output(?:\.\d+)?|input|attention))?(?:#(?P<call>\d+))?")
NEVER_CALLED = "it is not called by the model's forward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A tensor that a module gives or is given.

    Attributes:
        item: which tensor of a tuple.
        shape: of one token, or of the whole tensor if it has no tokens; heads for attention weights.
        calls: how often the module is called in a forward.
        reason: why it cannot be captured; empty if it can.
    """

    side: Side
    item: int = 0
    layout: Layout = WHOLE
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    calls: int = 1
    reason: str = ""

    @property
    def unsteerable(self) -> str:
        """Why it cannot be changed; empty if it can."""
        if self.reason:
            return self.reason
        if self.side == "attention":
            return "attention weights are computed beside the model, which never sees them"
        return "" if self.dtype.is_floating_point else "its numbers are not floating-point numbers"


@dataclass(frozen=True, slots=True)
class Portable:
    """A catalogue without the modules of its model: taps or the reason for none, by the names of the modules."""

    modules: Mapping[str, tuple[Mapping[str, Tap], str]]
    aliases: Mapping[str, tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A module of a model, with its taps by their suffixes; `reason` if it has none."""

    name: str
    module: nn.Module
    taps: Mapping[str, Tap] = field(default_factory=dict)
    reason: str = ""

    @property
    def capturable(self) -> bool:
        return any(not tap.reason for tap in self.taps.values())

    def as_json(self) -> dict[str, Any]:
        """One module of the answer to GET /v1/modules."""
        taps = [_tap_json(suffix, tap) for suffix, tap in self.taps.items()]
        reason = self.reason or ("" if self.capturable else taps[0]["reason"])
        return {
            "name": self.name,
            "class": type(self.module).__name__,
            "capturable": self.capturable,
            "steerable": any(tap["steerable"] for tap in taps),
            "reason": reason or None,
            "taps": taps,
        }


def _tap_json(suffix: str, tap: Tap) -> dict[str, Any]:
    return {
        "tap": suffix,
        "rows": None if tap.reason else tap.layout.name,
        "shape": list(tap.shape),
        "dtype": str(tap.dtype).removeprefix("torch."),
        "calls": tap.calls,
        "capturable": not tap.reason,
        "steerable": not tap.unsteerable,
        "reason": tap.reason or tap.unsteerable or None,
    }


@dataclass(frozen=True, slots=True)
class Found:
    """What a pattern stands for.

    Attributes:
        label: its name in the answer.
        call: one call of several; None is all of them.
    """

    label: str
    entry: Entry
    tap: Tap
    call: int | None = None


class Catalogue:
    """The modules of one model.

    Args:
        entries: in the order of `named_modules`.
        aliases: other names of taps: (module, suffix) by name.
    """

    def __init__(self, entries: Sequence[Entry], aliases: Mapping[str, tuple[str, str]]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.aliases = dict(aliases)
        self._names = Names(self.entries)
        self._alias_names = Names(self.aliases)
        self._known: dict[str, list[Found]] = {}

    @classmethod
    def of_model(cls, model: nn.Module, found: Portable) -> Catalogue:
        """What was found with a model of the same kind, for the modules of this one."""
        known = dict(model.named_modules(remove_duplicate=False))
        entries = [Entry(name, known[name], taps, reason) for name, (taps, reason) in found.modules.items()]
        return cls(entries, found.aliases)

    def portable(self) -> Portable:
        """This catalogue, for other models of the same kind."""
        return Portable({name: (entry.taps, entry.reason) for name, entry in self.entries.items()}, self.aliases)

    def as_json(self, pattern: str = "") -> dict[str, Any]:
        """The answer to GET /v1/modules.

        Args:
            pattern: of the names; without one, all.
        """
        shown = self._names.match(pattern) if pattern else self._names.all
        aliases = self._alias_names.match(_spelled(pattern)) if pattern else self._alias_names.all
        return {
            "object": "list",
            "data": [self.entries[name].as_json() for name in shown],
            "aliases": {name: ":".join(self.aliases[name]) for name in aliases},
        }

    def find(self, pattern: str, param: str) -> list[Found]:
        """What a pattern with its suffix stands for, whether it can be captured or not.

        Args:
            param: the request field, for the error.

        Raises:
            BadRequest: nothing has such a name.
        """
        if pattern not in self._known:
            found = self._found(pattern)
            if not found:
                raise self._unknown(pattern, param)
            if (text := self._unmatched(pattern)) is not None:
                raise BadRequest(
                    f"Invalid {param!r}: no module fits {text!r} in the braces of {pattern[:200]!r}; leave it out. GET "
                    "/v1/modules lists the modules.",
                    param=param,
                    code="unknown_module",
                )
            if len(self._known) > 1000:
                self._known.clear()
            self._known[pattern] = found
        return self._known[pattern]

    def _found(self, pattern: str) -> list[Found]:
        match = _SUFFIX.fullmatch(pattern)
        if match is None:
            return []
        call = None if match["call"] is None else int(match["call"])
        if not match["tap"] and (names := self._alias_names.match(_spelled(match["path"]))):
            return [self._at(name, *self.aliases[name], call) for name in names]
        suffix = match["tap"] or "output"
        names = self._names.match(match["path"])
        shown = "" if suffix == "output" else f":{suffix}"
        return [self._at(name + shown, name, suffix, call) for name in names]

    def _unmatched(self, pattern: str) -> str | None:
        """A text in the braces of a pattern for which there is no module."""
        path = pattern.partition(":")[0].partition("#")[0]
        names = self._alias_names if self._alias_names.match(_spelled(path)) else self._names
        return names.unmatched(_spelled(path))

    def _at(self, label: str, name: str, suffix: str, call: int | None) -> Found:
        entry = self.entries[name]
        missing = entry.reason or f"it has no {suffix}; it has {', '.join(entry.taps)}"
        tap = entry.taps.get(suffix) or Tap(side="output", reason=missing)
        if call is not None and call >= tap.calls and not tap.reason:
            tap = Tap(side=tap.side, reason=f"a forward has {tap.calls} calls, counted from #0, and not #{call}")
        return Found(label, entry, tap, call)

    def _unknown(self, pattern: str, param: str) -> BadRequest:
        path = pattern.partition(":")[0]
        near = [*self._alias_names.nearest(path), *self._names.nearest(path)]
        near = sorted(near, key=lambda name: -difflib.SequenceMatcher(None, name, path).ratio())[:3]
        meant = f" The nearest are {', '.join(near)}." if near else ""
        return BadRequest(
            f"Invalid {param!r}: the model has no module {pattern[:200]!r}.{meant} GET /v1/modules lists them.",
            param=param,
            code="unknown_module",
        )


def _spelled(path: str) -> str:
    return "hidden_states.*" if path == "hidden_states" else path


def is_wide(pattern: str) -> bool:
    """Whether a pattern may stand for modules that its writer has not thought of."""
    return "*" in pattern
