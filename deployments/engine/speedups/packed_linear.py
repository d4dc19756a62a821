"""Linear weights packed once for the CPU, instead of at every call.

oneDNN multiplies with weights in a blocked layout. A plain `nn.Linear` has its weight reordered into it at every call,
which in a decode step of few sequences costs more than the product itself. What inductor's freezing does to a compiled
model is done here to a stock one: the weight is reordered once, and the same kernel is called with it. Results have
the same bits, which is checked.

A packed module keeps its `weight`, in the opaque layout: dtype and shape can be read, `weight.to_dense()` gives the
plain tensor, and so does `state_dict()`. Moving, casting or deep-copying the model has to wait until it is undone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.engine.model.forward_hooks import listening
from deployments.engine.model.patches import Patches
from deployments.engine.verify.proofs import PACKED

logger = logging.getLogger("troupe.engine")

_TIED_SHARE = 1 / 3
_REPEATS = 9
_SLOWER = 1.1
_PATIENCE_S = 0.3
"""How long a packed kernel that seems slower is measured on: the start of a server keeps every core busy."""
_Shape = tuple[int, int]
Recall = Callable[[Callable[[], frozenset[_Shape]]], frozenset[_Shape]]


def _measured_now(measure: Callable[[], frozenset[_Shape]]) -> frozenset[_Shape]:
    return measure()


def pack_linears(
    model: nn.Module, patches: Patches, wanted: bool | None = None, *, recall: Recall = _measured_now
) -> int:
    """Pack a model's linear weights in place.

    Only weights in bfloat16 or float16 on the CPU, of plain `nn.Linear` modules whose forward nobody has replaced;
    in float32 the packed kernel is another one, with other bits. Modules that a loader has attached hooks to are
    left alone with all they contain. The plain weights are released, except one that is tied to an embedding: it
    is packed beside, if it is less than a third of the model.

    Args:
        model: not being run by anyone else meanwhile.
        patches: gives every module its own parameter and forward back.
        wanted: False packs nothing; True packs what keeps its bits; None packs it unless a quick measurement says
            that it is slower on this machine. What this processor has no such kernel for stays plain, and the log
            says so.
        recall: gives the shapes that were found for another model of the same kind; else it measures them.

    Returns:
        How many modules are packed.
    """
    groups = {} if wanted is False else _packable(model)
    with _writable():
        good = recall(lambda: _shapes(groups, wanted)) if groups else frozenset()
        groups = {key: modules for key, modules in groups.items() if _shape(modules[0]) in good}
        tied = _tied(model)
        for key, modules in groups.items():
            _pack(modules, patches, tied=key in tied)
    return sum(map(len, groups.values()))


def _shapes(groups: dict[int, list[nn.Linear]], wanted: bool | None) -> frozenset[_Shape]:
    """The shapes of the weights that are to be packed."""
    shapes = {_shape(modules[0]) for modules in groups.values()}
    good = {shape for shape in shapes if torch._C._has_mkldnn and _same_bits(groups, shape)}
    if good != shapes:
        _say_what_stays_plain(len(shapes - good), len(shapes), asked=wanted is True)
    kept = [modules[0] for modules in groups.values() if _shape(modules[0]) in good]
    return frozenset(good if kept and (wanted or not _slower(kept)) else ())


@contextmanager
def _writable() -> Iterator[None]:
    """Parameters made here are ordinary ones, whatever mode the caller is in."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _pack(modules: list[nn.Linear], patches: Patches, *, tied: bool) -> None:
    """Pack one weight, used by all these modules."""
    plain: Any = modules[0].weight
    weight = nn.Parameter(_reordered(plain.detach()), requires_grad=False)
    if not tied:
        plain.data = plain.data.new_empty(0)
        patches.callback(_restore_data, plain, weight)
    for module in modules:
        patches.callback(setattr, module, "weight", plain)
        module.weight = weight
        patches.replace_forward(module, _forward(module, weight))
        register: Any = module.register_state_dict_post_hook
        patches.callback(register(_dense_in_state_dict).remove)


def _forward(module: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """The forward of a packed module. What the kernel cannot do, gradients and casts, is done with the plain weight."""
    linear, dtype = torch.ops.mkldnn._linear_pointwise, weight.dtype

    def forward(input: Tensor) -> Tensor:
        if input.dtype is not dtype or (input.requires_grad and torch.is_grad_enabled()):
            return functional.linear(input, weight.to_dense(), module.bias)
        output: Tensor = linear(input, weight, module.bias, "none", [], "")
        return output

    return forward


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Packed modules call their kernel in a form that `torch.jit.trace` can record: it knows no empty list."""
    scripted: Any = torch.jit.script(_product)
    with Patches() as patches:
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.is_mkldnn:
                forward = partial(scripted, weight=weight, bias=module._parameters.get("bias"))
                patches.replace_forward(module, forward)
        yield


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The packed kernel. Plain enough to be scripted."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output


def _packable(model: nn.Module) -> dict[int, list[nn.Linear]]:
    """The modules that can be packed, by weight."""
    groups: dict[int, list[nn.Linear]] = {}
    # A hook may read or change the weights within its module.
    heard = {id(weight) for _, module, _ in listening(model) for weight in module.parameters()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if type(module) is not nn.Linear or "forward" in vars(module) or id(weight) in heard:
            continue
        if _is_plain(weight):
            groups.setdefault(id(module.weight), []).append(module)
    total = sum(parameter.nbytes for parameter in model.parameters())
    tied = _tied(model)
    return {
        key: modules
        for key, modules in groups.items()
        if key not in tied or modules[0].weight.nbytes < total * _TIED_SHARE
    }


def _is_plain(weight: Any) -> bool:
    return (
        type(weight) is nn.Parameter
        and type(weight.data) is Tensor
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and weight.dtype in (torch.bfloat16, torch.float16)
    )


def _tied(model: nn.Module) -> set[int]:
    """The parameters that modules use which will not be packed, by id."""
    return {
        id(parameter)
        for owner in model.modules()
        for name, parameter in owner._parameters.items()
        if not (type(owner) is nn.Linear and "forward" not in vars(owner) and name == "weight")
    }


def _shape(module: nn.Linear) -> _Shape:
    return (module.out_features, module.in_features)


def _reordered(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _same_bits(groups: dict[int, list[nn.Linear]], shape: _Shape) -> bool:
    """Whether the packed kernel gives the bits of the plain one for weights of this shape."""
    module = next(modules[0] for modules in groups.values() if _shape(modules[0]) == shape)
    plain, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    try:
        packed = _reordered(plain)
        return torch.equal(packed.to_dense(), plain) and all(
            torch.equal(functional.linear(input, plain, bias), _product(input, packed, bias))
            for input in _inputs(plain)
        )
    except (RuntimeError, AttributeError):  # a processor, or a build of torch, without the kernel
        return False


def _say_what_stays_plain(count: int, shapes: int, *, asked: bool) -> None:
    logger.log(
        logging.WARNING if asked else logging.INFO,
        "pack_linears: weights of %d of %d shapes stay plain, because this processor (%s) has no packed kernel for "
        "them with the same bits.",
        count,
        shapes,
        torch.backends.cpu.get_cpu_capability(),
    )


def _slower(modules: list[nn.Linear]) -> bool:
    """Whether the packed kernel takes clearly more time on the weights that make up most of the model."""
    shapes = [_shape(module) for module in modules]
    heaviest = max(set(shapes), key=lambda shape: shapes.count(shape) * shape[0] * shape[1])
    plain = modules[shapes.index(heaviest)].weight.detach()
    packed = _reordered(plain)
    for input in _inputs(plain):
        times = _times_as_long(partial(_product, input, packed, None), partial(functional.linear, input, plain))
        if times > _SLOWER:
            logger.info(
                "pack_linears: weights stay plain, because packed ones of %d x %d take %.2f times as long here with "
                "%d rows. `pack_linears: true` packs them all the same.",
                *plain.shape,
                times,
                len(input),
            )
            return True
    return False


def _inputs(weight: Tensor) -> Iterator[Tensor]:
    """Inputs of several row counts, the same every time and whatever the global random state."""
    generator = torch.Generator().manual_seed(0)
    for rows in PACKED.lengths:
        yield torch.randn(rows, weight.shape[1], generator=generator).to(weight.dtype)


def _times_as_long(packed: Callable[[], Any], plain: Callable[[], Any]) -> float:
    """The time of one over that of the other, of the fastest of several calls in turns.

    If the packed one seems slower, more calls follow: a core that is taken away for a moment slows all of the first.
    """
    fastest = plain_fastest = math.inf
    end, calls = time.perf_counter() + _PATIENCE_S, 0
    while calls < _REPEATS or (fastest > _SLOWER * plain_fastest and time.perf_counter() < end):
        plain_fastest = min(plain_fastest, _seconds(plain))
        fastest = min(fastest, _seconds(packed))
        calls += 1
    return fastest / plain_fastest


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _dense_in_state_dict(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.is_mkldnn:
        state[f"{prefix}weight"] = weight.to_dense()


@_writable()
def _restore_data(plain: Tensor, packed: Tensor) -> None:
    plain.data = packed.to_dense()
