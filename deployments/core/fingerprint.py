"""Fingerprints: names for what computed an answer.

`troupe-w<12>-s<12>` has 12 hex digits of a digest of the weights, the tokenizer and the chat template, and 12 of how
they are served: the loader and its arguments, options of the engine, the device, versions of packages.
"""

from __future__ import annotations

import hashlib
import re

from deployments.core.errors import BadRequest, VersionMismatch

EXPECT_HEADER = "x-troupe-expect"
_DIGITS = 12
_EXPECTED = re.compile(r"(?:troupe-)?(w[0-9a-f]{12})(?:-s[0-9a-f]{12})?")


def fingerprint(weights: str, setup: str) -> str:
    """The fingerprint of two digests in hex."""
    return f"troupe-w{weights[:_DIGITS]}-s{setup[:_DIGITS]}"


def combined(base: str, weights: str, setup: str) -> tuple[str, str]:
    """The two digests, in hex, of the fingerprint of an adapter over a base.

    Args:
        base: fingerprint of the base.
        weights, setup: digests of the adapter's files, and of how it is served.
    """
    base_weights, _, base_setup = base.removeprefix("troupe-").partition("-")
    return _digest(base_weights, weights), _digest(base_setup, setup)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def weights_of(fingerprint: str) -> str:
    """The part of a fingerprint that names the weights, `w<12>`."""
    return fingerprint.removeprefix("troupe-").partition("-")[0]


def expected_weights(asked: str) -> str:
    """The weights that a request asks for, `w<12>`, from these alone or from a whole fingerprint.

    Raises:
        BadRequest: it is neither.
    """
    match = _EXPECTED.fullmatch(asked.strip().lower())
    if match is None:
        raise BadRequest(
            f"Invalid header {EXPECT_HEADER}: {asked[:80]!r}; send a fingerprint, or its part w and 12 hex digits.",
            param=EXPECT_HEADER,
        )
    return match[1]


def check_expected(model: str, found: str, expected: str) -> None:
    """Refuse a call for other weights than those that are served.

    Args:
        found: the fingerprint of the model that would answer.
        expected: `w<12>`; empty accepts any.

    Raises:
        VersionMismatch: the weights are others.
    """
    if expected and weights_of(found) != expected:
        raise VersionMismatch(
            f"The weights of model {model!r} are {weights_of(found)}; the request expects {expected}. The model's "
            "files were rewritten, or the name means another model. Begin the run again with the new weights."
        )
