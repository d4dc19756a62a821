"""Grammars that begin when the reasoning has closed, over a vocabulary whose tokens cross the end of every part."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from deployments.core.calls import Grammar
from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from deployments.engine.sampling.state import TokenMask
from deployments.engine.text.vocabulary import Vocabulary
from deployments.openai.parsing.parts import Content
from deployments.openai.parsing.reader import Reader
from deployments.openai.parsing.syntax import MARKERS, AnswerSyntax
from tests.tiny import Words, byte_tokenizer

THINK = MARKERS["think"]
MERGED = [
    "k>",
    "k>\n\n",
    ">{",
    ">\n{",
    "ink>x",
    "</think>",
    "</think>\n\n",
    "</think>yes",
    "\n\n",
    "\n",
    "<th",
    "<think>\n",
    "hm",
]
SCHEMA = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
GRAMMARS = {
    "json_schema": Grammar(kind="json_schema", source=SCHEMA),
    "choice": Grammar(kind="choice", source='["yes", "no"]'),
    "regex": Grammar(kind="regex", source="[0-9]{3}x"),
    "lark": Grammar(kind="lark", source='start: "<" /[a-z]{2}/ ">"'),
}

CLOSINGS = [
    ["</think>"],
    ["</thin", "k>"],
    ["</thin", "k>\n\n"],
    ["</think", ">{"],
    ["</think", ">\n{"],
    ["</th", "ink>x"],
    ["</think>\n\n"],
    ["</think>yes"],
    ["</think>", "\n\n"],
    ["</think>", "\n", "\n", "\n"],
]


def vocabulary(special: tuple[str, ...] = ()) -> Words:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, normalized=False) for name in MERGED if name not in special])
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in special], special_tokens=True)
    return Words(tokenizer)


PLAIN, SPECIAL = vocabulary(), vocabulary(("<think>", "</think>"))


def compiled(words: Vocabulary, kind: str) -> CompiledGrammar:
    compiler = GrammarCompiler(words, len(words))
    try:
        return compiler.compile(GRAMMARS[kind]).result()
    finally:
        compiler.close()


COMPILED = {
    (name, kind): compiled(words, kind) for name, words in (("plain", PLAIN), ("special", SPECIAL)) for kind in GRAMMARS
}


def drive(words: Vocabulary, mask: TokenMask, wishes: list[int], budget: int) -> tuple[list[int], str | None]:
    """Tokens taken when the wishes come first, then the likeliest of random scores; and why the text ended."""
    chance = torch.Generator().manual_seed(0)
    taken: list[int] = []
    while len(taken) < budget:
        scores = torch.rand(len(words), generator=chance)
        if len(taken) < len(wishes):
            scores[wishes[len(taken)]] = 2.0
        mask.mask(scores)
        assert scores.max() > float("-inf")
        taken.append(mask.advance(int(scores.argmax())))
        if taken[-1] in words.eos_ids or mask.ends is not None:
            return taken, mask.ends
    return taken, None


def read(words: Vocabulary, tokens: list[int], *, opened: bool) -> tuple[str, str]:
    """Reasoning and content of a text."""
    text = b"".join(words.token_bytes(i) for i in tokens if i not in words.eos_ids).decode("utf-8", "replace")
    splitter = Reader(AnswerSyntax(reasoning=THINK), None, reasons=True, begun=THINK.opening if opened else "")
    parts = [*splitter.feed(text), *splitter.finish()]
    content = "".join(part.text for part in parts if isinstance(part, Content))
    return "".join(part.text for part in parts if not isinstance(part, Content)), content  # type: ignore[union-attr]


def fits(kind: str, text: str) -> bool:
    if kind == "json_schema":
        return isinstance(json.loads(text)["a"], int)
    if kind == "choice":
        return text in ("yes", "no")
    return len(text) == 4


def ids(words: Vocabulary, *texts: str) -> list[int]:
    return [i for text in texts for i in words.text_side.encode(text).input_ids]


@pytest.mark.parametrize("kind", GRAMMARS)
@pytest.mark.parametrize("name", ["plain", "special"])
@settings(max_examples=25, deadline=None)
@given(
    before=st.lists(st.sampled_from(["hm", "<", "</", "</th", "a", "é", "\n", "<think>\n", "{", "k>"]), max_size=8),
    closing=st.sampled_from(CLOSINGS),
    opened=st.booleans(),
)
def test_the_answer_follows_the_grammar_wherever_a_token_closes_the_reasoning(
    kind: str, name: str, before: list[str], closing: list[str], opened: bool
) -> None:
    words = PLAIN if name == "plain" else SPECIAL
    wishes = ids(words, *([] if opened else ["<think>"]), *before, *closing)
    mask = COMPILED[name, kind].mask(2000, reasoning=THINK, opened=opened)
    tokens, ends = drive(words, mask, wishes, 2000)
    reasoning, content = read(words, tokens, opened=opened)
    assert ends in ("stop", "length") or tokens[-1] in words.eos_ids
    assert fits(kind, content)
    thought = "".join(before).partition("</think>")[0].strip()
    thought = thought.removeprefix("<think>").strip() if opened else thought  # what the prompt has opened already
    assert reasoning.startswith(thought[:1])


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_model_may_answer_without_reasoning(kind: str) -> None:
    first = {"json_schema": "{", "choice": "no", "regex": "123", "lark": "<ab>"}[kind]
    mask = COMPILED["plain", kind].mask(50, reasoning=THINK)
    wishes = PLAIN.tokenizer.convert_tokens_to_ids(list(first))
    reasoning, content = read(PLAIN, drive(PLAIN, mask, wishes, 50)[0], opened=False)
    assert (reasoning, content.startswith(first), fits(kind, content)) == ("", True, True)


def test_only_the_opening_or_an_answer_may_come_first() -> None:
    mask = COMPILED["special", "choice"].mask(50, reasoning=THINK)
    scores = torch.zeros(len(SPECIAL))
    mask.mask(scores)
    allowed = {SPECIAL.token_text(i) for i in (scores == 0).nonzero().flatten().tolist()}
    assert allowed == {"y", "n", "<", "<th", "<think>", "<think>\n"}


def test_reasoning_is_not_masked() -> None:
    mask = COMPILED["plain", "json_schema"].mask(50, reasoning=THINK, opened=True)
    for token_id in random.Random(0).sample(range(250), 30):
        scores = torch.zeros(len(PLAIN))
        mask.mask(scores)
        assert not scores.any()
        assert mask.advance(token_id) == token_id
        assert mask.ends is None


def test_the_budget_is_that_of_reasoning_and_answer() -> None:
    wishes = ids(PLAIN, "a" * 40, "</think>")
    for left in (8, 9, 20):
        mask = COMPILED["plain", "json_schema"].mask(len(wishes) + left, reasoning=THINK, opened=True)
        tokens, ends = drive(PLAIN, mask, wishes, len(wishes) + left)
        assert (ends, fits("json_schema", read(PLAIN, tokens, opened=True)[1])) == ("length", True)
    mask = COMPILED["plain", "json_schema"].mask(30, reasoning=THINK, opened=True)
    tokens, ends = drive(PLAIN, mask, wishes, 30)
    assert (ends, read(PLAIN, tokens, opened=True)) == (None, ("a" * 30, ""))


def test_channels() -> None:
    harmony = MARKERS["harmony"]
    header = "<|channel|>analysis<|message|>hm {<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"
    mask = COMPILED["plain", "json_schema"].mask(400, reasoning=harmony)
    tokens, ends = drive(PLAIN, mask, PLAIN.tokenizer.convert_tokens_to_ids(list(header.replace(" ", "Ġ"))), 400)
    text = b"".join(PLAIN.token_bytes(i) for i in tokens if i not in PLAIN.eos_ids).decode("utf-8", "replace")
    assert text.startswith(header)
    assert fits("json_schema", text.removeprefix(header))
    assert ends is not None or tokens[-1] in PLAIN.eos_ids


def test_without_reasoning_the_mask_is_the_grammars_own() -> None:
    found: Any = COMPILED["plain", "choice"].mask(5)
    assert type(found).__name__ == "GrammarMask"
