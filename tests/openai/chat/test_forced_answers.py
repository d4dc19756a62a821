"""Answers that the grammar of forced calls allows are read back, and are what the template writes of the same calls."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken

from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from deployments.openai.chat.call_grammar import call_grammar
from deployments.openai.chat.tools import read_tools
from deployments.openai.parsing import AnswerFormat, answer_format
from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.rendering import answer_of
from tests.openai.parsing.invented import FORMATS
from tests.openai.parsing.test_formats import HEAD, NOT_SHOWN, SHOWN, TAIL
from tests.tiny import Words, byte_tokenizer

FOLDER = os.environ.get("ANSWER_FORMATS", "")
FAMILIES = [path.stem for path in sorted(Path(FOLDER).glob("*.jsonl")) if path.stem not in NOT_SHOWN] if FOLDER else []
LIMIT = 400
_IDS = r'(?<=\[CALL_ID\])\w+|(?<=<\|one\|>)\w+|:\d+(?=<)|"id": "\w+"|"tool_call_id": "\w+"|index="\d+"|(?<=id=")\w+'
ID = "Aqz7kd0w1"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Does.",
            "parameters": {
                "type": "object",
                "properties": {
                    "kind": {"type": "string", "enum": ["high", "low"], "description": "Which."},
                    "depth": {"type": "integer", "minimum": 1, "maximum": 99, "description": "How deep."},
                    "place": {"type": "string", "maxLength": 6, "description": "Where."},
                    "sure": {"type": "boolean", "description": "If so."},
                },
                "required": ["kind", "depth"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("measure", "find_it")
]


class Forced:
    """Writes random answers that a format's grammar allows, over a vocabulary of bytes and the special tokens."""

    def __init__(self, answers: AnswerFormat, special: Sequence[str]) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([AddedToken(s, special=True, normalized=False) for s in special], special_tokens=True)
        self._words = Words(tokenizer)
        tools = read_tools(TOOLS, "required", True)
        assert tools is not None
        grammar = call_grammar(answers.syntax.calls[0], tools)
        assert grammar is not None
        compiler = GrammarCompiler(self._words, len(self._words))
        self._grammar: CompiledGrammar = compiler.compile(grammar).result()
        compiler.close()

    def answer(self, seed: int) -> str:
        mask, chance = self._grammar.mask(LIMIT), torch.Generator().manual_seed(seed)
        ids: list[int] = []
        while mask.ends is None:
            scores = torch.rand(len(self._words), generator=chance)
            # Letters, so that texts are texts.
            scores[ord("a") : ord("z") + 1] += 0.5
            mask.mask(scores)
            ids.append(mask.advance(int(scores.argmax())))
        return b"".join(self._words.token_bytes(i) for i in ids if i not in self._words.eos_ids).decode()


def read(answers: AnswerFormat, text: str) -> tuple[list[tuple[str, Any]], str]:
    """The calls of an answer, and its other text."""
    reader = answers.reader(TOOLS, None)
    parts = [*reader.feed(text), *reader.finish()]
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]
    return calls, "".join(part.text for part in parts if not isinstance(part, Call)).strip()


def rendered(template: str, calls: Sequence[tuple[str, Any]]) -> Iterator[str]:
    """What a template writes of these calls, in each form that templates read."""
    contents: list[dict[str, Any]] = [{"content": None}, {"content": ""}, {}]
    for as_text, content, named in itertools.product((False, True), contents, (False, True)):
        functions = [
            {"name": name, "arguments": json.dumps(held, ensure_ascii=False) if as_text else held}
            for name, held in calls
        ]
        listed = [
            {"id": f"functions.{each['name']}:{i}" if named else ID, "type": "function", "function": each}
            for i, each in enumerate(functions)
        ]
        text = answer_of(template, {"role": "assistant", **content, "tool_calls": listed})
        if text is not None:
            yield text


def squeezed(text: str) -> str:
    """A text but for white space, ids, and the spelling of constants."""
    return re.sub(r"\s|None|null", "", re.sub(f"{_IDS}|functions\\.", "", text)).lower()


def check(template: str, answers: AnswerFormat, forced: Forced, seed: int) -> None:
    text = forced.answer(seed)
    calls, rest = read(answers, text)
    assert (bool(calls), rest) == (True, "")
    for name, arguments in calls:
        assert name in ("measure", "find_it")
        kinds = {key: type(value) for key, value in arguments.items()}
        assert {"kind": str, "depth": int}.items() <= kinds.items()
        assert kinds.items() <= {"kind": str, "depth": int, "place": str, "sure": bool}.items()
        assert arguments["kind"] in ("high", "low")
    if answers.syntax.calls[0].quote == "'" and "\\" in text:
        # The templates do not escape what stands in these quotes.
        return
    # Some templates write one call alone.
    again = [*rendered(template, calls), *rendered(template, calls[:1])]
    assert any(read(answers, whole)[0] in (calls, calls[:1]) for whole in again)
    assert any(squeezed(text) in squeezed(whole) for whole in again)


INVENTED = {name: form.template for name, form in FORMATS.items() if form.found_by == "template"}


@pytest.mark.parametrize("template", [*(HEAD + form[0] + TAIL for form in SHOWN.values()), *INVENTED.values()])
def test_forced_answers_are_read_back(template: str) -> None:
    answers = answer_format(template)
    forced = Forced(answers, ())
    for seed in range(3):
        check(template, answers, forced, seed)


@pytest.mark.skipif(not FAMILIES, reason="ANSWER_FORMATS names no folder of answers")
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.long)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_forced_answers_are_read_back(family: str, count: int) -> None:
    template = (Path(FOLDER) / "templates" / f"{family}.jinja").read_text("utf-8")
    special = json.loads((Path(FOLDER) / f"{family}.jsonl").read_text("utf-8").partition("\n")[0])["special"] or ()
    answers = answer_format(template, special)
    forced = Forced(answers, special)
    for seed in range(count):
        check(template, answers, forced, seed)
