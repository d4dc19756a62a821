"""What control groups leave a process: trees of files as the kernel shows them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from deployments.core.cgroup import cores, free_bytes

GIB = 1 << 30


def tree(root: Path, group: str, files: dict[str, str | int]) -> Path:
    """A machine with 64 GiB free whose process is in these groups."""
    for name, text in {"proc/meminfo": f"MemAvailable: {64 << 20} kB", "proc/self/cgroup": group, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


def memory(folder: str, limit: int | str, used: int, cache: int = 0) -> dict[str, str | int]:
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon {used - cache}\ninactive_file {cache}",
    }


def test_without_limits_it_is_the_machines(tmp_path: Path) -> None:
    assert free_bytes(tree(tmp_path, "0::/", {})) == 64 * GIB


@pytest.mark.parametrize(
    ("group", "folder"),
    [
        ("0::/", ""),
        ("0::/system.slice/troupe.service", "/system.slice/troupe.service"),
        ("0::/slurm/job_7/step_0", "/slurm/job_7"),
        ("0::/docker/4f1c", ""),
    ],
    ids=["container", "service", "a group above", "a container that sees the host's path"],
)
def test_the_groups_limit_less_what_is_used_counts_its_cache_as_free(tmp_path: Path, group: str, folder: str) -> None:
    files = memory(f"sys/fs/cgroup{folder}", 8 * GIB, 5 * GIB, cache=GIB)
    assert free_bytes(tree(tmp_path, group, files)) == 4 * GIB


def test_the_least_of_all_groups_counts(tmp_path: Path) -> None:
    files = {
        **memory("sys/fs/cgroup/a", 16 * GIB, 13 * GIB),
        **memory("sys/fs/cgroup/a/b", 8 * GIB, 2 * GIB),
        **memory("sys/fs/cgroup/a/b/c", "max", 2 * GIB),
    }
    assert free_bytes(tree(tmp_path, "0::/a/b/c", files)) == 3 * GIB


def test_more_used_than_allowed_leaves_nothing(tmp_path: Path) -> None:
    assert free_bytes(tree(tmp_path, "0::/", memory("sys/fs/cgroup", GIB, 2 * GIB))) == 0


def test_version_1(tmp_path: Path) -> None:
    mount = "sys/fs/cgroup"
    files: dict[str, str | int] = {
        f"{mount}/memory/job/memory.limit_in_bytes": 6 * GIB,
        f"{mount}/memory/job/memory.usage_in_bytes": 4 * GIB,
        f"{mount}/memory/job/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}",
        f"{mount}/memory/memory.limit_in_bytes": 9223372036854771712,
        f"{mount}/memory/memory.usage_in_bytes": 20 * GIB,
        f"{mount}/cpu/job/cpu.cfs_quota_us": 50_000,
        f"{mount}/cpu/job/cpu.cfs_period_us": 100_000,
    }
    root = tree(tmp_path, "9:name=systemd:/\n4:memory:/job\n1:cpu,cpuacct:/job\n0::/", files)
    assert free_bytes(root) == 3 * GIB


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux only")
class TestCores:
    def test_are_those_of_the_affinity(self, tmp_path: Path) -> None:
        before = os.sched_getaffinity(0)
        assert cores(tree(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": "max 100000"})) == len(before)
        try:
            os.sched_setaffinity(0, {min(before)})
            assert cores(tmp_path) == 1
        finally:
            os.sched_setaffinity(0, before)

    @pytest.mark.parametrize(
        ("files", "share"),
        [
            ({"job/cpu.max": "50000 100000"}, 0.5),
            ({"cpu.max": "150000 100000", "job/cpu.max": "max 100000"}, 1.5),
            ({"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
            ({"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, 99),
        ],
    )
    def test_are_no_more_than_the_quota_pays_for(self, tmp_path: Path, files: dict[str, str], share: float) -> None:
        group = "1:cpu,cpuacct:/job\n0::/" if any("cfs" in name for name in files) else "0::/job"
        root = tree(tmp_path, group, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
        assert cores(root) == min(len(os.sched_getaffinity(0)), math.ceil(share))
