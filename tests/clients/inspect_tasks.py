"""Tasks for inspect_ai, over the samples of samples.json beside the copy of this file that is run."""

import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool

samples = json.loads((Path(__file__).parent / "samples.json").read_text())
dataset = MemoryDataset([Sample(input=question, target=answer) for question, answer in samples])


@tool
def note() -> Tool:
    async def execute(text: str, times: int) -> str:
        """Note a text.

        Args:
            text: What to note.
            times: How often.
        """
        return f"noted {times} times: {text}"

    return execute


@task
def plain() -> Task:
    return Task(dataset=dataset, solver=generate(), scorer=match(location="exact"))


@task
def tools() -> Task:
    forced = use_tools(note(), tool_choice="any")
    return Task(dataset=dataset[:4], solver=[forced, generate(tool_calls="single")])
