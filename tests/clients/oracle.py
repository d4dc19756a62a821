"""A model that has read a benchmark's answers: a score below 1 shows that something is lost on the way.

The prompt is the request as JSON, and a token is a byte. The answer is a text, or calls in the form of `hermes`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Messages = Sequence[Mapping[str, Any]]
Tools = Mapping[str, Sequence[str]]
"""The names of the parameters of each tool."""
Rule = Callable[[Messages, Tools], str]
"""From a request to its answer."""

DONE = "It is done."


def load_model(benchmark: str, data: str, ids: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
    """The model for a benchmark.

    Args:
        data: the folder of its questions and answers.
        ids: of BFCL's questions, by category.
    """
    rule = (
        bfcl(Path(data), ids or {})
        if benchmark == "bfcl"
        else {"dbbench": dbbench, "tau2": tau2}[benchmark](Path(data))
    )

    def generate(input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        asked = json.loads(decode(input_ids[0]))
        tools = {
            each["function"]["name"]: list(each["function"]["parameters"]["properties"]) for each in asked["tools"]
        }
        said = encode(rule(asked["messages"], tools))["input_ids"]
        return torch.cat([input_ids, torch.tensor([said], dtype=torch.long)], dim=1)

    return {
        "model": torch.nn.Identity(),
        "generate": generate,
        "apply_chat_template": render,
        "encode": encode,
        "decode": decode,
    }


def render(messages: Messages, tools: Any = None, **_: Any) -> str:
    return json.dumps({"messages": messages, "tools": tools or []})


def encode(prompt: str) -> dict[str, Any]:
    return {"input_ids": list(prompt.encode())}


def decode(token_ids: torch.Tensor) -> str:
    return bytes(token_ids.tolist()).decode(errors="replace")


def call(name: str, arguments: Mapping[str, Any]) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>\n"


def since_user(messages: Messages) -> tuple[str, Messages]:
    """The text of the last message of the user, and what follows it."""
    last = max(number for number, message in enumerate(messages) if message["role"] == "user")
    return messages[last]["content"], messages[last + 1 :]


def lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines():
        yield json.loads(line)


# BFCL: a turn's calls, then a text.


def bfcl(data: Path, ids: Mapping[str, Sequence[str]]) -> Rule:
    answers: dict[str, Sequence[Any]] = {}
    for category, wanted in ids.items():
        file, known = f"BFCL_v4_{category}.json", data / "possible_answer" / f"BFCL_v4_{category}.json"
        truth = {each["id"]: each["ground_truth"] for each in lines(known)} if known.exists() else {}
        for question in (each for each in lines(data / file) if each["id"] in wanted):
            turns, found = question["question"], truth.get(question["id"], [])
            for turn, calls in zip(turns, found if category.startswith("multi_turn") else [found], strict=True):
                answers[turn[-1]["content"]] = calls

    def rule(messages: Messages, tools: Tools) -> str:
        asked, after = since_user(messages)
        calls = [] if after else answers.get(asked, [])
        return "".join(_bfcl_call(each, tools) for each in calls) or DONE

    return rule


def _bfcl_call(known: Any, tools: Tools) -> str:
    if isinstance(known, str):
        parsed = ast.parse(known, mode="eval").body
        assert isinstance(parsed, ast.Call)
        name = ast.unparse(parsed.func)
        named = {each.arg: each.value for each in parsed.keywords}
        given = {**dict(zip(tools[name], parsed.args, strict=False)), **named}
        return call(name, {str(key): ast.literal_eval(value) for key, value in given.items()})
    ((name, arguments),) = known.items()
    return call(name.replace(".", "_"), _first(arguments))


def _first(allowed: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Of each argument the first value that is allowed; an empty text stands for one that may be left out."""
    found = {}
    for name, values in allowed.items():
        if "" not in values:
            found[name] = _first(values[0]) if isinstance(values[0], dict) else values[0]
    return found


# AgentBench's dbbench: a statement, then the answer.


def dbbench(data: Path) -> Rule:
    entries = {f"{each['description']}\n{each['add_description']}": each for each in lines(data)}

    def rule(messages: Messages, tools: Tools) -> str:
        ((place, entry),) = (
            (number, entries[message["content"]])
            for number, message in enumerate(messages)
            if message["content"] in entries
        )
        changes = entry["type"][0] in ("INSERT", "UPDATE", "DELETE")
        if place == len(messages) - 1:
            statement = entry["label"][0] if changes else f"SELECT * FROM `{entry['table']['table_name']}`"
            return f"I look.\nAction: Operation\n```sql\n{statement}\n```"
        return f"I know.\nAction: Answer\nFinal Answer: {json.dumps([] if changes else entry['label'])}"

    return rule


# tau2-bench: the user states the task and leaves; the agent acts, then says so.


def tau2(data: Path) -> Rule:
    actions = {
        task["user_scenario"]["instructions"]: task["evaluation_criteria"].get("actions", [])
        for task in json.loads(data.read_text())
    }

    def rule(messages: Messages, tools: Tools) -> str:
        system = messages[0]["content"]
        if "<scenario>" in system:
            asked = sum(message["role"] == "user" for message in messages)
            stated = next(text for text in actions if text in system)
            return stated if asked == 1 else "###STOP###"
        asked_for, after = since_user(messages)
        calls = [] if after else actions.get(asked_for, [])
        return "".join(call(each["name"], each["arguments"]) for each in calls) or DONE

    return rule
