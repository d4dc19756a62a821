"""What AgentBench has written: the samples that have ended, and the scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deployments.cli.agentbench.assignment import Assignment
from deployments.cli.agentbench.tasks import Task


class Progress:
    """How many samples of each task have ended.

    Args:
        samples: of each task.

    Attributes:
        changed: since the last `line`.
    """

    def __init__(self, asked: Assignment, samples: Mapping[str, int]) -> None:
        self._asked = asked
        self._samples = samples
        self._counts: dict[str, int] = {}
        self._failed = 0
        self._sizes: list[int] = []
        self.changed = False
        self.read()

    def read(self) -> bool:
        """Look again; whether a sample has ended since."""
        folders = [self._asked.result(task) for task in self._asked.tasks]
        files = [folder / name for folder in folders for name in ("runs.jsonl", "error.jsonl")]
        sizes = [file.stat().st_size if file.exists() else 0 for file in files]
        if sizes == self._sizes:
            return False
        self._sizes = sizes
        counts = {task.name: len(finished(self._asked, task)) for task in self._asked.tasks}
        failed = sum(len(list(_lines(self._asked.result(task) / "error.jsonl"))) for task in self._asked.tasks)
        new = (counts, failed) != (self._counts, self._failed)
        self._counts, self._failed = counts, failed
        self.changed |= new
        return new

    def line(self) -> str:
        """Of text, for the user."""
        self.changed = False
        parts = [f"{name} {count} of {self._samples[name]}" for name, count in self._counts.items()]
        return ", ".join(parts) + (f"; {self._failed} failures" if self._failed else "")


def finished(asked: Assignment, task: Task) -> set[Any]:
    """The indices of the samples with a result."""
    return {line["index"] for line in _lines(asked.result(task) / "runs.jsonl")}


def overall(asked: Assignment, task: Task) -> dict[str, Any] | None:
    """AgentBench's overall.json; None if it has written none."""
    file = asked.result(task) / "overall.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def report(asked: Assignment, task: Task, samples: int) -> list[str]:
    """The lines that say how a task went."""
    found = overall(asked, task)
    if found is None:
        count = samples - len(finished(asked, task))
        lines = [f"{task.name}: no score, since {count} of {samples} samples have failed"]
        return lines + [f"  {times} times: {reason}" for reason, times in _failures(asked, task).most_common(5)]
    statuses = [
        f"{round(share * found['total'])} {status}"
        for status, share in found["validation"].items()
        if not status.endswith("_history_length") and share
    ]
    scores = [f"  {name:30} {value:.4f}" if isinstance(value, float) else f"  {name:30} {value}"
              for name, value in _flat(found["custom"])]  # fmt: skip
    return [f"{task.name}: {found['total']} samples ({', '.join(statuses)})", *scores, f"  {_file(asked, task)}"]


def _file(asked: Assignment, task: Task) -> Path:
    return asked.result(task) / "overall.json"


def _flat(scores: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(scores, dict):
        yield prefix or "score", scores
        return
    for name, value in scores.items():
        yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))


def _failures(asked: Assignment, task: Task) -> Counter[str]:
    """The reasons of failed attempts."""
    lines = _lines(asked.result(task) / "error.jsonl")
    return Counter(f"{line.get('error')}: {str(line.get('info'))[:300]}" for line in lines)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file of JSON, but for one that is being written."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
