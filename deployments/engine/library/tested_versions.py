"""The newest versions of libraries that the tests have run with, and a warning about newer ones."""

from __future__ import annotations

import logging
import re
from importlib.metadata import version

logger = logging.getLogger("troupe.host")

TRANSFORMERS = "5.24.0"
"""What `scripts/test --newest` last ran with. It names a newer one: raise this if all else passes."""


def warn_of_untested_transformers() -> None:
    """Log one warning if the installed transformers is newer than the last one tested."""
    installed = version("transformers")
    if _numbers(installed) > _numbers(TRANSFORMERS):
        logger.warning(
            "transformers %s is installed; the newest version that Troupe is tested with is %s. As ever, a model is "
            "batched only if its answers are those of its own generate, which is tried when it loads.",
            installed,
            TRANSFORMERS,
        )


def _numbers(found: str) -> tuple[int, ...]:
    """Major, minor and patch number."""
    return tuple(int(number) for number in re.findall(r"\d+", found)[:3])
