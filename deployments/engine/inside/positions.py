"""Which tokens of a sequence are captured or changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.core.calls import Positions, Window
from deployments.core.errors import BadRequest


@dataclass(frozen=True, slots=True)
class Chosen:
    """The positions of one sequence: an interval, or single ones in ascending order.

    Attributes:
        start, end: the interval [start, end); no end is that of the sequence.
        single: positions in place of the interval.
    """

    start: int = 0
    end: int | None = None
    single: tuple[int, ...] | None = None

    def within(self, start: int, count: int) -> Sequence[int]:
        """Those among `count` positions from `start`."""
        if self.single is not None:
            return [position for position in self.single if start <= position < start + count]
        end = start + count if self.end is None else min(self.end, start + count)
        return range(max(start, self.start), end)

    def after(self, first: int) -> Chosen:
        """Those from `first`."""
        if self.single is not None:
            return Chosen(single=tuple(position for position in self.single if position >= first))
        return Chosen(max(self.start, first), self.end)

    @property
    def first(self) -> int | None:
        """The lowest one; None if there is none."""
        if self.single is not None:
            return self.single[0] if self.single else None
        return None if self.end is not None and self.end <= self.start else self.start


def choose(positions: Positions, prompt: int, total: int, param: str) -> Chosen:
    """The positions of a sequence that a request names.

    Args:
        prompt: tokens of the prompt.
        total: tokens that the model can be given in the end: the last generated one never is.
        param: the request field, for the error.

    Raises:
        BadRequest: a position is outside of the sequence.
    """
    if isinstance(positions, str):
        return {
            "all": Chosen(),
            "prompt": Chosen(0, prompt),
            "generated": Chosen(prompt),
            "last_prompt": Chosen(prompt - 1, prompt),
        }[positions]
    if isinstance(positions, Window):
        return _window(positions, prompt, param)
    resolved = [position + prompt if position < 0 else position for position in positions]
    for given, position in zip(positions, resolved, strict=True):
        if not 0 <= position < total:
            raise _outside(f"{given}", param, prompt, f"positions {-prompt} to {total - 1} can be named")
    return Chosen(single=tuple(sorted(set(resolved))))


def _window(window: Window, prompt: int, param: str) -> Chosen:
    if window.of == "generated":
        if window.start < 0 or (window.end is not None and window.end < window.start):
            raise _outside(_written(window), param, prompt, "'from' starts at 0, and 'to' is not below it")
        return Chosen(prompt + window.start, None if window.end is None else prompt + window.end)
    start = window.start + prompt if window.start < 0 else window.start
    end = prompt if window.end is None else window.end + prompt if window.end < 0 else window.end
    if not 0 <= start <= end <= prompt:
        raise _outside(_written(window), param, prompt, f"a window of it lies within 0 to {prompt}")
    return Chosen(start, end)


def _written(window: Window) -> str:
    return f"from {window.start} to {'the end' if window.end is None else window.end} of {window.of}"


def _outside(what: str, param: str, prompt: int, known: str) -> BadRequest:
    return BadRequest(
        f"Invalid {param!r}: {what} is outside of this request; its prompt has {prompt} tokens, and {known}.",
        param=param,
        code="positions_out_of_range",
    )


def follows_prompt_end(positions: Positions) -> bool:
    """Whether the same positions name other tokens in a longer prompt."""
    if isinstance(positions, str):
        return positions in ("prompt", "last_prompt")
    if isinstance(positions, Window):
        return positions.of == "prompt" and (positions.start < 0 or positions.end is None or positions.end < 0)
    return any(position < 0 for position in positions)


def is_of_generated(positions: Positions) -> bool:
    """Whether only generated tokens are named."""
    return positions == "generated" or (isinstance(positions, Window) and positions.of == "generated")
