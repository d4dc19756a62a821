"""The documentation says of which models rows are proved, and which ones the generate engine serves."""

from __future__ import annotations

import re
from pathlib import Path

from tests.engine.architectures import DECODERS, ENCODER_DECODERS, NOT_HELD, VISION
from tests.engine.held import ONE_SHOT, ROWS

ROOT = Path(__file__).parent.parent.parent.parent
HELD = {*DECODERS, *ENCODER_DECODERS, *VISION, *ROWS, "whisper"}
OTHERS = {*NOT_HELD, *ONE_SHOT, "paligemma"}
SECTION = (ROOT / "docs/performance.md").read_text().split("## Which models are batched")[1].split("\n## ")[0]


def test_every_model_with_rows_is_named() -> None:
    paragraph = next(part for part in SECTION.split("\n\n") if part.lstrip().startswith("`"))
    assert set(re.findall(r"`([^`]+)`", paragraph)) == HELD
    assert len(HELD) >= 45


def test_every_model_without_rows_has_its_reason() -> None:
    assert set(re.findall(r"^\| `([^`]+)` \| \w+", SECTION, re.MULTILINE)) == OTHERS


def test_the_readme_names_them() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"For {len(HELD)} model types" in readme
    assert set(re.findall(r"`([^`]+)`", readme.split("known to need it:")[1].split("\n\n")[0])) == OTHERS
