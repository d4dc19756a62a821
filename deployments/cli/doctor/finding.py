"""What a check finds, and the report of all checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from deployments.cli.doctor.codes import CODES

Status = Literal["ok", "warning", "error", "skipped"]

CLEAN, ERRORS, WARNINGS = 0, 1, 3
"""Exit statuses of `troupe check`; 2 is a wrong command line."""

NOT_LOADED = "The model is not loaded."
"""Why the steps after a failed load are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check found.

    Attributes:
        text: the finding, in a line.
        code: a key of `CODES`, if something is to be known or repaired.
        fix: what to do about it.
        details: lines for people, such as the tokens of a prompt.
        figures: numbers and names, as JSON values.
    """

    status: Status
    text: str
    code: str | None = None
    fix: str | None = None
    details: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A check that has been made. `name` is stable; the time is in seconds."""

    name: str
    finding: Finding
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        found = self.finding
        return {
            "step": self.name,
            "status": found.status,
            "code": found.code,
            "finding": found.text,
            "fix": found.fix,
            "details": list(found.details),
            "figures": dict(found.figures),
            "seconds": round(self.seconds, 3),
        }


class NotApplicable(Exception):
    """A check has nothing to say about this model; the message is the reason."""


def fine(text: str, /, *details: str, **figures: Any) -> Finding:
    """A finding that needs no action."""
    return Finding(status="ok", text=text, details=details, figures=figures)


def fault(code: str, text: str, /, *details: str, fix: str | None = None, **figures: Any) -> Finding:
    """A finding of a known kind.

    Args:
        fix: replaces the fix of the code's kind, to name values of this model.
    """
    kind = CODES[code]
    return Finding(status=kind.status, text=text, code=code, fix=fix or kind.fix, details=details, figures=figures)


def exit_status(steps: Sequence[Step]) -> int:
    """The exit status of a report."""
    found = {step.finding.status for step in steps}
    return ERRORS if "error" in found else WARNINGS if "warning" in found else CLEAN


def report(steps: Sequence[Step], **about: Any) -> dict[str, Any]:
    """The report as one JSON object; docs/check.md lists its keys.

    Args:
        about: the model and where it ran.
    """
    status = exit_status(steps)
    words = {CLEAN: "ok", ERRORS: "error", WARNINGS: "warning"}
    return {**about, "status": words[status], "exit_status": status, "steps": [step.as_json() for step in steps]}
