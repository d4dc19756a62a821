"""A recorded answer beside the answer of today."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.cli.records.calls import CHAT, RecordedCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first token in which two answers differ.

    Attributes:
        choice: index of the answer; None for the prompt.
        position: of the token in the answer or the prompt.
        recorded, now: the token ids; None if the text has ended there.
        probability_recorded: of the recorded token, when it was recorded; None if that was not asked for.
        probabilities: of the recorded token and of the new one, as the model computes them now; None if that cannot be
            asked.
    """

    choice: int | None
    position: int
    recorded: int | None
    now: int | None
    probability_recorded: float | None = None
    probabilities: tuple[float | None, float | None] = (None, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a recorded call.

    Attributes:
        why: it was skipped, or failed.
        fingerprint: of the model that answered now.
    """

    call: RecordedCall
    result: Literal["equal", "differs", "failed", "skipped"]
    difference: Difference | None = None
    why: str = ""
    fingerprint: str = ""

    def as_json(self) -> dict[str, Any]:
        """The outcome as JSON values."""
        line, found = self.call.line, self.difference
        shape: dict[str, Any] = {"call": self.call.place, "id": line.get("id"), "result": self.result}
        shape |= {"why": self.why} if self.why else {}
        if found is None:
            return shape
        return shape | {
            "choice": found.choice,
            "position": found.position,
            "recorded": {"token_id": found.recorded, "probability": found.probability_recorded},
            "now": {"token_id": found.now, "probability": found.probabilities[1]},
            "recorded_token_now": found.probabilities[0],
        }


def first_difference(call: RecordedCall, answer: Mapping[str, Any]) -> Difference | None:
    """Where an answer differs from the recorded one: in a prompt, else in a choice; None if all tokens are equal."""
    choices = {choice["index"]: choice for choice in answer["choices"]}
    recorded = {choice["index"]: choice for choice in call.line["choices"]}
    for index, prompt in enumerate(call.line["prompts"]):
        now = _prompt(call, answer, index, len(choices) // max(1, len(call.line["prompts"])))
        if (position := _split(prompt["token_ids"], now)) is not None:
            return Difference(
                choice=None, position=position, recorded=_at(prompt["token_ids"], position), now=_at(now, position)
            )
    for index in sorted(recorded.keys() | choices.keys()):
        before = recorded.get(index, {}).get("token_ids", ())
        now = choices.get(index, {}).get("token_ids", ())
        if (position := _split(before, now)) is not None:
            logprobs = recorded.get(index, {}).get("logprobs") or ()
            logprob = _at(logprobs, position) if position < len(before) else None
            return Difference(
                choice=index,
                position=position,
                recorded=_at(before, position),
                now=_at(now, position),
                probability_recorded=None if logprob is None else math.exp(logprob),
            )
    return None


def _prompt(call: RecordedCall, answer: Mapping[str, Any], index: int, per_prompt: int) -> Sequence[int]:
    """The token ids of a prompt of today."""
    if call.route == CHAT:
        return list(answer["prompt_token_ids"])
    return list(answer["choices"][index * per_prompt]["prompt_token_ids"])


def _split(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first position at which two sequences differ; None if they are equal."""
    common = min(len(first), len(second))
    found = next((i for i in range(common) if first[i] != second[i]), common)
    return None if found == len(first) == len(second) else found


def _at(values: Sequence[Any], position: int) -> Any:
    return values[position] if position < len(values) else None
