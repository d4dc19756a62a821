"""Arguments that are given out while they are written are those of the whole answer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from deployments.openai.parsing import AnswerFormat, answer_format
from deployments.openai.parsing.format import schemas_of
from deployments.openai.parsing.live import JsonText
from deployments.openai.parsing.parts import Call, CallBegun, CallPiece, Content
from tests.openai.parsing.test_formats import FAMILIES, FOLDER, HEAD, SHOWN, TAIL, TOOLS, cuts

LONG = 'Ilm "}]</call>\n\\ü😀'


def read(
    answers: AnswerFormat, pieces: Iterable[str], tools: Any, prompt_end: str | None, least: int | None
) -> tuple[str, list[list[str]], int]:
    """The content, the calls, and in how many pieces the arguments came."""
    reader, calls, content, count = answers.splitter(schemas_of(tools), prompt_end, least=least), [], "", 0
    for part in [*(part for piece in pieces for part in reader.feed(piece)), *reader.finish()]:
        match part:
            case Call():
                calls.append([part.name, part.arguments])
            case CallBegun():
                calls.append([part.name, ""])
            case CallPiece():
                calls[-1][1] += part.text
                count += 1
            case Content():
                content += part.text
    return content, calls, count


@pytest.mark.parametrize("name", SHOWN)
def test_arguments_come_while_they_are_written(name: str) -> None:
    shown, text = SHOWN[name]
    answers = answer_format(HEAD + shown + TAIL)
    text = f"Now.{text}<|done|>"
    content, calls, _ = read(answers, [text], TOOLS, "<|assistant|>", None)
    for pieces in cuts(text):
        assert read(answers, pieces, TOOLS, "<|assistant|>", 0)[:2] == (content, calls)
    assert read(answers, text, TOOLS, "<|assistant|>", 0)[2] >= (0 if name == "python" else 2)
    # One that is short may turn out to be none.
    assert read(answers, text, TOOLS, "<|assistant|>", 1000)[2] == 0


def test_json_is_written_as_it_comes() -> None:
    value = {"a": [1, -2.5e3, True, None, [], {}], LONG: {"b": LONG}}
    half = {**value, "c": "\ud83d" + LONG[:3]}
    for whole, text in (
        (value, json.dumps(value)),
        (value, json.dumps(value, ensure_ascii=False, indent=1)),
        (half, json.dumps(half)),
    ):
        live, written = JsonText(), ""
        for size in range(1, len(text) + 1):
            written += live.write(text[:size])
            assert json.dumps(whole, ensure_ascii=False).startswith(written)
        assert live.ended is (whole is value)


def test_what_has_begun_stays() -> None:
    answers = answer_format(HEAD + SHOWN["tags"][0] + TAIL)
    text = '<do>{"name": "measure", "arguments": {"depth": 4, "place": "Il'
    assert read(answers, text, TOOLS, None, 0)[:2] == ("", [["measure", '{"depth": 4, "place": "Il']])
    assert read(answers, text, TOOLS, None, 100)[1] == []
    text = '<do>{"name": "measure", "arguments": {"depth": 4, "depth": 5}}</do> So.'
    content, ((_, arguments),), _ = read(answers, text, TOOLS, None, 0)
    assert (content, json.loads(arguments)) == ("So.", {"depth": 5})


@pytest.mark.skipif(not FAMILIES, reason="ANSWER_FORMATS names no folder of answers")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_arguments_are_those_of_the_whole(family: str) -> None:
    lines = [json.loads(line) for line in (Path(FOLDER) / f"{family}.jsonl").read_text("utf-8").splitlines()]
    answers = answer_format(
        (Path(FOLDER) / "templates" / f"{family}.jinja").read_text("utf-8"), lines[0]["special"] or ()
    )
    for line in lines:
        whole = read(answers, [line["raw"]], line["tools"], line["prompt_end"], None)
        if whole[1]:
            assert read(answers, line["raw"], line["tools"], line["prompt_end"], 0)[:2] == whole[:2], line["case"]
