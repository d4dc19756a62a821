"""The part of docs/inside.md that needs lm_eval."""

from __future__ import annotations

from tests.clients.conftest import client_python
from tests.docs.conftest import reader  # noqa: F401
from tests.docs.pages import DOCS, blocks
from tests.docs.session import Session

STEPS = blocks(DOCS / "inside.md")


def test_a_benchmark_under_steering(reader: Session) -> None:  # noqa: F811
    """The server, and the commands and files of the task."""
    (reader.programs / "lm_eval").symlink_to(client_python("lm_eval").parent / "lm_eval")
    task = next(number for number, step in enumerate(STEPS) if step.text.startswith("task: choices"))
    for step in [*STEPS[:2], *STEPS[task : task + 3]]:
        reader.run(step)
