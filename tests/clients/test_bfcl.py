"""BFCL with its own questions: a model that knows the answers has every point, and the demo model's calls are read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import client_python, run_shell
from tests.clients.page import block
from tests.serving import serving

IDS = {
    "simple_python": ["simple_python_0", "simple_python_1", "simple_python_2"],
    "multiple": ["multiple_0", "multiple_1"],
    "parallel": ["parallel_0", "parallel_1"],
    "irrelevance": ["irrelevance_0", "irrelevance_1"],
    "multi_turn_base": ["multi_turn_base_0", "multi_turn_base_1"],
}
HANDLER = "openai_completion import OpenAICompletionsHandler"
RESPONSES = "openai_response import OpenAIResponsesHandler as OpenAICompletionsHandler"


@pytest.fixture(scope="module")
def python() -> Path:
    return client_python("BFCL")


@pytest.fixture(scope="module")
def oracle(cluster: str, python: Path) -> Iterator[str]:
    """A server whose model knows the answers to `IDS`; its URL."""
    (data,) = python.parent.parent.glob("lib/python*/site-packages/bfcl_eval/data")
    kwargs = {"benchmark": "bfcl", "data": str(data), "ids": IDS}
    model = {"id": "oracle", "loader": "tests.clients.oracle:load_model", "kwargs": kwargs}
    with serving(cluster, {"models": [{**model, "api": {"tool_parser": "hermes"}}]}) as url:
        yield url


def run(python: Path, folder: Path, url: str, model: str, ids: dict[str, list[str]], handler: str = HANDLER) -> None:
    """The file and the commands of docs/clients.md, with some of the questions."""
    changes = {"my-checkpoint": model, HANDLER: handler}
    (folder / "bfcl_local.py").write_text(block("BFCL", "python", 0, changes))
    (folder / "test_case_ids_to_generate.json").write_text(json.dumps(ids))
    asked = "--test-category simple_python,multiple,parallel,irrelevance,multi_turn_base"
    changes = {
        "http://127.0.0.1:8000": url,
        "my-checkpoint": model,
        f"{asked} --temperature": "--run-ids --temperature",
    }
    commands = block("BFCL", "bash", 0, changes)
    evaluated = f"--test-category {','.join(ids)} --partial-eval"
    assert asked in commands
    run_shell(python, commands.replace(asked, evaluated), folder, timeout=1200)


def first_lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The first line of each category's file of scores, which has its accuracy."""
    files = folder.glob("score/*/*/*_score.json")
    return {
        file.name.removeprefix("BFCL_v4_").removesuffix("_score.json"): json.loads(file.read_text().splitlines()[0])
        for file in files
    }


@pytest.mark.parametrize("handler", [HANDLER, RESPONSES], ids=["chat", "responses"])
def test_right_answers_have_every_point(oracle: str, python: Path, tmp_path: Path, handler: str) -> None:
    run(python, tmp_path, oracle, "oracle", IDS, handler)
    found = first_lines(tmp_path)
    assert {name: (line["accuracy"], line["total_count"]) for name, line in found.items()} == {
        name: (1.0, len(ids)) for name, ids in IDS.items()
    }


def test_the_calls_of_a_model_are_read(folder_model: str, python: Path, tmp_path: Path) -> None:
    ids = {"simple_python": IDS["simple_python"][:2]}
    run(python, tmp_path, folder_model, "agent", ids)
    (file,) = tmp_path.glob("result/agent/*/*_result.json")
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["id"] for each in results] == ids["simple_python"]
    for each in results:
        assert "Error during inference" not in str(each["result"])
        assert each["output_token_count"] > 0
    assert first_lines(tmp_path)["simple_python"]["total_count"] == 2
    with (tmp_path / "score" / "data_overall.csv").open() as scores:
        assert [row["Model"] for row in csv.DictReader(scores)] == ["agent (FC)"]
