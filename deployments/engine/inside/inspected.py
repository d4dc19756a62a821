"""A sequence that a request looks into or changes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.core.calls import Intervention
from deployments.core.errors import BadRequest, TroupeError
from deployments.engine.inside.catalogue import Tap
from deployments.engine.inside.edits import Edit
from deployments.engine.inside.layout import Site
from deployments.engine.inside.positions import follows_prompt_end, is_of_generated
from deployments.engine.inside.recording import Recording, Wanted


@dataclass(slots=True)
class Asked:
    """What one sequence asks for at one side of one module.

    Attributes:
        edits: in order, each with the tap that it changes.
        takes: what is captured, each with its recording.
    """

    edits: list[tuple[Edit, Tap]] = field(default_factory=list)
    takes: list[tuple[Recording, Wanted]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Inspected:
    """What is captured of a sequence, and what is changed in it.

    Attributes:
        sites: what is asked for at each place.
        recordings: what is captured.
        interventions: what is changed.
        prompt: tokens of the prompt.
        pure: the loader's hooks among the interventions give the same for the same states.
        called: the edits whose module was called.
        error: what a hook raised.
        key: what the cache follows from beside the tokens, as far as `clean` says.
        clean: tokens whose cache follows from them and `key`; None: all.
    """

    sites: dict[Site, Asked]
    recordings: Sequence[Recording]
    interventions: tuple[Intervention, ...]
    prompt: int
    pure: bool = True
    called: set[int] = field(default_factory=set)
    error: TroupeError | None = None
    key: tuple[object, ...] = field(init=False)
    clean: int | None = field(init=False)

    def __post_init__(self) -> None:
        kept = tuple(each for each in self.interventions if not is_of_generated(each.positions))
        self.key = (digest(kept),) if kept else ()
        self.clean = self.prompt if len(kept) < len(self.interventions) else None

    @property
    def steered(self) -> bool:
        """Whether anything is changed, so that its cache may hold values that are not finite."""
        return bool(self.interventions)

    @property
    def kept(self) -> bool:
        """Whether its cache may be kept for other prompts, as far as `clean` says."""
        return self.pure and not any(follows_prompt_end(each.positions) for each in self.interventions)

    @property
    def reusable(self) -> int | None:
        """Tokens that may come from another cache, since nothing is captured of them; None: all."""
        firsts = [0 if any(w.whole for w in r.wanted) else r.chosen.first for r in self.recordings]
        return min((first for first in firsts if first is not None), default=None)

    @property
    def captures_last(self) -> bool:
        """Whether it captures what a prefill computes for its last token alone, unless it is told otherwise."""
        return any(wanted.tap.layout.last for recording in self.recordings for wanted in recording.wanted)

    def end(self, token_ids: Sequence[int], meta: dict[str, Any]) -> TroupeError | None:
        """Nothing more is computed of the sequence; why it fails after all, if it does."""
        if self.error is not None:
            return self.error
        for asked in self.sites.values():
            for edit, _ in asked.edits:
                if id(edit) not in self.called:
                    return _not_called(edit.module, "module_not_steerable", "interventions")
        for recording in self.recordings:
            if (label := recording.missing) is not None:
                return _not_called(label, "module_not_capturable", "capture")
            recording.end(token_ids, meta)
        return None


def digest(interventions: Sequence[Intervention]) -> str:
    """The same for the same interventions in the same order."""
    return hashlib.sha256(repr(interventions).encode()).hexdigest()


def _not_called(name: str, code: str, param: str) -> BadRequest:
    return BadRequest(
        f"Invalid {param!r}: module {name!r} was not called for this request; send what it runs for, such as an image.",
        param=param,
        code=code,
    )
