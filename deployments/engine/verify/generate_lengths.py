"""Whether `generate` gives prompts the same together as alone, beyond the lengths that a model's config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deployments.engine.model.fresh_state import fresh_state
from deployments.engine.model.neutral_config import neutral_view
from deployments.engine.verify.named_lengths import lengths_in_time
from deployments.engine.verify.prompts import ordinary_ids
from deployments.engine.verify.proofs import GENERATE_LENGTHS, close

logger = logging.getLogger(__name__)

_STEPS = 4
_NEVER = 1 << 40


def alike_beyond_lengths(model: Any, limit: int) -> bool:
    """Whether short prompts are the same beside long ones, and the other way round.

    For each length one prompt is longer, one crosses it while its text grows and one is short.

    Args:
        model: a transformers model with `generate`; encoder-decoders are not tried.
        limit: the longest sequence.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return True
    fresh_state(model).reset()
    view, short = neutral_view(model, _NEVER), GENERATE_LENGTHS.lengths[0]
    for length in lengths_in_time(model, limit, "Requests together"):
        ids = ordinary_ids(model, length + _STEPS)
        if not _alike(view, [ids[:short], ids[: length - 2], ids]):
            return False
    return True


def _alike(view: Any, prompts: Sequence[Sequence[int]]) -> bool:
    try:
        together = _generated(view, prompts)
        alone = [_generated(view, [ids]) for ids in prompts]
    except Exception as error:
        logger.debug("Prompts cannot be tried together: %s: %s", type(error).__name__, error)
        return False
    return all(_same(tokens[i], logits[i], *one) for i, one in enumerate(alone) for tokens, logits in [together])


def _generated(view: Any, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Greedy tokens [rows, steps] and logits [rows, steps, vocab], on fresh modules."""
    fresh_state(view).reset()
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.tensor(prompt), 1
    with torch.inference_mode():
        output = view.generate(
            input_ids=ids.to(view.device),
            attention_mask=mask.to(view.device),
            max_new_tokens=_STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return output.sequences[:, width:], torch.stack(output.logits, 1)


def _same(tokens: Tensor, logits: Tensor, alone_tokens: Tensor, alone_logits: Tensor) -> bool:
    for step in range(_STEPS):
        if not close(logits[step], alone_logits[0, step]):
            return False
        if tokens[step] != alone_tokens[0, step]:
            break
    return True
