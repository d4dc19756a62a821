"""BFCL's tasks, or what its checker says of calls: JSON in, JSON out."""

from __future__ import annotations

import importlib.resources
import json
import sys
import types
from typing import Any

# The table of models imports the clients of every provider. The checker asks it how a model writes names alone.
table: Any = types.ModuleType("bfcl_eval.constants.model_config")
table.MODEL_CONFIG_MAPPING = {"troupe": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules[table.__name__] = table

from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402


def lines(name: str) -> list[dict[str, Any]]:
    text = (importlib.resources.files("bfcl_eval") / "data" / name).read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def tasks(category: str) -> list[dict[str, Any]]:
    file = f"BFCL_v4_{category}.json"
    answers = {line["id"]: line["ground_truth"] for line in lines(f"possible_answer/{file}")}
    return [{"category": category, "function": line["function"], "truth": answers[line["id"]]} for line in lines(file)]


def verdict(answer: dict[str, Any]) -> str:
    """The checker's complaint about calls; empty if they are right."""
    found = ast_checker(
        answer["function"], answer["calls"], answer["truth"], Language.PYTHON, answer["category"], "troupe"
    )
    return "" if found["valid"] else json.dumps(found)


def main() -> None:
    asked = json.load(sys.stdin)
    if "categories" in asked:
        print(json.dumps([task for category in asked["categories"] for task in tasks(category)]))
    else:
        print(json.dumps([verdict(answer) for answer in asked["answers"]]))


main()
