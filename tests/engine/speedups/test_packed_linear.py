"""Packed linears: the same bits, no second copy of the weights, and a model that is as it was afterwards.

A processor without packed kernels that keep the bits (x86 without AVX512, for example) packs less or nothing. Tests of
what is packed are skipped there; all others hold on any processor.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deployments.engine.model.patches import Patches
from deployments.engine.speedups.packed_linear import pack_linears
from tests.tiny import llama

pytestmark = pytest.mark.usefixtures("all_is_walked")

BF16 = torch.bfloat16
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def model() -> nn.Module:
    return llama(tie_word_embeddings=False).to(BF16)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        out: torch.Tensor = model(IDS).logits
    return out


def keeps_its_bits(linear: nn.Linear) -> bool:
    """Whether this processor has a packed kernel for a weight, with the bits of the plain one."""
    weight, bias = linear.weight.detach(), linear.bias
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(n, weight.shape[1], generator=generator).to(weight.dtype) for n in (1, 2, 8, 24, 33)]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        product = torch.ops.mkldnn._linear_pointwise
        with torch.no_grad():
            return all(torch.equal(linear(x), product(x, packed, bias, "none", [], "")) for x in inputs)
    except (RuntimeError, AttributeError):
        return False


def need_packed_kernels(model: nn.Module) -> None:
    """Skip a test on a processor that cannot pack every linear of its model."""
    if not all(keeps_its_bits(module) for module in model.modules() if type(module) is nn.Linear):
        capability = torch.backends.cpu.get_cpu_capability()
        pytest.skip(f"this processor ({capability}) has no packed kernels with the bits of the plain ones")


def test_the_same_bits(model: nn.Module) -> None:
    """On any processor: what it cannot pack is left as it is."""
    before = logits(model)
    pack_linears(model, Patches(), True)
    assert torch.equal(logits(model), before)


def test_every_linear_is_packed(model: nn.Module) -> None:
    need_packed_kernels(model)
    assert pack_linears(model, Patches(), True) == 2 * 7 + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [True, None])
def test_what_the_processor_cannot_pack_stays_plain_and_is_logged(
    wanted: bool | None, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)).to(dtype)
    able = [module for module in model if keeps_its_bits(module)]
    with caplog.at_level(logging.INFO, "troupe.engine"):
        packed = pack_linears(model, Patches(), wanted)
    if wanted or not able:
        assert packed == len(able)
    said = [record for record in caplog.records if "shapes stay plain" in record.getMessage()]
    if len(able) == len(model):
        assert not said
    else:
        (record,) = said
        assert f"weights of {len(model) - len(able)} of 2 shapes stay plain" in record.getMessage()
        assert record.levelno == (logging.WARNING if wanted else logging.INFO)


def test_with_biases_and_any_shape_of_input() -> None:
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(80, 48).to(BF16))
    inputs = [torch.randn(*shape, 80, dtype=BF16) for shape in [(), (1,), (5,), (2, 3), (2, 1, 4)]]
    inputs.append(torch.randn(4, 160, dtype=BF16)[:, ::2])
    with torch.no_grad():
        before = [linear(x) for x in inputs]
        pack_linears(linear, Patches(), True)
        assert all(torch.equal(linear(x), y) for x, y in zip(inputs, before, strict=True))


def test_undo_gives_the_very_parameters_back(model: nn.Module) -> None:
    before, bits, expected = dict(model.named_parameters()), copy.deepcopy(model.state_dict()), logits(model)
    patches = Patches()
    pack_linears(model, patches, True)
    with torch.inference_mode():
        patches.close()
    patches.close()
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(logits(model), expected)
    model(IDS).logits.float().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    copy.deepcopy(model)


def test_plain_weights_are_released(model: nn.Module) -> None:
    need_packed_kernels(model)
    weight = model.get_submodule("model.layers.0.mlp.up_proj").weight
    before = weight.untyped_storage().nbytes()
    pack_linears(model, Patches(), True)
    gc.collect()
    assert before > 0
    assert weight.untyped_storage().nbytes() == 0


def test_a_tied_head_is_packed_beside_its_embedding() -> None:
    tied = llama(tie_word_embeddings=True).to(BF16)
    need_packed_kernels(tied)
    expected = logits(tied)
    patches = Patches()
    packed = pack_linears(tied, patches, True)
    assert packed == 2 * 7 + 1
    assert tied.get_input_embeddings().weight.layout is torch.strided
    assert torch.equal(logits(tied), expected)
    patches.close()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_tied_head_that_is_most_of_the_model_is_left_alone() -> None:
    tied = llama(tie_word_embeddings=True, vocab_size=4000).to(BF16)
    need_packed_kernels(tied)
    packed = pack_linears(tied, Patches(), True)
    assert packed == 2 * 7
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_one_weight_in_two_linears_is_packed_once() -> None:
    pair = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)).to(BF16)
    pair[1].weight = pair[0].weight
    need_packed_kernels(pair)
    patches = Patches()
    packed = pack_linears(pair, patches, True)
    assert packed == 2
    assert pair[0].weight is pair[1].weight
    patches.close()
    assert pair[0].weight is pair[1].weight
    assert pair[0].weight.shape == (32, 32)


def test_what_user_code_reads_still_works(model: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(model.state_dict())
    pack_linears(model, Patches(), True)
    head = model.get_output_embeddings()
    assert head.weight.dtype is BF16
    assert head.weight.shape == (261, 48)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    saved = type(model).from_pretrained(tmp_path, dtype=BF16).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in saved.items())


def test_gradients_and_other_dtypes_take_the_plain_way(model: nn.Module) -> None:
    embedded = model.get_input_embeddings()(IDS).detach()
    expected = embedded.clone().requires_grad_()
    model(inputs_embeds=expected).logits.float().sum().backward()
    pack_linears(model, Patches(), True)
    given = embedded.clone().requires_grad_()
    model(inputs_embeds=given).logits.float().sum().backward()
    assert torch.equal(given.grad, expected.grad)
    with pytest.raises(RuntimeError):
        model.get_output_embeddings()(torch.zeros(1, 48))


@pytest.mark.parametrize("wanted", [True, None, False])
def test_float32_is_left_alone(wanted: bool | None) -> None:
    model = llama()
    assert pack_linears(model, Patches(), wanted) == 0


def test_subclasses_and_replaced_forwards_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    replaced = nn.Linear(32, 32).to(BF16)
    replaced.forward = lambda x: x
    model = nn.Sequential(Own(32, 32).to(BF16), replaced, nn.Linear(32, 32).to(BF16))
    need_packed_kernels(model[2])
    assert pack_linears(model, Patches(), True) == 1
    assert pack_linears(model, Patches(), True) == 0


def test_measured_or_not_wanted(model: nn.Module) -> None:
    assert pack_linears(model, Patches(), False) == 0
    expected = logits(model)
    pack_linears(model, Patches())
    assert torch.equal(logits(model), expected)


class Disturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Packed products take 5 ms longer for some seconds, as if their core worked for another process."""

    def __init__(self, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.end = time.perf_counter() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.mkldnn._linear_pointwise.default and time.perf_counter() < self.end:
            time.sleep(0.005)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("seconds", "packed"), [(0.1, 2), (math.inf, 0)])
def test_a_disturbance_at_the_measurement_decides_nothing(
    seconds: float, packed: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)).to(BF16)
    for module in model:
        need_packed_kernels(module)
    if not pack_linears(copy.deepcopy(model), Patches()):
        pytest.skip("packed weights are slower on this processor")
    with caplog.at_level(logging.INFO, "troupe.engine"), Disturbed(seconds):
        assert pack_linears(model, Patches()) == packed
    assert ("times as long here with 1 rows" in caplog.text) is (packed == 0)


def test_weights_that_a_hook_may_read_or_change_are_left_alone() -> None:
    """Its own module's and those below; hooks of other modules run as before."""
    hooked = llama().bfloat16()
    layer = hooked.model.layers[0]
    hooked.lm_head.weight = torch.nn.Parameter(hooked.lm_head.weight.clone())
    need_packed_kernels(hooked)
    seen: list[torch.Tensor] = []

    def halve(module: Any, args: Any) -> None:
        seen.append(module.self_attn.q_proj.weight.float().sum())
        module.self_attn.q_proj.weight.data.mul_(0.5)

    layer.register_forward_pre_hook(halve)
    before = logits(hooked)
    patches = Patches()
    packed = pack_linears(hooked, patches, True)
    assert packed == 8
    assert not layer.mlp.up_proj.weight.is_mkldnn
    assert not torch.equal(logits(hooked), before)
    assert len(seen) == 2
    assert torch.isclose(seen[1], seen[0] / 2, rtol=1e-3)
    patches.close()


def test_linears_that_share_a_weight_with_a_hooked_one_are_left_alone() -> None:
    first, second = nn.Linear(32, 32, dtype=torch.bfloat16), nn.Linear(32, 32, dtype=torch.bfloat16)
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    first.register_forward_hook(lambda *args: None)
    assert pack_linears(both, Patches(), True) == 0
    assert first.weight.numel() == 1024
