"""Vectors of texts: by the loader's `embed` hook, else from the hidden states of the model's last layer.

One text at a time, so that a vector never depends on its neighbours or on padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from deployments.errors import (
    BadRequest,
    BrokenHook,
    ContextOverflow,
    ModelError,
    OutOfMemory,
    UnsupportedParameter,
    last_line,
)
from model_loaders.contract import Hook, ModelInfo

if TYPE_CHECKING:
    from deployments.loaded_model import EncodedPrompt

POOLINGS = ("mean", "last", "cls")


def embed(info: ModelInfo, prompts: Sequence[EncodedPrompt], *, pooling: str | None, limit: int) -> torch.Tensor:
    """One vector for each prompt. Blocks.

    Args:
        pooling: `mean` of all tokens, `last` or `cls` (the first); None takes the last of a decoder, the mean of an
            encoder. The hook's vectors are taken as they are, pooled ones have length 1.
        limit: tokens of a prompt at most.

    Returns:
        float32 of shape [len(prompts), dimensions], on the CPU.

    Raises:
        ContextOverflow: a prompt is longer than `limit`.
        UnsupportedParameter: there is neither a hook nor a model whose hidden states could be pooled.
        ModelError: the hook or the model failed.
        OutOfMemory: the device had no memory for it.
    """
    for prompt in prompts:
        if not prompt.encoded.input_ids:
            raise BadRequest("An input is empty: nothing to embed.", param="input")
        if len(prompt.encoded.input_ids) > limit:
            raise ContextOverflow(limit, len(prompt.encoded.input_ids), param="input")
    _check_ids(info.model, prompts)
    try:
        with torch.inference_mode():
            if info.embed is not None:
                return hooked(info.embed, _texts(info, prompts))
            return torch.stack([_pooled(info.model, prompt, pooling) for prompt in prompts])
    except (UnsupportedParameter, ModelError):
        raise
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The device had no memory left for this embedding; try again.") from error
    except Exception as error:
        raise ModelError(f"Model {info.model_name!r} failed to embed: {last_line(error)}") from error


def _check_ids(model: Any, prompts: Sequence[EncodedPrompt]) -> None:
    """Refuse ids that no embedding has: on a GPU they would take the whole process down."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    size = getattr(table, "num_embeddings", None)
    for prompt in prompts:
        worst = max(prompt.encoded.input_ids)
        if size is not None and worst >= size:
            raise BadRequest(f"Invalid 'input': token id {worst} is not below the vocabulary's {size}.", param="input")


def _texts(info: ModelInfo, prompts: Sequence[EncodedPrompt]) -> list[str]:
    texts = [prompt.text for prompt in prompts if prompt.text is not None]
    if len(texts) < len(prompts):
        raise UnsupportedParameter(f"Model {info.model_name!r} embeds texts; send no token ids.", param="input")
    return texts


def hooked(embed: Hook, texts: Sequence[str]) -> torch.Tensor:
    """What the loader's hook gives for texts, float32 [texts, dimensions] on the CPU.

    Raises:
        BrokenHook: it is anything else.
        ModelError: the hook raised.
    """
    try:
        with torch.inference_mode():
            returned = embed(list(texts))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"Hook embed failed: {last_line(error)}") from error
    try:
        vectors = torch.as_tensor(returned)
    except (TypeError, ValueError, RuntimeError):
        raise _broken(type(returned).__name__, len(texts)) from None
    if vectors.dim() != 2 or len(vectors) != len(texts) or not vectors.shape[1] or not vectors.is_floating_point():
        raise _broken(f"{vectors.dtype} of shape {tuple(vectors.shape)}", len(texts))
    if not bool(vectors.isfinite().all()):
        raise _broken("numbers that are not finite", len(texts))
    return vectors.detach().float().cpu()


def _broken(shown: str, texts: int) -> BrokenHook:
    return BrokenHook(f"Hook embed returned {shown}; expected finite floats of shape [{texts}, dimensions].")


def _pooled(model: Any, prompt: EncodedPrompt, pooling: str | None) -> torch.Tensor:
    config = getattr(model, "config", None)
    if config is None or not isinstance(model, torch.nn.Module):
        raise UnsupportedParameter("This model gives no embeddings; give its loader an embed hook.", param="input")
    encoder = getattr(config, "is_encoder_decoder", False)
    inner = model.get_encoder() if encoder else getattr(model, "base_model", model)  # type: ignore[operator]
    device = next(inner.parameters()).device
    ids = torch.tensor([prompt.encoded.input_ids], device=device)
    extra = {key: value.to(device) for key, value in prompt.encoded.model_inputs.items()}
    states = inner(input_ids=ids, attention_mask=torch.ones_like(ids), **extra)[0][0].float()
    # A decoder's last token has seen the whole text; an encoder's tokens have all seen it.
    pooling = pooling or ("mean" if encoder or not hasattr(model, "lm_head") else "last")
    vector = {"mean": states.mean(0), "last": states[-1], "cls": states[0]}[pooling]
    return torch.nn.functional.normalize(vector, dim=0).cpu()
