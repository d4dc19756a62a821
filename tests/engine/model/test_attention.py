"""Attention of decode steps: what transformers' own computes, in fewer or other products."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from deployments.engine.model.attention import DecodeAttention, is_decoding, planned_attention
from deployments.engine.model.forward import Forward
from tests.engine.lacking import is_older
from tests.tiny import llama

ROWS, WIDTH, DIM = 5, 70, 16
LENGTHS = [70, 3, 41, 1, 64]


def tensors(heads: int, key_heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, 1, heads, DIM, generator=generator).transpose(1, 2)
    key = torch.randn(ROWS, key_heads, WIDTH + 9, DIM, generator=generator)[:, :, 5 : 5 + WIDTH]
    value = torch.randn(ROWS, key_heads, WIDTH + 9, DIM, generator=generator)[:, :, 5 : 5 + WIDTH]
    return query.to(dtype), key.to(dtype), value.to(dtype)


def padding(lengths: list[int] = LENGTHS) -> Tensor:
    return (torch.arange(WIDTH) >= WIDTH - torch.tensor(lengths)[:, None])[:, None, None]


def module(heads: int, key_heads: int) -> nn.Module:
    layer = nn.Module()
    layer.num_key_value_groups = heads // key_heads
    return layer


def both(heads: int, key_heads: int, mask: Tensor | None, *, apart: bool = False, **kwargs: object) -> list[Tensor]:
    """Stock and ours."""
    query, key, value = tensors(heads, key_heads)
    layer = module(heads, key_heads)
    stock, _ = sdpa_attention_forward(layer, query, key, value, mask, **kwargs)
    with DecodeAttention(per_sequence=apart):
        ours, _ = AttentionInterface()["sdpa"](layer, query, key, value, mask, **kwargs)
    return [stock, ours]


HEADS = pytest.mark.parametrize(("heads", "key_heads"), [(8, 2), (8, 8), (8, 1)])


@HEADS
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("mask", [None, padding(), padding([70, 69, 70, 68, 70])], ids=["none", "ragged", "even"])
def test_equal_to_the_stock_attention(heads: int, key_heads: int, mask: Tensor | None, apart: bool) -> None:
    stock, ours = both(heads, key_heads, mask, apart=apart, scaling=0.2)
    assert ours.shape == stock.shape == (ROWS, 1, heads, DIM)
    torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-5)


@HEADS
def test_masks_with_holes_and_masks_per_head(heads: int, key_heads: int) -> None:
    holes = padding()
    holes[0, 0, 0, 20:30] = False
    per_head = torch.randn(ROWS, heads, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    for mask in (holes, per_head):
        for apart in (False, True):
            stock, ours = both(heads, key_heads, mask, apart=apart)
            torch.testing.assert_close(ours, stock, atol=1e-6, rtol=1e-5)


@HEADS
def test_bfloat16_is_as_close_to_the_truth(heads: int, key_heads: int) -> None:
    query, key, value = tensors(heads, key_heads, torch.bfloat16)
    layer = module(heads, key_heads)
    truth, _ = sdpa_attention_forward(layer, query.float(), key.float(), value.float(), padding())
    with DecodeAttention():
        ours, _ = AttentionInterface()["sdpa"](layer, query, key, value, padding())
    assert ours.dtype is torch.bfloat16
    torch.testing.assert_close(ours.float(), truth, atol=2e-2, rtol=2e-2)


@HEADS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_separately_a_sequence_has_the_bits_it_has_alone(heads: int, key_heads: int, dtype: torch.dtype) -> None:
    query, key, value = tensors(heads, key_heads, dtype)
    layer = module(heads, key_heads)
    with DecodeAttention(per_sequence=True):
        together, _ = AttentionInterface()["sdpa"](layer, query, key, value, padding())
        for row, length in enumerate(LENGTHS):
            own = slice(WIDTH - length, WIDTH)
            alone, _ = AttentionInterface()["sdpa"](
                layer,
                query[row : row + 1],
                key[row : row + 1, :, own].clone(),
                value[row : row + 1, :, own].clone(),
                None,
            )
            assert torch.equal(together[row], alone[0])


def test_outside_of_a_step_and_in_other_threads_it_is_the_stock_one() -> None:
    query, key, value = tensors(8, 2, torch.bfloat16)
    layer, seen = module(8, 2), []
    stock, _ = sdpa_attention_forward(layer, query, key, value, None)

    def elsewhere() -> None:
        seen.append((is_decoding(), AttentionInterface()["sdpa"](layer, query, key, value, None)[0]))

    with DecodeAttention():
        assert is_decoding()
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    elsewhere()
    assert [inside for inside, _ in seen] == [False, False]
    assert all(torch.equal(output, stock) for _, output in seen)


def test_what_it_does_not_know_goes_to_the_stock_one() -> None:
    query, key, value = tensors(8, 2)
    layer, attention = module(8, 2), AttentionInterface()
    bias = torch.randn(ROWS, 8, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    stock, _ = sdpa_attention_forward(layer, query, key, value, padding(), position_bias=bias)
    with DecodeAttention():
        ours, _ = attention["sdpa"](layer, query, key, value, padding(), position_bias=bias)
        if not is_older():
            with pytest.raises(ValueError, match="softcap"):
                attention["sdpa"](layer, query, key, value, padding(), softcap=30.0)
    assert torch.equal(ours, stock)


def test_cudnn_attends_only_where_a_step_is_captured() -> None:
    """Its plan of each new shape takes longer than a decode step; a captured step has one shape."""
    Forward(llama())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    with planned_attention():
        assert torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
