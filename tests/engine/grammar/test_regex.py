"""Regular expressions with word boundaries accept what Python's `re` does."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch

from deployments.core.calls import Grammar
from deployments.core.errors import BadRequest
from deployments.engine.grammar.grammar import CompiledGrammar, GrammarCompiler
from tests.engine.text.test_vocabulary import BYTES

EOS = 257


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BYTES, 261)


def compiled(compiler: GrammarCompiler, pattern: str) -> CompiledGrammar:
    return compiler.compile(Grammar(kind="regex", source=pattern)).result(timeout=20)


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Whether a model could write exactly this text, and end."""
    mask = grammar.mask(1000)
    for token_id in [*BYTES.text_side.encode(text).input_ids, EOS]:
        if mask.ends is not None:
            return bool(token_id == EOS)
        scores = torch.zeros(261)
        mask.mask(scores)
        if scores[token_id] < 0:
            return False
        mask.advance(int(token_id))
    return True


OCTET = "(?:25[0-5]|2[0-4][0-9]|[01]?[0-9][0-9]?)"
SAMPLES = {
    rf"\b(?:{OCTET}\.){{3}}{OCTET}\b": ["192.168.0.1", "1.2.3.4", "256.1.1.1", "1.2.3", "1.2.3.4.", "01.2.3.255"],
    r"(?:\b\w+\b[ ,]*)+": ["a", "one two,three", "one ", " one", "", ",", "a,,b"],
    r"\b[A-Z][a-z]+\b(?: \b\w+\b){0,3}\.": ["Hello.", "Hello world.", "Hello  world.", "hello.", "A b.", "Ab c d e f."],
    r"(?i)\bcat\b": ["cat", "CAT", "cats", "cat "],
    r"\b\d+\b|\bnone\b": ["12", "none", "12a", "non"],
    r".*\bTODO\b.*": ["TODO", "a TODO b", "aTODO", "TODO1", "x TODO", "é TODO", "éTODO"],
    r"a\Bb|a\b b": ["ab", "a b", "a"],
    r"(?:\B-|\b\w)*": ["a", "-", "--", "a-", "-a", "a-a"],
    r"\b.{2,60}\b": ["ab", "a b", "a ", "a", " a", "é é"],
    r"a{,2}\b\Z": ["", "a", "aa", "aaa"],
    r"(?s:\b.\b|-.)": ["a", "-a", "-\n", "- ", "\n"],
}


@pytest.mark.parametrize("pattern", SAMPLES)
def test_expressions_of_users(compiler: GrammarCompiler, pattern: str) -> None:
    grammar = compiled(compiler, pattern)
    for text in SAMPLES[pattern]:
        assert accepts(grammar, text) == (re.fullmatch(pattern, text) is not None), text


TEXTS = ["".join(letters) for length in range(4) for letters in itertools.product("a1- é", repeat=length)]
ATOMS = ["a", "b", "1", "-", "[ab]", "[^a]", r"\w", r"\W", r"\d", r"\s", ".", "é", "_", "[a-z-]", "(?i:A)", "(?i:[^B])"]
COUNTS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}", "*?"]


def expression(chance: random.Random, depth: int) -> str:
    kind = chance.random()
    if depth == 0 or kind < 0.35:
        return chance.choice(ATOMS)
    if kind < 0.52:
        return chance.choice([r"\b", r"\b", r"\b", r"\B"])
    if kind < 0.67:
        return expression(chance, depth - 1) + expression(chance, depth - 1)
    if kind < 0.78:
        return f"(?:{expression(chance, depth - 1)}|{expression(chance, depth - 1)})"
    return f"(?:{expression(chance, depth - 1)}){chance.choice(COUNTS)}"


def compare(compiler: GrammarCompiler, seed: int) -> bool:
    """Compare a random expression on random texts; False if there is nothing to compare."""
    chance = random.Random(seed)
    pattern = "".join(expression(chance, 3) for _ in range(chance.randrange(1, 4)))
    fits = [text for text in TEXTS if re.fullmatch(pattern, text)]
    if not fits:
        return False
    grammar = compiled(compiler, pattern)
    for text in [*chance.sample(TEXTS, 12), *chance.sample(fits, min(6, len(fits)))]:
        assert accepts(grammar, text) == (text in fits), (pattern, text)
    return True


def test_random_expressions(compiler: GrammarCompiler) -> None:
    assert sum(compare(compiler, seed) for seed in range(120)) > 60


@pytest.mark.long
def test_more_random_expressions(compiler: GrammarCompiler) -> None:
    assert sum(compare(compiler, seed) for seed in range(1000, 4000)) > 1500


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1\b", "a back reference"),
        (r"(?=a)\w", "a lookaround"),
        (r"(?<!a)b\b", "a lookaround"),
        (r"(?>a\b)", "an atomic group"),
        (r"(a)?(?(1)b|c)\b", "a conditional group"),
        (r"(?m)^a$\b", r"\(\?m\)"),
        (r"\b\p{L}\b", r"bad escape \\p"),
        (r"(?:\b\w\W){1,300}", "more than 64 repetitions"),
        (r"a\bb", "no text matches"),
        (r"a(\b", "unterminated"),
    ],
)
def test_what_cannot_be_followed_is_named(compiler: GrammarCompiler, pattern: str, named: str) -> None:
    with pytest.raises(BadRequest, match=named) as caught:
        compiled(compiler, pattern)
    assert caught.value.param
