"""Run inspect_ai; arguments as JSON on standard input, results as JSON on standard output."""

import json
import os
import sys

from inspect_ai import Task
from inspect_ai import eval as run_eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import match
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import Tool, tool

given = json.load(sys.stdin)
os.environ.update(TROUPE_BASE_URL=f"{given['url']}/v1", TROUPE_API_KEY="EMPTY", INSPECT_DISPLAY="none")


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


samples = [Sample(input=question, target=answer) for question, answer in given["samples"]]
plain = Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match(location="exact"), name="plain")
tools = Task(
    dataset=MemoryDataset(samples[:4]),
    solver=[use_tools(note(), tool_choice="any"), generate(tool_calls="single")],
    name="tools",
)
config = GenerateConfig(temperature=0.0, seed=7, logprobs=True, top_logprobs=3, max_tokens=200, max_connections=16)
logs = run_eval(
    [plain, tools],
    model=f"openai-api/troupe/{given['model']}",
    log_dir=given["log_dir"],
    display="none",
    **config.model_dump(exclude_none=True),
)
print(
    json.dumps(
        {
            log.eval.task: {
                "status": log.status,
                "accuracy": log.results.scores[0].metrics["accuracy"].value
                if log.results and log.results.scores
                else None,
                "logprobs": [bool(sample.output.choices[0].logprobs) for sample in log.samples],
                "stops": [sample.output.stop_reason for sample in log.samples],
                "calls": [
                    [call.parse_error, call.function, call.arguments]
                    for sample in log.samples
                    for message in sample.messages
                    for call in getattr(message, "tool_calls", None) or []
                ],
            }
            for log in logs
        }
    )
)
