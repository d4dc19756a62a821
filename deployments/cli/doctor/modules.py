"""What requests can capture and change inside the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.cli.doctor.finding import Finding, NotApplicable, fine
from deployments.cli.doctor.subject import Subject
from deployments.core.errors import UnsupportedParameter


async def modules(subject: Subject) -> Finding:
    """How many modules can be captured and changed; with `--modules`, each of them, as in `GET /v1/modules`."""
    try:
        found = await subject.host.modules(subject.entry.id, "")
    except UnsupportedParameter as reason:
        raise NotApplicable(reason.message) from reason
    every = found["data"]
    counts = {key: sum(module[key] for module in every) for key in ("capturable", "steerable")}
    text = (
        f"Of {len(every)} modules, requests can capture {counts['capturable']} and change {counts['steerable']}"
        f"{'.' if subject.trial.modules else '; --modules lists them.'}"
    )
    shown = every if subject.trial.modules else []
    return fine(text, *map(_line, shown), modules=shown, **counts)


def _line(module: Mapping[str, Any]) -> str:
    """A module's name and class, and its tensors, or why it has none."""
    taps = "; ".join(map(_tap, module["taps"])) or module["reason"]
    return f"{module['name']} ({module['class']}): {taps}"


def _tap(tap: Mapping[str, Any]) -> str:
    """A tensor of a module: its shape and what can be done with it."""
    if not tap["capturable"]:
        return f"{tap['tap']}: {tap['reason']}"
    once = ", once for a request" if tap["rows"] == "once" else ""
    calls = f", {tap['calls']} calls" if tap["calls"] > 1 else ""
    can = "capture, change" if tap["steerable"] else f"capture alone ({tap['reason']})"
    return f"{tap['tap']} {tap['shape']} {tap['dtype']}{once}{calls}: {can}"
