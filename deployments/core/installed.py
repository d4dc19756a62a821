"""The versions of installed packages, this one's included."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "troupe-serve"
"""The name that this package is installed by."""


def installed_version(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def server_version() -> str:
    """The version of this package; 0 if it is not installed."""
    return installed_version(DISTRIBUTION) or "0"
