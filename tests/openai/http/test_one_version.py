"""A request that needs several calls, while the model's files change between them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

from deployments.core.calls import Prompt
from deployments.core.client import Rendered
from deployments.core.fingerprint import check_expected, fingerprint
from deployments.openai.app import build_api
from tests.in_loop import in_loop
from tests.openai.http.test_large_bodies import Replica, ask

A, B = (fingerprint(digit * 12, "0" * 12) for digit in "ab")


class Changing(Replica):
    """A model that answers each call as another version."""

    def __init__(self, versions: Iterable[str]) -> None:
        self._versions = iter(versions)

    async def render(self, model: str, prompt: Prompt, *, expect: str = "") -> Rendered:
        found = next(self._versions)
        check_expected(model, found, expect)
        return Rendered(text=found, token_ids=(1,), max_model_len=10, fingerprint=found)


async def render_three(versions: Iterable[str], **headers: str) -> tuple[int, Any]:
    """The status and the JSON of an answer that takes three calls."""
    content = json.dumps({"prompt": ["a", "b", "c"]}).encode()
    status, body = await ask(build_api(Changing(versions)), "/completions/render", content, headers)
    return status, json.loads(body)


@in_loop
async def test_it_begins_again_with_the_new_version() -> None:
    status, answer = await render_three([A, A, B, B, B, B])
    assert status == 200
    assert [prompt["prompt"] for prompt in answer["data"]] == [B, B, B]


@in_loop
async def test_a_model_that_changes_at_each_call() -> None:
    status, answer = await render_three(itertools.cycle([A, B]))
    assert (status, answer["error"]["code"]) == (503, "unavailable")


@in_loop
async def test_a_request_that_says_which_version_it_is_for() -> None:
    assert (await render_three([A] * 3, **{"x-troupe-expect": A}))[0] == 200
    status, answer = await render_three([A, B], **{"x-troupe-expect": A})
    assert (status, answer["error"]["code"]) == (409, "version_mismatch")
