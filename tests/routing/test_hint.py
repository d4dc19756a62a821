"""What a router is told of how a prompt begins."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.core.calls import ChatPrompt, TextPrompt, TokensPrompt
from deployments.core.token_ids import TokenIds
from deployments.openai.completions.plan import prompt_blocks
from deployments.routing.hint import RoutingHint, text_blocks, token_blocks


@pytest.mark.parametrize("session", ["", "talk", "a|b,c"])
@pytest.mark.parametrize("blocks", [(), ("0a",), ("0a", "1b")])
def test_a_hint_comes_through_as_it_was(session: str, blocks: tuple[str, ...]) -> None:
    hint = RoutingHint(session, blocks)
    assert RoutingHint.from_text(str(hint)) == hint


def chat(examples: str, *more: str) -> list[Any]:
    messages = [{"role": "system", "content": examples}, *({"role": "user", "content": text} for text in more)]
    return [[{"type": "function", "function": {"name": "look", "parameters": {}}}], messages]


def test_prompts_have_as_many_digests_in_common_as_they_begin_alike() -> None:
    first = text_blocks("m", chat("x" * 5000, "What is tea?" * 200))
    second = text_blocks("m", chat("x" * 5000, "How deep is it?" * 200))
    assert [a == b for a, b in zip(first, second, strict=False)] == [True] * 4 + [False] * 3
    assert text_blocks("m", chat("x" * 5000)) == first[:4]
    assert not set(first) & set(text_blocks("other", chat("x" * 5000)))


def test_a_later_turn_begins_as_the_first() -> None:
    messages = chat("x" * 3000, "What is tea?")
    opening = text_blocks("m", messages)
    messages[1] += [{"role": "assistant", "content": "A drink. " * 300}, {"role": "user", "content": "And then?"}]
    later = text_blocks("m", messages)
    assert later[: len(opening)] == opening
    assert len(later) > len(opening)


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1023, 0), (1024, 1), (40_000, 32), (10_000_000, 32)])
def test_their_number_is_bounded(length: int, count: int) -> None:
    assert len(text_blocks("m", "x" * length)) == count
    assert len(token_blocks("m", TokenIds([1]) if not length else [1] * (length // 4))) == count


def test_texts_are_told_apart_at_their_borders() -> None:
    assert text_blocks("m", ["x" * 1000, "y" * 1000]) != text_blocks("m", ["x" * 1001, "y" * 999])
    assert text_blocks("m", ["\ud800" * 2000])


def test_prompts_of_completions() -> None:
    """Text and token ids have blocks of their own; a list of ids is what `TokenIds` of the same ids are."""
    text = prompt_blocks("m", TextPrompt(text="x" * 3000))
    ids = prompt_blocks("m", TokensPrompt(token_ids=TokenIds([7] * 600)))
    assert (len(text), len(ids)) == (2, 2)
    assert prompt_blocks("m", TokensPrompt(token_ids=[7] * 512)) == ids
    assert prompt_blocks("m", ChatPrompt(messages=[])) == ()
