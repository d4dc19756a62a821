"""A loader whose done_callback is shown states."""

from __future__ import annotations

from typing import Any

import torch

from tests.openai.tiny_models import load_model

SEEN: list[dict[str, torch.Tensor]] = []


def with_inspect() -> dict[str, Any]:
    def done(capture: dict[str, torch.Tensor], **_: Any) -> None:
        SEEN.append(capture)

    inspect = {"modules": ["model.layers.-1", "lm_head"], "positions": "generated"}
    return {**load_model(), "inspect": inspect, "done_callback": done}
