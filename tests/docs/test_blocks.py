"""Every code block of the README and of docs/ has a test that runs it, or a check of what it configures."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from ray.serve.schema import DeploymentSchema, ServeDeploySchema

from deployments.config.app import AppArgs, parse_args
from tests.docs.claims import CLAIMED, FIGURES, claim
from tests.docs.pages import ROOT, Block, all_blocks

BLOCKS = list(all_blocks())
FOLLOWED = (
    "docs/clients/messages.md",
    "docs/inside.md",
    "docs/tutorial.md",
    "docs/cookbook.md",
    "docs/write-a-loader.md",
)
"""Pages whose blocks tests/docs/test_pages.py runs from top to bottom."""
GENERATED = "docs/reference/routes.md"
"""A page whose examples tests/docs/test_reference.py asks a server."""


def is_run(block: Block) -> bool:
    return block.page in FOLLOWED and (block.language in ("bash", "python") or block.title is not None)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_a_test(block: Block) -> None:
    assert (
        claim(block) is not None
        or is_run(block)
        or block.page == GENERATED
        or block.language in ("yaml", "json")  # below
        or (block.language == "" and block.page in FIGURES)
    ), f"{block} has no test: make its page one that is followed, or claim it in tests/docs/claims.py"


@pytest.mark.parametrize("key", CLAIMED, ids=str)
def test_a_claim_is_kept(key: tuple[str, str]) -> None:
    assert [block for block in BLOCKS if block.page == key[0] and block.text.startswith(key[1])], "no such block"
    file, _, name = CLAIMED[key].partition("::")
    source = (ROOT / file).read_text(encoding="utf-8")
    assert not name or re.search(rf"^def {name}\(", source, re.MULTILINE), CLAIMED[key]


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=str)
def test_json(block: Block) -> None:
    assert json.loads(block.text)


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "yaml" and claim(block) is None], ids=str
)
def test_a_configuration(block: Block) -> None:
    """Keys and values are those that Ray Serve and Troupe read."""
    given = yaml.safe_load(block.text)
    if "applications" in given:
        ServeDeploySchema.model_validate(given)
    checked = [parse_args(args) for args in arguments(given)]
    deployments = [each for app in given.get("applications", [given]) for each in app.get("deployments", [])]
    for deployment in deployments:
        DeploymentSchema.model_validate(deployment)
    assert checked or deployments, f"{block} is not a configuration: claim it in tests/docs/claims.py"


def arguments(given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of Troupe in a configuration, or in the part of one that a page shows."""
    for app in given.get("applications", [given]):
        if "args" in app:
            yield app["args"]
    if given.keys() & AppArgs.model_fields.keys():
        pools = given.get("pools", {}).values()
        sources = [*given.get("folders", []), *filter(None, [given.get("hub")])]
        names = [name for pool in pools for name in pool["models"]] or [each["like"] for each in sources] or ["any"]
        models = [{"id": name, "loader": "model_loaders.auto:load_model"} for name in names]
        yield {"models": models, **given}
