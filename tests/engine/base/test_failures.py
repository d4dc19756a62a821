"""Which errors of a GPU end an engine, and which pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deployments.core.errors import ModelError
from deployments.engine.base.failures import DeviceLost, causes, is_device_lost, raise_if_lost

ASSERTED = torch.AcceleratorError("CUDA error: device-side assert triggered")


def raised(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (ASSERTED, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("HIP error: unspecified launch failure"), True),
        (RuntimeError("CUDA failed with error an illegal memory access was encountered"), True),
        (raised(ModelError("Hook generate failed: RuntimeError"), ASSERTED), True),
        (raised(ASSERTED.__class__("CUDA error: unknown error"), torch.OutOfMemoryError("CUDA out of memory")), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA failed with error out of memory"), False),
        (torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"), False),
        (raised(RuntimeError("CUDA error: operation failed due to a previous error during capture"), ASSERTED), False),
        (RuntimeError("a relationship error"), False),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors_after_which_a_gpu_computes_nothing(error: Exception, lost: bool) -> None:
    assert is_device_lost(error) is lost


@pytest.mark.parametrize("computes", [True, False])
def test_a_gpu_that_can_be_asked_decides(monkeypatch: pytest.MonkeyPatch, computes: bool) -> None:
    """A kernel that cannot be launched leaves a GPU as it was; an assert that failed does not."""
    asked: list[torch.device] = []
    one = torch.ones(1)

    def ones(size: int, device: torch.device) -> Any:
        asked.append(device)
        if not computes:
            raise ASSERTED
        return one

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: (1 << 20) * (index == 2))
    monkeypatch.setattr(torch, "ones", ones)
    error = torch.AcceleratorError("CUDA error: invalid configuration argument")
    assert is_device_lost(error) is not computes
    assert asked == [torch.device("cuda", 2)], "only those that this process uses"


def test_handlers_of_a_request_leave_a_lost_gpu_to_the_engine() -> None:
    with pytest.raises(DeviceLost, match="device-side assert triggered") as caught:
        raise_if_lost(ASSERTED)
    assert not isinstance(caught.value, Exception)


def test_an_error_that_was_raised_from_itself() -> None:
    """A generate hook's own error is handed on with `raise error from error`."""
    error = ModelError("a hook has failed")
    raised(error, error)
    assert list(causes(error)) == [error]
    assert not is_device_lost(error)
