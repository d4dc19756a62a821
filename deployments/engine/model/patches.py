"""Changes to a loaded model, which one owner undoes in the reverse order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn


class Patches(ExitStack):
    """What was changed in a model, undone by `close` or at the end of a `with` block; `pop_all` hands it on.

    Every change registers how it is undone (`callback`) as soon as it is made, so that a failure after it undoes it.
    """

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give a module a forward of its own."""
        before = vars(module).get("forward")
        vars(module)["forward"] = forward
        self.callback(_restore_forward, module, before)


def _restore_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = forward
