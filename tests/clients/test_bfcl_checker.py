"""BFCL's own checker agrees with the calls that are read from answers, the types of their arguments included."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.openai.parsing import AnswerFormat, answer_format
from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.rendering import answer_of
from tests.clients.conftest import client_python, run_script
from tests.openai.parsing.test_formats import FAMILIES, FOLDER, HEAD, NOT_SHOWN, SHOWN, TAIL

EACH = 10
"""Answers of every family."""
TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}
Named = list[tuple[str, dict[str, Any]]]


def schema(described: Any) -> Any:
    """BFCL's description of a value as JSON schema."""
    if not isinstance(described, dict):
        return [schema(each) for each in described] if isinstance(described, list) else described
    found = {key: schema(value) for key, value in described.items()}
    return found | ({"type": TYPES[found["type"]]} if found.get("type") in (*TYPES,) else {})


def value(accepted: Any) -> Any:
    """The first of the values that BFCL accepts, for every key of an object."""
    if isinstance(accepted, dict):
        return {key: value(each[0]) for key, each in accepted.items() if each[0] != ""}
    return [value(each) for each in accepted] if isinstance(accepted, list) else accepted


def wanted(task: dict[str, Any]) -> Named:
    return [(name, value(arguments)) for call in task["truth"] for name, arguments in call.items()]


def read(answers: AnswerFormat, text: str, task: dict[str, Any]) -> Named:
    tools = [{"type": "function", "function": schema(each)} for each in task["function"]]
    reader = answers.reader(tools, None)
    parts = [part for character in text for part in reader.feed(character)] + reader.finish()
    return [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]


def rendered(template: str, calls: Named) -> Iterator[str]:
    """An answer with these calls, in each form that templates read."""
    contents: list[dict[str, Any]] = [{"content": None}, {"content": ""}, {}]
    for as_text, content, named in itertools.product((False, True), contents, (False, True)):
        listed = [
            {
                "id": f"functions.{name}:{index}" if named else f"Aqz7kd0w{index}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(held, ensure_ascii=False) if as_text else held},
            }
            for index, (name, held) in enumerate(calls)
        ]
        text = answer_of(template, {"role": "assistant", **content, "tool_calls": listed})
        if text is not None and all(name in text for name, _ in calls):
            yield text


def templates() -> dict[str, tuple[str, AnswerFormat]]:
    """Templates whose formats are proved: those of the families, and the tests' own."""
    texts = {f"own {name}": HEAD + shown + TAIL for name, (shown, _) in SHOWN.items()}
    texts |= {
        name: (Path(FOLDER) / "templates" / f"{name}.jinja").read_text("utf-8")
        for name in FAMILIES
        if name not in NOT_SHOWN
    }
    return {name: (text, answer_format(text)) for name, text in texts.items()}


@pytest.fixture(scope="module")
def python() -> Path:
    return client_python("bfcl", ["--no-deps", "bfcl-eval==2026.3.23"])


def test_the_checker_agrees(python: Path) -> None:
    tasks = run_script(python, "bfcl_run.py", {"categories": ["simple_python", "multiple", "parallel"]})
    tasks = tasks[:: len(tasks) // (3 * EACH)]
    answers, families = [], []
    for name, (template, found) in templates().items():
        given = 0
        for task in tasks:
            text = next(rendered(template, wanted(task)), None)
            if text is None or given == EACH:
                continue
            calls = read(found, text, task)
            answers.append({**task, "calls": [{called: held} for called, held in calls]})
            families.append(name)
            given += 1
    verdicts = run_script(python, "bfcl_run.py", {"answers": answers})
    wrong = [(name, said) for name, said in zip(families, verdicts, strict=True) if said]
    assert wrong == []
    counts = [families.count(name) for name in {*families}]
    assert min(counts) >= 5
    if FAMILIES:
        assert len(counts) >= 15
        assert len(answers) >= 100
