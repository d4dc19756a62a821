"""What a file system says of a model's files, by which a change is seen without reading them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass

from deployments.registry.files import ModelFile


@dataclass(frozen=True, slots=True)
class Stamp:
    """The state of some files at a moment.

    Attributes:
        files: name, size in bytes, time of the last write in ns, and inode of each.
        changed_at: when the file system last changed one of them, in seconds since the epoch.
        written_at: when the newest of them was written, in seconds since the epoch.
    """

    files: tuple[tuple[str, int, int, int], ...]
    changed_at: float
    written_at: int

    @classmethod
    def of_files(cls, files: Iterable[ModelFile]) -> Stamp:
        """The stamp of files as they are now; one that is gone is left out."""
        rows, changed, written = [], 0.0, 0.0
        for file in files:
            try:
                found = os.stat(file.path)
            except FileNotFoundError:
                continue
            rows.append((file.name, found.st_size, found.st_mtime_ns, found.st_ino))
            changed = max(changed, found.st_ctime, found.st_mtime)
            written = max(written, found.st_mtime)
        return cls(tuple(rows), changed, int(written))

    def same(self, other: Stamp) -> bool:
        """Whether nothing was written between the two."""
        return self.files == other.files

    @property
    def age(self) -> float:
        """Seconds since the last change, by this machine's clock."""
        return time.time() - self.changed_at


NOTHING = Stamp((), 0.0, 0)
"""The stamp of no files."""
