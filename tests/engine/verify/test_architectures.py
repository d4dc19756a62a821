"""The documentation says which models are proved to batch, and which ones the generate engine serves."""

from __future__ import annotations

import re
from pathlib import Path

from tests.engine.architectures import DECODERS, ENCODER_DECODERS, NOT_HELD, VISION
from tests.engine.held import BATCHED, GENERATED

ROOT = Path(__file__).parent.parent.parent.parent
HELD = {*DECODERS, *ENCODER_DECODERS, *VISION, *BATCHED, "whisper"}
OTHERS = {*NOT_HELD, *GENERATED, "paligemma"}
SECTION = (ROOT / "docs/performance.md").read_text().split("## Which models are batched")[1].split("\n## ")[0]


def test_every_model_with_sequences_is_named() -> None:
    paragraph = next(part for part in SECTION.split("\n\n") if part.lstrip().startswith("`"))
    assert set(re.findall(r"`([^`]+)`", paragraph)) == HELD
    assert len(HELD) >= 45


def test_every_model_without_sequences_has_its_reason() -> None:
    assert set(re.findall(r"^\| `([^`]+)` \| \w+", SECTION, re.MULTILINE)) == OTHERS


def test_the_pages_count_them() -> None:
    assert f"For {len(HELD)} model types" in (ROOT / "README.md").read_text()
    counted = f"{len(HELD)} model types are batched. {len(OTHERS)} types"
    assert counted in (ROOT / "docs/performance.md").read_text()
