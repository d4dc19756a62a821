"""What a model raised while it computed a request, as the error that the client gets."""

from __future__ import annotations

import re

import torch

from deployments.core.errors import BadRequest, ModelError, OutOfMemory, TroupeError, last_line

# transformers' models compare the placeholders of a prompt with what stands for them.
_MISMATCH = re.compile(
    r"features and (\w+ )?tokens do not match|tokens .*and features .*do not match|source < number of ones in mask"
)


def as_error(error: Exception, *, alone: bool = False) -> TroupeError:
    """The error of one request, whether the client, the device or the model is at fault.

    Args:
        alone: nothing else was computed with it.
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
    return ModelError(f"The model failed on this request: {type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
