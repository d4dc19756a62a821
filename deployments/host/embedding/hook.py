"""Vectors by the loader's `embed` hook."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deployments.core.errors import RAISED_BY_HOOKS, BrokenHook, ModelError, hook_failure
from model_loaders.contract import Hook


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
    except RAISED_BY_HOOKS as error:
        raise ModelError(hook_failure("embed", error, embed)) from error
    try:
        vectors = torch.as_tensor(returned).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise _broken(type(returned).__name__, len(texts)) from None
    if vectors.dim() != 2 or len(vectors) != len(texts) or not vectors.shape[1] or not vectors.is_floating_point():
        raise _broken(f"{vectors.dtype} of shape {tuple(vectors.shape)}", len(texts))
    vectors = vectors.float()
    if not bool(vectors.isfinite().all()):
        raise _broken("numbers that are not finite in float32", len(texts))
    return vectors


def _broken(shown: str, texts: int) -> BrokenHook:
    return BrokenHook(f"Hook embed returned {shown}; expected finite floats of shape [{texts}, dimensions].")
