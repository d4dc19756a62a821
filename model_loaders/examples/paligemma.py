"""PaliGemma (https://huggingface.co/google/paligemma-3b-mix-448): a borrowed chat template, and an encoder for texts.

An example of a loader for a model whose processor refuses a prompt without an image: the encode hook sends such
prompts to the tokenizer alone. PaliGemma has no chat template; it can use the template of another model of its family.

    - id: paligemma
      loader: model_loaders.examples.paligemma:load_model
      kwargs: {model_name: google/paligemma-3b-mix-448, template_from: google/gemma-7b-it}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from model_loaders.examples.fuyu import text_of, write_prompt
from model_loaders.weights.checkpoint import CheckpointOptions, load_checkpoint


def load_model(
    device: str,
    model_name: str,
    template_from: str | None = None,
    dtype: str | None = None,
    allow_missing_keys: Sequence[str] | str = (),
    allow_unexpected_keys: Sequence[str] | str = (),
) -> dict[str, Any]:
    """Load PaliGemma.

    Args:
        device: where the model goes.
        model_name: Hub id or local folder.
        template_from: Hub id or folder of the tokenizer whose chat template is borrowed; None writes the texts alone.
        dtype: such as "bfloat16"; None takes the checkpoint's.
        allow_missing_keys, allow_unexpected_keys: see `checkpoint.CheckpointOptions`.
    """
    options = CheckpointOptions(allow_missing_keys=allow_missing_keys, allow_unexpected_keys=allow_unexpected_keys)
    processor = PaliGemmaProcessor.from_pretrained(model_name)
    template = write_prompt
    if template_from is not None:
        template = borrowed(processor.tokenizer, AutoTokenizer.from_pretrained(template_from).chat_template)
    return {
        "model": load_checkpoint(PaliGemmaForConditionalGeneration, model_name, options, dtype=dtype or "auto").to(
            device
        ),
        "model_name": model_name,
        "processor": processor,
        "apply_chat_template": template,
        "encode": encoder(processor),
    }


def borrowed(tokenizer: Any, chat_template: str) -> Callable[..., str]:
    """An apply_chat_template hook that writes conversations with another model's template, images left out."""

    def apply_chat_template(messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        texts = [{**message, "content": text_of(message["content"])} for message in messages]
        text: str = tokenizer.apply_chat_template(texts, chat_template=chat_template, **kwargs)
        return text

    return apply_chat_template


def encoder(processor: Any) -> Callable[..., Any]:
    """The encode hook: images before the text, as PaliGemma was trained; a text alone by the tokenizer."""

    def encode(prompt: str, images: Sequence[Any] = (), add_special_tokens: bool = False) -> Any:
        if not images:
            return processor.tokenizer(prompt, add_special_tokens=add_special_tokens, return_tensors="pt")
        # The processor writes the beginning-of-sequence token itself, between images and text.
        text = processor.image_token * len(images) + prompt.removeprefix(processor.tokenizer.bos_token)
        return processor(text=text, images=list(images), return_tensors="pt")

    return encode
