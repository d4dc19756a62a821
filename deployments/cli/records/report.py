"""What a replay says: a line for each call that is not the same, and a summary."""

from __future__ import annotations

import json
from collections import Counter
from typing import TextIO

from deployments.cli.records.comparison import Difference, Outcome


class Report:
    """Prints outcomes as they come.

    Args:
        as_json: a line of JSON for every call, and for the summary.
    """

    def __init__(self, out: TextIO, *, as_json: bool) -> None:
        self._out = out
        self._json = as_json
        self._results: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._fingerprints: set[tuple[str, str]] = set()

    def add(self, outcome: Outcome) -> None:
        """Count an outcome, and print it if it is not the same answer."""
        self._results[outcome.result] += 1
        if outcome.result == "skipped":
            self._reasons[outcome.why] += 1
        if outcome.fingerprint:
            self._fingerprints.add((str(outcome.call.line.get("fingerprint")), outcome.fingerprint))
        if self._json:
            self._print(json.dumps(outcome.as_json(), ensure_ascii=False))
        elif outcome.result == "failed":
            self._print(f"{outcome.call.place}: failed: {outcome.why}")
        elif outcome.difference is not None:
            self._print(f"{outcome.call.place}: {_difference(outcome.difference)}")

    def end(self) -> int:
        """Print the summary; the exit status."""
        replayed = sum(self._results[result] for result in ("equal", "differs", "failed"))
        others = sorted(pair for pair in self._fingerprints if pair[0] != pair[1])
        if self._json:
            summary = {result: self._results[result] for result in ("equal", "differs", "failed", "skipped")}
            self._print(json.dumps({"summary": summary, "fingerprints": others}))
        else:
            self._print(
                f"{replayed} replayed: {self._results['equal']} equal, {self._results['differs']} different, "
                f"{self._results['failed']} failed."
            )
            for why, count in self._reasons.most_common():
                self._print(f"Not replayed: {count} {why}.")
            for before, now in others:
                self._print(f"Fingerprint: {before} when recorded, {now} now. {_changed(before, now)}")
        return 0 if replayed == self._results["equal"] > 0 else 1

    def _print(self, line: str) -> None:
        print(line, file=self._out, flush=True)


def _difference(found: Difference) -> str:
    if found.choice is None:
        return (
            f"the prompt differs at token {found.position}: recorded {_token(found.recorded)}, now {_token(found.now)}"
        )
    before = "" if found.probability_recorded is None else f" with probability {found.probability_recorded:.4g}"
    old, new = (None if each is None else f"{each:.4g}" for each in found.probabilities)
    text = f"answer {found.choice} differs at token {found.position}: {_token(found.recorded)} was recorded{before}"
    text += f", now it has {old}" if old is not None else ""
    return f"{text}; now {_token(found.now)}" + (f" with probability {new}" if new is not None else "")


def _token(token: int | None) -> str:
    return "the end" if token is None else f"token {token}"


def _changed(before: str, now: str) -> str:
    """Which parts of two fingerprints differ."""
    pairs = zip(before.split("-")[1:], now.split("-")[1:], strict=False)
    named = zip(("the weights", "how they are served"), pairs, strict=False)
    parts = [name for name, (old, new) in named if old != new]
    return f"What differs: {' and '.join(parts)}; GET /fingerprint shows each part." if parts else ""
