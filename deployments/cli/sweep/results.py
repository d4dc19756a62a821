"""The results of a sweep: scores with 95 % intervals, kept in a file after each model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.core.errors import ConfigError

Z = 1.959963984540054
"""The standard deviations of a two-sided interval of 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A score of a model.

    Attributes:
        low, high: its 95 % interval; None if the benchmark gives no error.
        samples: that it is made from; None if unknown.
    """

    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    samples: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is known of a model.

    Attributes:
        fingerprint: what `/v1/fingerprint` says of it; None if the server does not have this.
        error: why there are no scores.
        seconds: that the benchmark took.
    """

    model: str
    fingerprint: Mapping[str, Any] | None
    scores: list[Score] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def mark(self) -> str | None:
        """The text of the fingerprint."""
        return None if self.fingerprint is None else str(self.fingerprint["fingerprint"])


def wilson(successes: float, samples: int) -> tuple[float, float]:
    """The 95 % interval of a share, after E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209."""
    if not samples:
        return 0.0, 1.0
    share, square = successes / samples, Z * Z
    middle = (share + square / (2 * samples)) / (1 + square / samples)
    half = Z / (1 + square / samples) * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    return max(0.0, middle - half), min(1.0, middle + half)


class ResultFile:
    """The results of a sweep in results.json.

    Args:
        settings: of the benchmark; results of other settings cannot stand in the same file.

    Raises:
        ConfigError: the file is of another sweep, or not such a file.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file = file
        self._settings = dict(settings)
        self._results: dict[str, Result] = {}
        if not file.exists():
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            before, results = found["settings"], found["results"]
            self._results = {
                each["model"]: Result(**{**each, "scores": [Score(**score) for score in each["scores"]]})
                for each in results
            }
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file} is not a file of troupe eval; choose another --output.") from None
        if before != self._settings:
            changed = sorted(key for key in {*before, *self._settings} if before.get(key) != self._settings.get(key))
            raise ConfigError(
                f"{file} has the results of another sweep ({', '.join(changed)} differ); choose another --output."
            )

    def finished(self, model: str, mark: str | None) -> Result | None:
        """The result of a model that has scores, if the model is still the same."""
        found = self._results.get(model)
        return found if found is not None and not found.error and found.mark == mark else None

    def add(self, result: Result) -> None:
        """Keep a result; the file is whole at every moment."""
        self._results[result.model] = result
        text = json.dumps(
            {"settings": self._settings, "results": [asdict(each) for each in self._results.values()]}, indent=1
        )
        draft = self._file.with_suffix(".part")
        with draft.open("w", encoding="utf-8") as out:
            out.write(text + "\n")
            out.flush()
            os.fsync(out.fileno())
        draft.replace(self._file)
