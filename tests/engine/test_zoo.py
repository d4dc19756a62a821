"""Engines with default options answer as `generate` alone does, for types that need care."""

from __future__ import annotations

import pytest

from deployments.engine.capabilities import rows_can_hold
from tests.engine.as_alone import as_alone
from tests.engine.zoo import ZOO

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = (
    *("axk2", "blip", "florence2", "idefics", "inkling_text", "janus", "mllama", "qwen4_exp_text", "t5gemma"),
    *("roformer", "vibevoice_asr", "phi3-longrope", "moshi", "evolla"),
)
"""Two types for each cause."""


@pytest.mark.parametrize("name", EXAMPLES)
def test_some_answers_are_those_of_generate_alone(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        checks.briefly()


INDEXED = ("axk2", "deepseek_v32", "glm_moe_dsa", "dots3_note_text", "glm5_next", "hy_v4", "qwen4_exp_text")
ALONE = {
    "deepseek_v4": "cache layer DeepseekV4CSACache",
    "minimax_m3_vl_text": "cache layer MiniMaxM3VLSparseCacheLayer",
    "mllama": "layers keep the columns of images",
    "reformer": "it brings a cache class of its own",
}


@pytest.mark.parametrize("name", [*INDEXED, "evolla"])
def test_types_that_get_rows(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        assert checks.engine.stats().kind == "rows"


@pytest.mark.parametrize("name", sorted(ALONE))
def test_types_that_rows_cannot_hold_and_why(name: str) -> None:
    assert ALONE[name] in str(rows_can_hold(ZOO[name].build()))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_answer_is_that_of_generate_alone(name: str) -> None:
    with as_alone(ZOO[name]) as checks:
        checks.everything()


@pytest.mark.parametrize("name", ["fsmt", "unlimited_ocr"])
def test_requests_that_wait_change_nothing(name: str) -> None:
    with as_alone(ZOO[name], max_rows=2) as checks:
        prompts = checks.prompts((40, 12, 9, 30), media=not checks.specimen.text)
        checks.queued(prompts, (40, 18, 25, 12))
