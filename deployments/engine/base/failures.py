"""What a model raised while it computed a request, as the error that the client gets."""

from __future__ import annotations

import re

import torch

from deployments.core.collector import collect
from deployments.core.errors import BadRequest, ModelError, OutOfMemory, TroupeError, Unavailable, last_line

# transformers' models compare the placeholders of a prompt with what stands for them.
_MISMATCH = re.compile(
    r"features and (\w+ )?tokens do not match|tokens .*and features .*do not match|source < number of ones in mask"
)

# torch on the host; CTranslate2.
_NO_MEMORY = ("can't allocate memory", "out of memory")


def as_error(error: Exception, *, alone: bool = False, failed: str = "The model failed on this request") -> TroupeError:
    """The error of one request, whether the client, the device or the model is at fault.

    Args:
        alone: nothing else was computed with it.
        failed: what raised, if nothing more is known.
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
    return ModelError(f"{failed}: {type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in _NO_MEMORY)


def free_memory() -> None:
    """Give back what nobody refers to any more, that of the device included."""
    collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def unloading() -> TroupeError:
    """The error of a request that comes or waits while its model is being unloaded."""
    return Unavailable("The model is being unloaded; try again.")
