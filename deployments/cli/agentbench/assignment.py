"""The configuration of a run, in AgentBench's YAML: the agent, the judge, the tasks and the assignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.cli.agentbench.tasks import Task
from deployments.cli.endpoint.server import Endpoint

JUDGE = "gpt-3.5-turbo-0613"
"""The agent that ltp asks for its verdicts: here, the model that is measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What is run.

    Attributes:
        repo: AgentBench's folder.
        fields: further ones of each request.
        output: folder of the results.
        workers: samples at a time.
    """

    repo: Path
    server: Endpoint
    model: str
    tasks: Sequence[Task]
    fields: Mapping[str, Any]
    output: Path
    workers: int

    @property
    def agent(self) -> str:
        """The agent's name, which is also that of a folder."""
        return "".join(each if each.isalnum() or each in "-._+" else "_" for each in self.model)

    @property
    def files(self) -> Path:
        """The folder of the written files."""
        return self.output / "config"

    def result(self, task: Task) -> Path:
        """The folder of a task's results."""
        return self.output / self.agent / task.name

    def write(self, controller: str) -> None:
        """Write agents.yaml, tasks.yaml and assignment.yaml.

        Args:
            controller: URL of its API.
        """
        self.files.mkdir(parents=True, exist_ok=True)
        agent = self._agent()
        names = [task.name for task in self.tasks]
        self._write("agents.yaml", {self.agent: agent, JUDGE: agent})
        self._write("tasks.yaml", {
            "import": sorted({str(self.repo / task.kind.config) for task in self.tasks}),
            **{task.name: {"parameters": self._task(task)} for task in self.tasks},
        })  # fmt: skip
        clients = {
            name: {"module": "src.client.TaskClient", "parameters": {"name": name, "controller_address": controller}}
            for name in names
        }
        self._write("assignment.yaml", {
            "definition": {"task": clients, "agent": {self.agent: agent}},
            "concurrency": {"task": dict.fromkeys(names, self.workers), "agent": {self.agent: self.workers}},
            "assignments": [{"agent": [self.agent], "task": names}],
            # AgentBench formats this text.
            "output": str(self.output).replace("{", "{{").replace("}", "}}"),
        })  # fmt: skip

    def _agent(self) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.server.key or 'EMPTY'}"}
        return {
            "module": "src.client.agents.HTTPAgent",
            "parameters": {
                "name": self.agent,
                "url": f"{self.server.url}/v1/chat/completions",
                "headers": headers,
                "body": {"model": self.model, "temperature": 0, "max_tokens": 512, **self.fields},
                # Without a role of its own an answer would go back as "agent".
                "prompter": {"name": "role_content_dict", "args": {"agent_role": "assistant"}},
                "return_format": "{response[choices][0][message][content]}",
            },
        }

    def _task(self, task: Task) -> dict[str, Any]:
        parameters = {"name": task.name, "concurrency": task.kind.capacity}
        return (
            {**parameters, "eval_yaml": str(self.files / "agents.yaml")} if task.name.startswith("ltp") else parameters
        )

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        file = self.files / name
        file.touch(mode=0o600)  # it may have a key
        file.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
