"""What a model raised while it computed a request, as the error that the client gets."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator

import torch

from deployments.core.collector import collect
from deployments.core.errors import BadRequest, ModelError, OutOfMemory, TroupeError, Unavailable, last_line

# transformers' models compare the placeholders of a prompt with what stands for them.
_MISMATCH = re.compile(
    r"features and (\w+ )?tokens do not match|tokens .*and features .*do not match|source < number of ones in mask"
)

# torch on the host; CTranslate2.
_NO_MEMORY = ("can't allocate memory", "out of memory")

# torch, ROCm's torch, CTranslate2.
_DEVICE = re.compile(r"\b(cuda|hip) error\b|\bcuda failed with error\b", re.IGNORECASE)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc


class DeviceLost(BaseException):
    """The GPU computes nothing more in this process: an illegal access, a failed assert or the like stays for ever.

    It ends the thread of an engine, so that `check` says so. Not an `Exception`: what handles the error of one request
    must not take it.
    """


def as_error(
    error: BaseException, *, alone: bool = False, failed: str = "The model failed on this request", message: str = ""
) -> TroupeError:
    """The error of one request, whether the client, the device or the model is at fault.

    Args:
        alone: nothing else was computed with it.
        failed: what raised, if nothing more is known.
        message: all that is said then.
    """
    if isinstance(error, TroupeError):
        return error
    if is_out_of_memory(error) and alone:
        return OutOfMemory(f"The device has no memory left for this request, even alone: {error}")
    if is_out_of_memory(error):
        return OutOfMemory("The device ran out of memory for this request; send a shorter one or try again.")
    # Some look for one image after the other.
    if isinstance(error, StopIteration) or _MISMATCH.search(str(error)):
        return BadRequest(
            "The placeholders in the prompt do not match its images, videos or recordings; send as many as it names, "
            f"and no placeholder tokens in texts ({last_line(error)}).",
            param="prompt",
        )
    return ModelError(message or f"{failed}: {type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host. Not what was raised because of it: see `causes`."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Whether an error says that the GPU computes nothing more in this process.

    After an out-of-memory error and after a failed capture of a graph it computes. After any other error of a GPU it is
    asked: a kernel that cannot be launched leaves it as it was.
    """
    for each in causes(error):
        if is_out_of_memory(each) or "captur" in str(each).lower():
            return False
        if isinstance(each, torch.AcceleratorError) or _DEVICE.search(str(each)):
            return not _device_computes()
    return False


def raise_if_lost(error: BaseException) -> None:
    """For the thread of an engine, which a lost GPU ends.

    Raises:
        DeviceLost: see `is_device_lost`.
    """
    if is_device_lost(error):
        raise DeviceLost(f"The GPU computes nothing more in this process: {last_line(error)}") from error


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, then those that it was raised from or that were being handled; each once, since one may be its own."""
    each: BaseException | None = error
    seen: list[BaseException] = []
    while each is not None and not any(each is other for other in seen):
        yield each
        seen.append(each)
        each = each.__cause__ or each.__context__


def _device_computes() -> bool:
    """Whether every GPU that this process uses still computes."""
    used = [i for i in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(i)]
    try:
        for index in used:
            torch.ones(1, device=torch.device("cuda", index)).add_(1).item()
    except RuntimeError:
        return False
    return bool(used)


def free_memory() -> None:
    """Give back what nobody refers to any more, that of the device included.

    The C library keeps freed memory for later: after models have come and gone, half as much again as is in use.
    """
    collect()
    if _trim is not None:
        _trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def unloading() -> TroupeError:
    """The error of a request that comes or waits while its model is being unloaded."""
    return Unavailable("The model is being unloaded; try again.")
