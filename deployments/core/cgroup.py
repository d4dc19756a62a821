"""What the control groups of this process leave it of the machine's memory and cores.

A container, a service manager or a batch system (Slurm) sets its limits on a group that may be anywhere above the
process's own, so every group up to the root counts. Versions 1 and 2 of the interface are read, see cgroups(7).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def free_bytes(root: Path = ROOT) -> int:
    """Free memory of the machine or of a group, whichever is least; page cache counts as free.

    Args:
        root: where `proc` and `sys` are.
    """
    free = [_meminfo(root, "MemAvailable")]
    for group in _groups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _number(group / limit), _number(group / used)
            if most is not None and now is not None:
                free.append(most - now + _reclaimable(group / "memory.stat"))
    return max(0, min(free))


def total_bytes(root: Path = ROOT) -> int:
    """Memory of the machine or the limit of a group, whichever is least."""
    most = [_meminfo(root, "MemTotal")]
    for group in _groups(root, "memory"):
        limits = (_number(group / name) for name in ("memory.max", "memory.limit_in_bytes"))
        most += [limit for limit in limits if limit is not None]
    return min(most)


def cores(root: Path = ROOT) -> int:
    """Cores that this process may use: by its affinity, and by the processor time of its groups, rounded up."""
    here = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, min([len(here), *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Processor time per time, of each group that has a limit."""
    for group in _groups(root, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of the process's group and those above it, as far as they are there.

    In a container the path may be the host's, of which only the root is there: the container's own group.
    """
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if names and controller not in names.split(","):
            continue
        top = mount / controller if names else mount
        own = top / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(top) and group.is_dir())


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _reclaimable(path: Path) -> int:
    """Page cache that the kernel gives back before it refuses memory."""
    stat = dict(line.split() for line in _text(path).splitlines())
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _meminfo(root: Path, key: str) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: Path) -> str:
    """A file's text; empty if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
