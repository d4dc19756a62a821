"""Models that take the place of those that the pages name."""

from __future__ import annotations

from typing import Any

import torch

from model_loaders.demo import load_model
from tests.openai.templates import TEMPLATES


def with_tools() -> dict[str, Any]:
    """The demo model with a chat template that has a place for tools."""
    demo = load_model()
    return {"model": demo.model, "tokenizer": demo.tokenizer, "chat_template": TEMPLATES["hermes"]}


def with_reasoning() -> dict[str, Any]:
    """A model that thinks aloud, and then answers what it has thought of."""
    demo = load_model()

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        text = "<think>\n27 + 45 is 72.\n</think>\n\n72<|im_end|>"
        said = demo.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return torch.cat([input_ids, said[:, :max_new_tokens]], dim=1)

    return {"model": demo.model, "tokenizer": demo.tokenizer, "generate": generate}
