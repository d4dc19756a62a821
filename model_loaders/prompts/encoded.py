"""What an encoder returned for a prompt, checked against the contract."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.core.errors import BrokenHook
from deployments.core.token_ids import id_range


@dataclass(slots=True, kw_only=True)
class Encoded:
    """An encoded prompt.

    Attributes:
        input_ids: token ids of the one prompt.
        model_inputs: every other tensor the encoder returned, batch dimension 1, on the CPU.
        content_key: digest of `model_inputs`; "" when there are none.
    """

    input_ids: list[int]
    model_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    content_key: str = ""


def as_encoded(returned: Any) -> Encoded:
    """The encoder's mapping as ids and tensors of batch dimension 1, positions that its mask hides left out.

    Raises:
        BrokenHook: it is not a mapping, or its `input_ids` are not whole numbers of one prompt.
    """
    if isinstance(returned, torch.Tensor | list):
        returned = {"input_ids": returned}
    if not isinstance(returned, Mapping) or returned.get("input_ids") is None:
        raise BrokenHook(
            f"Hook encode returned {_shown(returned)}; expected a mapping with input_ids (a BatchEncoding)."
        )
    ids = _ids(returned["input_ids"])
    rest = {
        key: _tensor(key, value)
        for key, value in returned.items()
        if key not in ("input_ids", "attention_mask", "labels") and value is not None
    }
    hidden = returned.get("attention_mask")
    if hidden is not None and not (shown := _mask(hidden, len(ids))).all():
        rest = {k: v[..., shown] if v.shape[-1:] == shown.shape and v.dim() <= 2 else v for k, v in rest.items()}
        ids = ids[shown]
    return Encoded(input_ids=ids.tolist(), model_inputs=rest, content_key=_digest(rest))


def check_ids(ids: Sequence[int], vocab: int | None, source: str) -> None:
    """Refuse ids that the model's input embedding does not have.

    Args:
        source: what gave the ids, for the message.
        vocab: how many it has; None if that is unknown.

    Raises:
        BrokenHook: it names the first such id.
    """
    wrong = next((i for i in ids if i < 0 or (vocab is not None and i >= vocab)), None)
    if wrong is not None:
        raise BrokenHook(f"{source} returned the token id {wrong}; expected {id_range(vocab)}.")


def _ids(given: Any) -> torch.Tensor:
    """The ids [length] of one prompt."""
    try:
        ids = torch.as_tensor(given).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise BrokenHook(f"Hook encode returned input_ids={_shown(given)}; expected {_EXPECTED}.") from None
    # An empty list has the dtype of a float.
    whole = not ids.numel() or not (ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool)
    if not whole or ids.dim() not in (1, 2) or (ids.dim() == 2 and ids.shape[0] != 1):
        raise BrokenHook(
            f"Hook encode returned input_ids of dtype {ids.dtype} and shape {tuple(ids.shape)}; expected {_EXPECTED}."
        )
    return ids.reshape(-1).long()


_EXPECTED = "whole numbers of shape [1, length], the ids of one prompt"


def _mask(given: Any, length: int) -> torch.Tensor:
    """Which of the ids the mask shows, bool [length]."""
    mask = _tensor("attention_mask", given).reshape(-1).bool()
    if len(mask) != length:
        raise BrokenHook(f"Hook encode returned an attention_mask of {len(mask)} positions for {length} input_ids.")
    return mask


def _tensor(key: str, value: Any) -> torch.Tensor:
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise BrokenHook(f"Hook encode returned {key}={type(value).__name__}; expected a tensor.") from None


def _shown(value: Any) -> str:
    """A value's type, and the keys of a mapping."""
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(map(str, value)) or '(none)'}"
    return type(value).__name__


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    if not tensors:
        return ""
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(tensors):
        value = tensors[key].contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
