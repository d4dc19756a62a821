"""Decode steps that run without the model's Python, and are compared with ordinary ones before they are trusted.

After a failure, or if a step has had other logits than an ordinary one, all further steps are ordinary. So are those of
a model that a loader has attached hooks to, which a replay would not call (`listener`). After memory ran out, steps are
ordinary for a while.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from deployments.engine.base.failures import causes, free_memory, is_out_of_memory, raise_if_lost
from deployments.engine.cache.cache import AnyCache, BatchCache, keeps_all_columns, new_cache
from deployments.engine.model.forward import Forward, Offset
from deployments.engine.model.forward_hooks import free_hooks, listener
from deployments.engine.verify.proofs import close

logger = logging.getLogger(__name__)

_CHECKED = 2
"""Steps of every kind that are compared with ordinary ones; the second has other inputs than the recording."""
_ORDINARY_STEPS = 256
"""Steps that are ordinary after memory ran out."""


class ReplayedStep(Protocol):
    """A decode step that can be repeated.

    Attributes:
        compared: how often it had the logits of an ordinary step.
    """

    compared: int

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: BatchCache) -> Tensor:
        """Logits [rows, vocab], the new column written but not yet counted."""


class ReplayedDecode(ABC):
    """Decodes like `Forward.decode`, in replayed steps where there are some.

    Args:
        forward: the model's forward passes.
        listens: a replay runs none of the model's Python.

    Attributes:
        reason: why there are no replayed steps (any more); None while there are.
        repeated: how many decode steps were replayed.
    """

    verb: str
    """What is done to a step, in messages."""
    level = logging.WARNING
    """Of the message that says why there are no such steps."""

    def __init__(self, forward: Forward, *, listens: bool) -> None:
        self._forward = forward
        self._ordinary_left = 0
        self._free_hooks: list[Any] = []
        self.repeated = 0
        self.reason = unsuited(forward)
        if self.reason is None and listens:
            self._free_hooks = free_hooks(forward.model)
            self.reason = listener(forward.model)
            if self.reason is not None:
                logger.log(
                    self.level, "Decode steps are not %s: %s, which a replay does not run.", self.verb, self.reason
                )

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: AnyCache) -> Tensor:
        """Append one token to every sequence; see `Forward.decode`."""
        logits, step, failure, memory = None, None, None, False
        if any(self._free_hooks):
            self._look_again()
        if self._ordinary_left:
            self._ordinary_left -= 1
        elif self.reason is None and isinstance(cache, BatchCache):
            try:
                step = self._step(cache, len(offsets[0]))
                if step is not None:
                    logits = step.decode(token_ids, offsets, cache)
            except Exception as error:
                raise_if_lost(error)
                # TorchScript's messages begin with a stack.
                text = str(error).strip().splitlines()[-1:] or [""]
                failure = f"{type(error).__name__}: {text[0]}"
                memory = any(map(is_out_of_memory, causes(error)))
        if memory:
            # Not while the error is handled: it refers to what is to be freed.
            step = None
            self._pause(str(failure))
        if logits is None or step is None:
            ordinary = self._forward.decode(token_ids, offsets, cache)
            # If the ordinary forward fails as well, the replayed step is not to blame.
            if failure is not None and not memory:
                self._give_up(failure)
            return ordinary
        self.repeated += 1
        if step.compared >= _CHECKED:
            cache.add_column()
            return logits
        return self._compared(step, logits.clone(), token_ids, offsets, cache)

    @abstractmethod
    def _step(self, cache: BatchCache, dims: int) -> ReplayedStep | None:
        """The step for a batch, with room for one more column; None if there is none for it yet."""

    @abstractmethod
    def forget(self) -> None:
        """Free all steps."""

    def _agree(self, found: Tensor, ordinary: Tensor) -> bool:
        """Whether logits [rows, vocab] are those of an ordinary step."""
        return all(close(mine, its) for mine, its in zip(found, ordinary, strict=True))

    def _compared(
        self, step: ReplayedStep, found: Tensor, token_ids: Sequence[int], offsets: Sequence[Offset], cache: AnyCache
    ) -> Tensor:
        """The logits of an ordinary step in the place of the replayed one; the end of replays if they differ."""
        logits = self._forward.decode(token_ids, offsets, cache)
        if self._agree(found, logits):
            step.compared += 1
        else:
            self._give_up("their logits are not those of an ordinary step")
        return logits

    def _look_again(self) -> None:
        """After hooks were registered: transformers' own, or such as a replay would not call."""
        self._free_hooks = free_hooks(self._forward.model)
        found = listener(self._forward.model)
        if found is not None:
            self._give_up(found)

    def _give_up(self, reason: str) -> None:
        logger.log(self.level, "Decode steps are not %s: %s", self.verb, reason)
        self.reason = reason
        self._free_hooks = []
        self.forget()

    def _pause(self, error: str) -> None:
        """After memory ran out: free what steps hold, and decode in ordinary steps for a while."""
        left = self._ordinary_left = _ORDINARY_STEPS
        logger.warning("No decode steps are %s for the next %d steps; memory ran out: %s", self.verb, left, error)
        self.forget()
        free_memory()


def unsuited(forward: Forward) -> str | None:
    """Why a model cannot have replayed steps."""
    config = forward.model.config.get_text_config(decoder=True)
    if not keeps_all_columns(new_cache(forward.model)):
        return "its layers do not all have full attention"
    if getattr(config, "_attn_implementation", None) != "sdpa":
        return "its attention is not sdpa"
    if forward.rotary.depends:
        return "its rotary frequencies depend on the length of each sequence"
    return None if forward.takes_positions else "its forward takes no positions"
