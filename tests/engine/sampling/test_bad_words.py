from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.core.calls import SamplingParams
from deployments.engine.sampling.bad_words import BadWords, WordIndex
from deployments.engine.sampling.sample import sample_batch
from deployments.engine.text.vocabulary import Vocabulary
from tests.engine.text.test_vocabulary import BYTES, SENTENCEPIECE

TOKENS = [b"a", b"b", b"ab", b"ba", b"aba", b"", b"c", b"abc"]


@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.text("abc", max_size=4), max_size=3),
    wishes=st.lists(st.permutations(range(len(TOKENS))), max_size=15),
)
def test_no_bad_word_ever_appears_and_nothing_else_is_banned(words: list[str], wishes: list[list[int]]) -> None:
    bad = BadWords(WordIndex(TOKENS.__getitem__, len(TOKENS)), TOKENS.__getitem__, words)
    text = b""
    for wish in wishes:
        banned = set(bad.banned().tolist())
        guilty = {i for i, t in enumerate(TOKENS) if t and any(w and w.encode() in text + t for w in words)}
        assert banned == guilty
        token_id = next(i for i in wish if i not in banned)
        bad.add(token_id)
        text += TOKENS[token_id]


@pytest.mark.parametrize("vocabulary", [BYTES, SENTENCEPIECE])
def test_a_model_cannot_spell_a_bad_word(vocabulary: Vocabulary) -> None:
    params = SamplingParams(bad_words=("hel", "é"), seed=0)
    row = vocabulary.sampler(params, [1], vocab_size=300, device=torch.device("cpu"))
    wanted = (b"h", b"e", b"l", b"he", b"lo", b"\xc3", b"\xa9", "é".encode())
    liked = torch.full((1, 300), -20.0)
    liked[0, [i for i in range(300) if vocabulary.token_bytes(i) in wanted]] = 5.0
    produced = b"".join(vocabulary.token_bytes(sample_batch(liked, [row])[0].token_id) for _ in range(600))
    assert b"he" in produced
    assert b"hel" not in produced
    assert "é".encode() not in produced
