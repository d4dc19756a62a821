"""Every piece of a conversation is looked for in its prompt by a few passes over it, however many pieces there are."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from model_loaders.prompts.template_coverage import Marked, is_said

COUNT = 5000


class Counted(str):
    """A text that counts the characters that searches in it have read."""

    read: int

    def __new__(cls, text: str) -> Counted:
        made = super().__new__(cls, text)
        made.read = 0
        return made

    def find(self, text: Any, start: Any = 0, end: Any = None) -> int:
        at = super().find(text, start, end)
        self.read += (len(self) if at < 0 else at + len(text)) - start
        return at

    def __contains__(self, text: object) -> bool:
        return self.find(text) >= 0

    def lower(self) -> Counted:
        made = Counted(super().lower())
        LOWERED.append(made)
        return made


LOWERED: list[Counted] = []


def conversation(contents: list[str]) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def written(messages: list[dict[str, Any]]) -> Counted:
    return Counted("".join(f"<|{m['role']}|>{m['content']}<|end|>\n" for m in messages))


SAID = {
    "in order": [f"message {i}" for i in range(COUNT)],
    "all alike": ["the same"] * COUNT,
    "parts of others": ["a" * (i % 50 + 1) for i in range(COUNT)],
    "quoted": [f'it said "{i}"' for i in range(COUNT)],
}


@pytest.mark.parametrize("contents", SAID.values(), ids=SAID)
def test_texts_are_found_by_reading_on(contents: list[str]) -> None:
    prompt = written(conversation(contents))
    assert is_said(conversation(contents), prompt)
    assert prompt.read < 10 * len(prompt) + (1 << 25)


def test_texts_as_json_are_found_too() -> None:
    messages = conversation([f'it said "{i}" é' for i in range(50)])
    assert is_said(messages, json.dumps(messages))
    assert is_said(messages, json.dumps(messages, ensure_ascii=False))


def test_a_search_that_reads_the_prompt_over_and_over_is_given_up() -> None:
    """Written in another order, by chance or by design: nobody reads it thousands of times."""
    contents = [f"{random.Random(i).random():.9f} " + "y" * 200 for i in range(COUNT)]
    prompt = written(conversation(contents[::-1]))
    assert not is_said(conversation(contents), prompt)
    assert prompt.read < 10 * len(prompt) + (1 << 25)


def test_one_text_that_is_missing_is_noticed() -> None:
    messages = conversation(SAID["in order"])
    assert not is_said([*messages, {"role": "user", "content": "not there"}], written(messages))


@pytest.mark.parametrize("missing", [0, COUNT // 2, COUNT - 1])
def test_the_piece_that_is_missing_is_found_by_one_pass(missing: int) -> None:
    marked = Marked(conversation(SAID["in order"]), strict=True, shows_system=False)
    assert marked.missing(written(marked.messages)) is None
    piece = marked.missing(written([m for i, m in enumerate(marked.messages) if i != missing]))
    assert piece is not None
    assert piece.place == f"messages[{missing}].content"
    assert sum(text.read for text in LOWERED) == 0


def test_names_that_a_template_looks_up_are_found_once_each() -> None:
    calls = [{"function": {"name": f"look-{i % 100}", "arguments": {}}} for i in range(COUNT)]
    messages = [{"role": "assistant", "tool_calls": [call]} for call in calls]
    LOWERED.clear()
    marked = Marked(messages, strict=True, shows_system=False, kept=("names",))
    assert marked.missing(Counted(" ".join(f"{c['function']['name']}()" for c in calls))) is None
    # Written as a part of another word: found by a search, one for each name.
    prompt = Counted(" ".join(f"call_{c['function']['name']}_now" for c in calls))
    assert marked.missing(prompt) is None
    assert sum(text.read for text in LOWERED) <= 100 * len(prompt)
    lacking = marked.missing(Counted("look-0()"))
    assert lacking is not None
    assert lacking.place == "messages[1].tool_calls[0]"
