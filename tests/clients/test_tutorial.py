"""The part of docs/tutorial.md that needs lm_eval."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.clients.conftest import client_python
from tests.docs.conftest import checkpoint, reader  # noqa: F401
from tests.docs.pages import DOCS, blocks
from tests.docs.session import Session

STEPS = blocks(DOCS / "tutorial.md")


def test_the_score(reader: Session, checkpoint: Path) -> None:  # noqa: F811
    """The commands and files of the tutorial, from serving the checkpoint on."""
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    (reader.folder / "lm-eval-env").symlink_to(client_python("lm_eval").parent.parent)
    served = next(number for number, step in enumerate(STEPS) if step.text.startswith("troupe serve"))
    for step in STEPS[served:]:
        if not step.text.startswith("python3.11 -m venv"):
            reader.run(step)
