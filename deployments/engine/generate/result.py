"""What a generate hook returned, checked against the contract: `LongTensor[1, prompt + new]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deployments.core.errors import BrokenHook
from deployments.core.token_ids import id_range


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateContract:
    """What one call of the hook may return and stream.

    Attributes:
        prompt: the ids that the result begins with; None for an encoder-decoder.
        begun: how many tokens come before the new ones: the prompt, or what the decoder begins with.
        limit: new tokens at most; None if the hook does not take it.
        vocab: how many token ids there are; None if that is unknown.
    """

    prompt: Sequence[int] | None
    begun: int
    limit: int | None
    vocab: int | None

    def new_tokens(self, returned: Any) -> list[int]:
        """The new tokens of the hook's result.

        Its length separates them from the prompt. A hook may change single tokens of the prompt, so only a result
        that has less than half of them in their places counts as one without the prompt.

        Args:
            returned: a tensor, or an output of transformers with `sequences`.

        Raises:
            BrokenHook: it says what was returned and what was expected.
        """
        ids = _as_ids(returned)
        if ids is None or ids.dim() != 2 or len(ids) != 1:
            raise self._broken(_shown(returned) if ids is None else _shown(ids))
        found: list[int] = ids[0].tolist()
        new = len(found) - self.begun
        if new < 0 or (self.limit is not None and new > self.limit):
            raise self._broken(f"{len(found)} tokens")
        if self.prompt is not None and 2 * sum(map(int.__eq__, found, self.prompt)) < self.begun:
            raise self._broken(f"{len(found)} tokens that do not begin with the prompt")
        self.check(found[self.begun :], "returned")
        return found[self.begun :]

    def check(self, tokens: Sequence[int], verb: str) -> None:
        """Refuse new tokens that the model does not have.

        Raises:
            BrokenHook: it names the first such token.
        """
        wrong = next((i for i in tokens if i < 0 or (self.vocab is not None and i >= self.vocab)), None)
        if wrong is not None:
            raise BrokenHook(f"Hook generate {verb} the token id {wrong}; expected {id_range(self.vocab)}.")

    def streamed(self, value: Any) -> torch.Tensor:
        """What the hook gave its streamer, as whole numbers of at most two dimensions.

        Raises:
            BrokenHook: it is anything else, or the tokens of several sequences.
        """
        ids = _as_ids(value)
        if ids is None or ids.dim() > 2 or (ids.dim() == 2 and len(ids) != 1):
            shown = _shown(value) if ids is None else _shown(ids)
            raise BrokenHook(f"Hook generate streamed {shown}; expected token ids of one sequence.")
        return ids

    def _broken(self, shown: str) -> BrokenHook:
        before = f"the prompt's {self.begun} tokens" if self.prompt is not None else f"{self.begun} decoder token(s)"
        new = "the new ones" if self.limit is None else f"at most {self.limit} new ones"
        return BrokenHook(
            f"Hook generate returned {shown}; expected whole numbers of shape (1, n): {before}, then {new}."
        )


def _as_ids(returned: Any) -> torch.Tensor | None:
    """Whole numbers, or None if it has none."""
    if isinstance(returned, Mapping):
        returned = returned.get("sequences")
    sequences = getattr(returned, "sequences", returned)
    try:
        ids = torch.as_tensor(sequences)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    return ids if whole else None


def _shown(value: Any) -> str:
    """A result in words."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(str, value)) or '(none)'}"
    if (shape := getattr(value, "shape", None)) is not None:
        return f"{getattr(value, 'dtype', type(value).__name__)} of shape {tuple(shape)}"
    return type(value).__name__
