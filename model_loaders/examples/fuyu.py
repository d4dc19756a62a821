"""Fuyu (https://huggingface.co/adept/fuyu-8b): a model without a chat template, its image written as placeholders.

An example of a loader for a model whose processor does not support conversations: two hooks define how a conversation
is written and encoded. Fuyu answers one question about at most one image, so the turns are plain lines.

    - id: fuyu
      loader: model_loaders.examples.fuyu:load_model
      kwargs: {model_name: adept/fuyu-8b}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import torch
from transformers import FuyuForCausalLM, FuyuProcessor

from deployments.core.errors import BadRequest
from model_loaders.contract import ModelInfo
from model_loaders.weights.checkpoint import CheckpointOptions, load_checkpoint

# Fuyu's "beginning of answer": the processor writes it after a prompt with an image, nobody after one without.
_ANSWER = "<0x04>"


def load_model(
    device: str,
    model_name: str = "adept/fuyu-8b",
    dtype: str | None = None,
    allow_missing_keys: Sequence[str] | str = (),
    allow_unexpected_keys: Sequence[str] | str = (),
    adapter: str | None = None,
) -> ModelInfo:
    """Load Fuyu.

    Args:
        device: where the model goes.
        model_name: Hub id or local folder.
        dtype: such as "bfloat16"; None takes the checkpoint's.
        allow_missing_keys, allow_unexpected_keys, adapter: see `checkpoint.CheckpointOptions`.
    """
    options = CheckpointOptions(
        allow_missing_keys=allow_missing_keys, allow_unexpected_keys=allow_unexpected_keys, adapter=adapter
    )
    model = load_checkpoint(FuyuForCausalLM, model_name, options, dtype=dtype or "auto").to(device)
    processor = FuyuProcessor.from_pretrained(model_name)
    cut_tensors(processor.image_processor)
    return ModelInfo(
        model=model,
        model_name=model_name,
        processor=processor,
        apply_chat_template=write_prompt,
        encode=encoder(processor),
    )


def write_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """The texts of a conversation, one line each, without the images."""
    return "".join(f"{text_of(message['content'])}\n" for message in messages)


def encoder(processor: Any) -> Callable[..., Any]:
    """The encode hook: with an image the processor's placeholders, without one the tokenizer alone."""

    def encode(prompt: str, images: Sequence[Any] = ()) -> Any:
        if not images:
            return processor.tokenizer(f"<s>{prompt}{_ANSWER}", add_special_tokens=False, return_tensors="pt")
        if len(images) > 1:
            raise BadRequest(f"Fuyu reads one image; got {len(images)}.", param="messages")
        return processor(text=prompt, images=list(images), return_tensors="pt", return_legacy_image_output=False)

    return encode


def text_of(content: Any) -> str:
    """The texts of a message's content, its images left out."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")


def cut_tensors(images: Any) -> None:
    """Let the image processor without torchvision cut tensors: it knows arrays only, and Fuyu's processor gives it
    tensors and expects some back."""
    if type(images).__name__.endswith("Pil"):
        cut_array = images.patchify_image
        images.patchify_image = lambda image, patch_size: torch.as_tensor(
            cut_array(image=numpy.asarray(image), patch_size=patch_size)
        )
