"""Deterministic mode: the bits of a sequence do not depend on its neighbors.

What the logits of a sequence are made of, and how each part is kept the same whoever else is there:

- Prompts are computed one at a time, in chunks that begin at multiples of the chunk's length. Prefixes are reused only
  up to such a multiple, as far as a prefill has computed them. So every forward over a prompt has the same shape.
- In a decode step every sequence attends to its own keys by itself (`attention.DecodeAttention`).
- A linear's order of summation may depend on how many rows its input has, not on a row's place among them. A probe
  finds, for every shape of weight, the number of rows from which on it does not. Fewer rows are filled up to this
  number. A shape without such a number is computed in tiles that all have the same number of rows.
- Models that multiply by something else than linears decode each sequence by itself. So do those whose logits still
  differ in a probe of every batch size.
- Log-probabilities and draws are computed for one sequence after the other.

A sequence that is computed again, because the device ran out of memory, has its text so far computed as a prompt: in
this one case bits may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from deployments.engine.cache.cache import AnyCache, new_cache
from deployments.engine.model.attention import is_decoding
from deployments.engine.model.forward import Forward
from deployments.engine.model.patches import Patches
from deployments.engine.verify.proofs import DETERMINISTIC

logger = logging.getLogger("troupe.engine")

TILE = 8
_FLOORS = (1, 4, 8, 16)

Strategy = Literal["together", "isolated"]
"""How sequences decode."""

Linear = Callable[[Tensor], Tensor]
Product = Callable[[Linear, Tensor], Tensor]
"""What a linear gives for rows [rows, inputs], computed with the same bits whoever else is there."""


@dataclass(slots=True)
class Steady:
    """What was found for a model, which holds for others of its kind.

    Attributes:
        products: of linears, by their kind; None for a kind that has none.
        strategy: None until it is found.
    """

    products: dict[Any, Product | None] = field(default_factory=dict)
    strategy: Strategy | None = None


def make_deterministic(
    forward: Forward, max_batch_size: int, patches: Patches, steady: Steady | None = None
) -> Strategy:
    """Let decode steps of one model give a sequence the same bits in a batch of any size.

    Args:
        forward: the model's forward passes; its sequences attend by themselves if they decode together.
        max_batch_size: sequences computed together at most.
        patches: give the model its forwards back.
        steady: of models of the same kind; what is found is added.

    Returns:
        How sequences decode: `together`, or each `isolated`; in that case nothing is changed.
    """
    steady = Steady() if steady is None else steady
    isolated = forward.is_encoder_decoder or max_batch_size == 1 or not _only_linears(forward.model)
    if isolated or steady.strategy == "isolated":
        return "isolated"
    with Patches() as mine, torch.inference_mode():
        forward.decode_attention.per_sequence = True
        mine.callback(setattr, forward.decode_attention, "per_sequence", False)
        linears = steady_linears(forward.model, max_batch_size, mine, steady.products)
        if linears and (steady.strategy == "together" or _same_bits(forward, max_batch_size)):
            patches.push(mine.pop_all())
            steady.strategy = "together"
            return "together"
        steady.strategy = "isolated"
    logger.warning(
        "Deterministic mode: this model decodes one sequence at a time, as the bits of one depend on others."
    )
    return "isolated"


def steady_linears(
    model: nn.Module, max_batch_size: int, patches: Patches, known: dict[Any, Product | None] | None = None
) -> bool:
    """Let linears of a model give a row the same bits among any number of rows, in decode steps.

    Args:
        known: products that were found before, by the kind of linear; those found now are added.

    Returns:
        Whether that could be had for all of them.
    """
    known = {} if known is None else known
    for module in model.modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        weight: Any = module.weight
        kind = (type(module), weight.shape, weight.dtype, weight.is_mkldnn, module.bias is None)
        if kind not in known:
            known[kind] = _steady_product(module, max_batch_size)
        strategy = known[kind]
        if strategy is None:
            return False
        if strategy is not _as_is:
            patches.replace_forward(module, _while_decoding(module.forward, strategy))
    return True


def _while_decoding(forward: Linear, strategy: Product) -> Linear:
    def steady(input: Tensor) -> Tensor:
        if not is_decoding():
            return forward(input)
        output = strategy(forward, input.reshape(-1, input.shape[-1]))
        return output.reshape(*input.shape[:-1], output.shape[-1])

    return steady


def _as_is(product: Linear, rows: Tensor) -> Tensor:
    return product(rows)


def _at_least(floor: int, product: Linear, rows: Tensor) -> Tensor:
    return product(rows) if len(rows) >= floor else product(_filled(rows, floor))[: len(rows)]


def _in_tiles(product: Linear, rows: Tensor) -> Tensor:
    tiles = _filled(rows, -(-len(rows) // TILE) * TILE).reshape(-1, TILE, rows.shape[1])
    return torch.cat([product(tile) for tile in tiles])[: len(rows)]


def _filled(rows: Tensor, count: int) -> Tensor:
    filled = rows.new_zeros(count, rows.shape[1])
    filled[: len(rows)] = rows
    return filled


def _steady_product(module: Any, max_batch_size: int) -> Product | None:
    """How weights of this shape give the same bits among any number of rows; None if nothing that is tried does."""
    product, inputs = _telling(module, -(-max_batch_size // _FLOORS[-1]) * _FLOORS[-1])
    for floor in _FLOORS:
        expected = torch.cat([product(tile) for tile in inputs.reshape(-1, floor, inputs.shape[1])])
        counts = range(floor, max(floor, max_batch_size) + 1)
        if torch.equal(product(inputs.roll(1, 0)), expected.roll(1, 0)) and all(
            torch.equal(product(inputs[:count]), expected[:count]) for count in counts
        ):
            return _as_is if floor == 1 else partial(_at_least, floor)
    tiles = _in_tiles(product, inputs)
    return _in_tiles if torch.equal(_in_tiles(product, inputs.roll(1, 0)), tiles.roll(1, 0)) else None


def _telling(module: Any, rows: int) -> tuple[Linear, Tensor]:
    """The module's product with other numbers of the same shape, and inputs, such that all results should be zero.

    What comes out is what rounding leaves, in all bits of the result: the order of summation, which a rounded sum of
    ordinary numbers shows only now and then.
    """
    weight: Any = module.weight
    outputs, width = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(outputs, -(-width // 2), generator=generator)
    signed = torch.cat((half, -half), dim=1)[:, -width:].to(weight.dtype).to(weight.device)
    inputs = torch.randn(rows, half.shape[1], generator=generator).repeat(1, 2)[:, -width:]
    bias: Any = None if module.bias is None else torch.zeros_like(module.bias)
    inputs = inputs.to(weight.dtype).to(weight.device)
    if not isinstance(module, nn.Linear):
        transposed = signed.T.contiguous()
        return lambda x: torch.addmm(bias, x, transposed), inputs
    if weight.is_mkldnn:
        packed = torch.ops.mkldnn._reorder_linear_weight(signed)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""), inputs
    return lambda x: functional.linear(x, signed, bias), inputs


def _only_linears(model: nn.Module) -> bool:
    """Whether all weights that rows are multiplied by belong to linears: not the case for stacked experts."""
    return all(
        parameter.dim() < 2 or isinstance(module, nn.Linear | Conv1D | nn.Embedding | nn.Conv1d)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )


def _same_bits(forward: Forward, max_batch_size: int) -> bool:
    """Whether sequences of several lengths have the same logits alone and in batches of every size, in any place."""
    prompts = _prompts(forward)
    caches = [_prefilled(forward, ids[:-1]) for ids in prompts]
    try:
        expected = [_step(forward, [ids], [cache]) for ids, cache in zip(prompts, caches, strict=True)]
        for size in range(2, max_batch_size + 1):
            order = [(place + size) % len(prompts) for place in range(size)]
            logits = _step(forward, [prompts[i] for i in order], [caches[i] for i in order])
            if not torch.equal(logits, torch.cat([expected[i] for i in order])):
                return False
    except Exception as error:
        logger.info("Deterministic mode: sequences cannot be compared: %s: %s", type(error).__name__, error)
        return False
    return True


def _prompts(forward: Forward) -> list[list[int]]:
    """Arbitrary prompts of different lengths, one token more than is prefilled."""
    size = int(forward.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (length + 1,), generator=generator).tolist() for length in DETERMINISTIC.lengths]


def _prefilled(forward: Forward, ids: Sequence[int]) -> AnyCache:
    cache = new_cache(forward.model)
    forward.prefill([ids], cache)
    return cache


def _step(forward: Forward, prompts: Sequence[Sequence[int]], caches: Sequence[AnyCache]) -> Tensor:
    """Logits [rows, vocab] of a decode step over copies of these caches."""
    batch: Any = new_cache(forward.model)
    for cache in caches:
        batch.append(cache, 0)
    return forward.decode([ids[-1] for ids in prompts], [(0,)] * len(prompts), batch).clone()
