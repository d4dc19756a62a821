"""Folders whose files may be overwritten while a model is loaded from them.

A file that is cut short while it is mapped ends the process (SIGBUS), so such files are read.
"""

from __future__ import annotations

from pathlib import Path

from deployments.core.cgroup import free_bytes


def may_change(name: str) -> bool:
    """Whether a model lies in a folder of this machine, and its weights fit twice into free memory.

    They are in memory once as they are read, and once more until the process has given the first copy back. Files of
    the Hub's cache are never overwritten.
    """
    folder = Path(name)
    if not folder.is_dir() or any(part.startswith("models--") for part in folder.resolve().parts):
        return False
    return 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors")) < free_bytes()
