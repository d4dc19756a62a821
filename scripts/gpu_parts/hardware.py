"""Parts `facts` and `attention`: what the card can do, and what attention over many columns takes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from bench_baselines import bandwidth
from torch.nn.functional import scaled_dot_product_attention

from gpu_parts.setting import Mark, Measured, Setting

BANDWIDTHS = {"H100 PCIe": 2.0e12, "H100": 3.35e12, "H200": 4.8e12, "A100": 2.04e12, "B200": 8.0e12, "4090": 1.01e12}
"""Bytes per second of cards, by a part of their names, from their makers' sheets."""


def touched(setting: Setting) -> Measured:
    """Nothing but whether a tensor can be made on the device."""
    return {"sum": float(torch.ones(2, device=setting.device).sum())}, []


def facts(setting: Setting) -> Measured:
    """Bandwidth, products, and what the host pays for each launch and each wait."""
    copy = _copied(setting)
    side = setting.sized(8192, 128)
    square = torch.randn(side, side, device=setting.device, dtype=torch.bfloat16)
    small = torch.randn(8, device=setting.device)
    launches = setting.sized(1000, 20)

    def eager() -> None:
        for _ in range(launches):
            small.add_(1)

    def step() -> torch.Tensor:
        eager()
        return small

    replayed = setting.capture(step)
    figures = {
        "copy_gb_s": copy / 1e9,
        "read_gb_s": (copy if setting.tiny else bandwidth(setting.device)) / 1e9,
        "bf16_tflops": 2 * side**3 / setting.median(lambda: square @ square, 10) / 1e12,
        "eager_us_an_operator": 1e6 * setting.median(eager, 10) / launches,
        "graph_us_a_kernel": 1e6 * setting.median(replayed, 10) / launches,
        "tolist_us": 1e6 * setting.median(small.tolist, 100),
        "sdpa_order": _sdpa_order(),
        "flash_has_seqused_k": "seqused_k" in str(torch.ops.aten._flash_attention_forward.default._schema),
    }
    name = torch.cuda.get_device_name() if setting.is_cuda else ""
    known = next((rate for part, rate in BANDWIDTHS.items() if part in name), None)
    share = None if known is None else copy / known
    return figures, [
        setting.timed("copy, of the card's bandwidth", share, "0.8 or more", share is None or share >= 0.8)
    ]


def _copied(setting: Setting) -> float:
    """Bytes per second, read and written."""
    source = torch.empty(setting.sized(4 << 30, 1 << 24), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / setting.median(lambda: target.copy_(source), 10)


def _sdpa_order() -> str:
    order = getattr(torch._C, "_get_sdp_priority_order", None)
    return str(order()) if order is not None else "unknown"


def attention(setting: Setting) -> Measured:
    """One query of each row against columns that are half full, in every form that this torch has.

    Buffers are `[rows, heads, columns, dim]`, as the engine's. Errors are relative norms against float64.
    """
    figures: dict[str, Any] = {}
    marks: list[Mark] = []
    for dim in (128, 64):
        for rows in setting.rows:
            for columns in setting.sized_columns:
                found = _forms(setting, rows, columns, dim)
                figures[f"{rows} x {columns} x {dim}"] = found
                errors = {form: each["error"] for form, each in found.items() if "error" in each}
                worst = max(errors.values())
                marks.append(setting.mark(f"{rows} x {columns} x {dim}: error", worst, "below 0.01", worst < 0.01))
    long = figures[f"1 x {setting.sized_columns[-1]} x 128"]
    gain = long["mask"]["us"] / long["flash by lengths"]["us"] if "us" in long["flash by lengths"] else None
    marks.append(setting.timed("flash against a mask, 1 row", gain, "2 or more", gain is not None and gain >= 2))
    return figures, marks


def _forms(setting: Setting, rows: int, columns: int, dim: int) -> dict[str, dict[str, Any]]:
    dtype = torch.bfloat16 if setting.is_cuda else torch.float32
    query = torch.randn(rows, 32, 1, dim, device=setting.device, dtype=dtype)
    keys, values = (torch.randn(rows, 8, columns, dim, device=setting.device, dtype=dtype) for _ in range(2))
    # Right-aligned rows of different lengths, none longer than half of the columns.
    lengths = (torch.arange(rows, device=setting.device) % (columns // 4) + columns // 4).clamp(min=1)
    end = 3 * columns // 4
    place = torch.arange(columns, device=setting.device)
    mask = ((place >= end - lengths[:, None]) & (place < end))[:, None, None]
    bias = torch.zeros(mask.shape, device=setting.device, dtype=dtype).masked_fill_(~mask, -math.inf)
    expected = scaled_dot_product_attention(query.double(), keys.double(), values.double(), mask, enable_gqa=True)
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "mask": lambda: scaled_dot_product_attention(query, keys, values, mask, enable_gqa=True),
        "additive mask": lambda: scaled_dot_product_attention(query, keys, values, bias, enable_gqa=True),
        "flash by lengths": lambda: _flash(query, keys, values, end - lengths, lengths),
    }
    found = {name: _measured(setting, form, expected) for name, form in forms.items()}
    whole = setting.median(lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True))
    found["no mask, all columns"] = {"us": 1e6 * whole}
    return found


def _measured(setting: Setting, form: Callable[[], torch.Tensor], expected: torch.Tensor) -> dict[str, Any]:
    """Error and microseconds of one call, of twenty in a graph."""
    try:
        error = float((form().double() - expected).norm() / expected.norm())
    except (RuntimeError, TypeError, NotImplementedError) as reason:
        return {"skipped": str(reason).splitlines()[0][:200]}

    def many() -> torch.Tensor:
        for _ in range(20):
            output = form()
        return output

    replay = setting.capture(many)
    return {"error": error, "us": 1e6 * setting.median(replay, 20) / 20, "kernels": kernels(setting, form)}


def _flash(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Flash attention with a length for each row, over the engine's buffers without a copy of them."""
    rows, heads, columns, _ = keys.shape
    starts = torch.arange(rows, device=keys.device) * heads * columns + first
    starts = torch.cat((starts, starts[-1:] + columns)).int()
    output = torch.ops.aten._flash_attention_forward(
        query[:, :, 0],
        token_major(keys),
        token_major(values),
        torch.arange(rows + 1, device=keys.device, dtype=torch.int32),
        starts,
        1,
        columns,
        0.0,
        False,
        False,
        seqused_k=lengths.int(),
    )[0]
    return output[:, :, None]


def token_major(buffer: torch.Tensor) -> torch.Tensor:
    """A buffer `[rows, heads, columns, dim]` as tokens `[n, heads, dim]`, without a copy.

    Column c of row r is token r * heads * columns + c.
    """
    rows, heads, columns, dim = buffer.shape
    return buffer.as_strided(((rows - 1) * heads * columns + columns, heads, dim), (dim, columns * dim, 1))


def kernels(setting: Setting, call: Callable[[], Any], most: int = 6) -> list[str]:
    """Names of the kernels that take most time, with microseconds."""
    if not setting.is_cuda:
        return []
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    found = sorted(trace.key_averages(), key=lambda each: -each.self_device_time_total)[:most]
    return [f"{each.key[:90]}: {each.self_device_time_total:.1f}" for each in found if each.self_device_time_total]
