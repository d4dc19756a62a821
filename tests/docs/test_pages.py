"""The pages that a reader follows, from top to bottom: every command runs, and prints what the page shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.docs.claims import claim
from tests.docs.conftest import by_command, in_process
from tests.docs.pages import DOCS, ROOT, Block, blocks, sections
from tests.docs.session import Session

COOKBOOK = sections(DOCS / "cookbook.md")


def follow(reader: Session, found: list[Block]) -> None:
    """Run the blocks that no other test claims."""
    for block in found:
        if claim(block) is None and (block.language in ("bash", "python") or block.title is not None):
            reader.run(block)


@pytest.mark.parametrize(
    "reader", [in_process, pytest.param(by_command, marks=pytest.mark.long)], ids=["quick", "real"], indirect=True
)
def test_the_tutorial(reader: Session) -> None:
    follow(reader, blocks(DOCS / "tutorial.md"))


@pytest.mark.parametrize("heading", COOKBOOK)
def test_a_recipe_of_the_cookbook(reader: Session, checkpoint: Path, heading: str) -> None:
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    shutil.copytree(ROOT / "tests" / "adapters" / "one_more", reader.folder / "my-adapter")
    follow(reader, COOKBOOK[heading])


def test_the_messages_api(reader: Session, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    follow(reader, blocks(DOCS / "clients" / "messages.md"))


def test_inside_the_model(reader: Session) -> None:
    follow(reader, blocks(DOCS / "inside.md"))


def test_writing_a_loader(reader: Session, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    follow(reader, blocks(DOCS / "write-a-loader.md"))


def test_the_slurm_job_serves_what_it_says(reader: Session, checkpoint: Path) -> None:
    """The job, but for serving: the configuration of its command."""
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    (reader.folder / "keys.txt").write_text("a-key\n")
    (job,) = [block for block in COOKBOOK["Run under Slurm"] if block.title is not None]
    printed = job.text.replace("exec troupe serve", "troupe serve --print-config") + "cat troupe-url.txt >&2\n"
    reader.environment["SLURM_JOB_ID"] = "31415926"
    text = reader.bash(replace(job, title=None, text=printed))
    config = yaml.safe_load(text.partition("http://")[0])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 25926}
    assert config["applications"][0]["args"]["api"]["api_keys_file"].endswith("keys.txt")
    assert text.strip().endswith(":25926/v1")


def test_waiting_for_the_slurm_job(reader: Session, checkpoint: Path) -> None:
    """With a Slurm that starts the job after the command has returned: a server that runs already."""
    shutil.copytree(checkpoint, reader.folder / "my-checkpoint")
    (job, waiting) = [block for block in COOKBOOK["Run under Slurm"] if block.language == "bash"]
    reader.run(replace(job, title=None, text="troupe serve my-checkpoint\n"))
    (reader.folder / "troupe-url.txt").write_text("http://127.0.0.1:1/v1\n")  # of an earlier job
    sbatch = reader.programs / "sbatch"
    sbatch.write_text(f"#!/bin/sh\n(sleep 0.2; echo {reader.url}/v1 > troupe-url.txt) > /dev/null 2>&1 &\n")
    sbatch.chmod(0o755)
    reader.bash(replace(waiting, text=waiting.text.replace("sleep 5", "sleep 0.1")))
    assert (reader.folder / "troupe-url.txt").read_text() == f"{reader.url}/v1\n"
