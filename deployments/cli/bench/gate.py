"""`troupe bench --gate`: are the ratios of a bench those of an earlier one?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from deployments.core.errors import ConfigError


def saved(file: Path) -> dict[str, Any]:
    """What `--json` has written.

    Raises:
        ConfigError: the file is not one of them.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if all({"workload", "concurrency", "target"} <= set(each) for each in found["results"]):
            document: dict[str, Any] = found
            return document
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{file} cannot be read as figures of `troupe bench --json`: {error}.") from error
    raise ConfigError(f"{file} does not have the figures of `troupe bench --json`.")


def slower(
    results: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]], tolerance: float
) -> tuple[list[str], int]:
    """A line for each ratio that is lower than in the baseline by more than noise, and how many were compared.

    Noise is `tolerance`, a share, or how far the rounds of the two benches differ among themselves, if that is more.
    """
    before = {_key(each): each for each in baseline if not each.get("refused")}
    lines, compared = [], 0
    for each in results:
        other = before.get(_key(each))
        if other is None or each.get("refused") or max(other["times"]) == min(other["times"]) == 1.0:
            continue
        compared += 1
        now, then = median(each["times"]), median(other["times"])
        allowed = then * max(tolerance, _noise(each["times"]), _noise(other["times"]))
        if now < then - allowed:
            lines.append(
                f"{each['workload']}, {each['concurrency']} at a time, against {each['target']}: "
                f"{now:.2f} times, and it was {then:.2f} (noise {allowed:.2f})"
            )
    return lines, compared


def _key(result: Mapping[str, Any]) -> tuple[str, int, str]:
    return result["workload"], result["concurrency"], result["target"]


def _noise(times: Sequence[float]) -> float:
    middle = median(times)
    return (max(times) - min(times)) / middle if middle else 0.0
