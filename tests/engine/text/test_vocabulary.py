from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from deployments.engine.sampling.logprobs import TokenScore
from deployments.engine.text.detokenizer import WholeDetokenizer
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks
from tests.tiny import (
    Words,
    byte_tokenizer,
    llama,
    sentencepiece_tokenizer,
    suffix_tokenizer,
    unigram_tokenizer,
    wordpiece_tokenizer,
)

BYTES = Words(byte_tokenizer())
SENTENCEPIECE = Words(sentencepiece_tokenizer())
WORDPIECE = Words(wordpiece_tokenizer())
CLEANED = Words(wordpiece_tokenizer(clean_up=True))
STRIPPING = Words(
    byte_tokenizer(),
    decode=lambda ids, skip_special_tokens=True: byte_tokenizer_once.decode(
        ids, skip_special_tokens=skip_special_tokens
    ).strip(),
)
byte_tokenizer_once = byte_tokenizer()
ALL = {
    "bytes": BYTES,
    "sentencepiece": SENTENCEPIECE,
    "wordpiece": WORDPIECE,
    "cleaned": CLEANED,
    "hook": STRIPPING,
    "unigram": Words(unigram_tokenizer()),
    "suffix": Words(suffix_tokenizer()),
    "python": Words(ByT5Tokenizer(extra_ids=3)),
}


def streamed(vocabulary: Vocabulary, ids: Sequence[int], skip: bool) -> list[str]:
    detokenizer = vocabulary.detokenizer(skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


def test_each_tokenizer_gets_the_cheapest_way_that_is_right() -> None:
    assert {name: vocabulary.strategy for name, vocabulary in ALL.items()} == {
        "bytes": "bytes",
        "sentencepiece": "window",
        "wordpiece": "window",
        "cleaned": "whole",
        "hook": "whole",
        "unigram": "window",
        "suffix": "window",
        "python": "whole",
    }


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_joined_are_the_decoding_of_the_whole(name: str, data: st.DataObject) -> None:
    vocabulary = ALL[name]
    # Ids beyond the tokenizer's come from padded embeddings; ByT5's own decode raises for them.
    beyond = -1 if name == "python" else 3
    ids = data.draw(st.lists(st.integers(0, len(vocabulary) + beyond), max_size=60))
    skip = data.draw(st.booleans())
    expected = vocabulary.text_side.decode(ids, skip_special_tokens=skip) if ids else ""
    assert "".join(streamed(vocabulary, ids, skip)) == expected


@pytest.mark.parametrize("name", sorted(set(ALL) - {"hook"}))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_after_a_prompt_the_pieces_are_what_the_new_tokens_add(name: str, data: st.DataObject) -> None:
    vocabulary = ALL[name]
    some = st.lists(st.integers(0, len(vocabulary) - 1), max_size=40)
    prompt, new, skip = data.draw(some), data.draw(some), data.draw(st.booleans())
    before = vocabulary.text_side.decode(prompt, skip_special_tokens=skip) if prompt else ""
    whole = vocabulary.text_side.decode([*prompt, *new], skip_special_tokens=skip) if prompt or new else ""
    detokenizer = vocabulary.detokenizer(skip_special_tokens=skip, prompt=prompt)
    given_out = "".join([*(detokenizer.push(i) for i in new), detokenizer.finish()])
    if whole.startswith(before):
        assert given_out == whole[len(before) :]
    elif name != "cleaned":
        # New bytes changed what the prompt's last bytes mean.
        assert whole.endswith(given_out)


def test_the_space_of_a_first_token_is_there_after_a_prompt() -> None:
    def added(vocabulary: Words, prompt: list[str], new: list[str]) -> str:
        convert = vocabulary.tokenizer.convert_tokens_to_ids
        detokenizer = vocabulary.detokenizer(prompt=convert(prompt))
        return "".join([*(detokenizer.push(i) for i in convert(new)), detokenizer.finish()])

    assert added(SENTENCEPIECE, ["<s>", "▁hello"], ["▁▁", "▁a"]) == "   a"
    assert added(SENTENCEPIECE, ["<s>"], ["▁hello"]) == "hello"
    assert added(SENTENCEPIECE, ["▁a", "<0xC3>"], ["<0xA9>", "▁b"]) == "é b"
    assert added(SENTENCEPIECE, ["▁a", "<0xC3>"], ["▁b"]) == " b"
    assert added(ALL["unigram"], ["▁hello"], ["▁wor", "ld"]) == " world"
    assert added(WORDPIECE, ["do"], ["##n", "'"]) == "n '"
    assert added(ALL["suffix"], ["ab</w>"], ["a</w>", "b</w>"]) == " a b"
    assert added(CLEANED, ["hello", "wor"], ["##ld", ".", "we"]) == "ld. we"
    convert = STRIPPING.tokenizer.convert_tokens_to_ids
    hook = STRIPPING.detokenizer(prompt=convert(["a"]))
    assert "".join([*(hook.push(i) for i in convert(["Ġ", "b"])), hook.finish()]) == "b"


def test_special_tokens_in_a_marker_stay_in_the_text() -> None:
    for vocabulary, end in ((BYTES, "<|im_end|>"), (SENTENCEPIECE, "</s>"), (WORDPIECE, "[SEP]"), (CLEANED, "[PAD]")):
        tokenizer = vocabulary.tokenizer
        others = [i for i in vocabulary.special_ids if i != tokenizer.convert_tokens_to_ids(end)]
        plain = next(i for i in range(len(vocabulary) - 1, 0, -1) if i not in vocabulary.special_ids)
        ids = [plain, tokenizer.convert_tokens_to_ids(end), plain, *others, plain]
        detokenizer = vocabulary.detokenizer(markers=("unused", f"{end}\n"))
        text = "".join([*(detokenizer.push(i) for i in ids), detokenizer.finish()])
        shown = [i for i in ids if i not in others]
        assert text == vocabulary.text_side.decode(shown, skip_special_tokens=False)
        assert end in text


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_byte_level_tokens(text: str) -> None:
    ids = BYTES.text_side.encode(text).input_ids
    assert "".join(streamed(BYTES, ids, True)) == text


def test_an_emoji_split_over_tokens_comes_whole() -> None:
    ids = BYTES.text_side.encode("a😀b").input_ids
    assert streamed(BYTES, ids, True) == ["a", "", "", "", "😀", "b", ""]


def test_byte_tokens_wait_for_the_end_of_their_run() -> None:
    euro = [3 + byte for byte in "€".encode()]
    hello = SENTENCEPIECE.tokenizer.convert_tokens_to_ids("▁hello")
    assert streamed(SENTENCEPIECE, [hello, *euro, hello], True) == ["hello", "", "", "", "€ hello", ""]
    assert "".join(streamed(SENTENCEPIECE, [*euro, 3 + 0xFF, hello], True)) == "���� hello"


def test_a_leading_space_is_dropped_once_and_special_tokens_leave_no_gap() -> None:
    convert = SENTENCEPIECE.tokenizer.convert_tokens_to_ids
    ids = convert(["<s>", "▁hello", "</s>", "▁a", "▁", "▁b"])
    assert streamed(SENTENCEPIECE, ids, True) == ["", "hello", "", " a", " ", " b", ""]


def test_text_that_clean_up_may_still_change_is_held_back() -> None:
    ids = CLEANED.tokenizer.convert_tokens_to_ids(["hello", "wor", "##ld", ".", "we", "do", "n", "'", "t", "s"])
    pieces = streamed(CLEANED, ids, True)
    assert "".join(pieces) == CLEANED.text_side.decode(ids)
    assert pieces[:4] != [""] * 4


class Counting:
    """A decode hook that counts the tokens it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.tokens = 0

    def __call__(self, ids: torch.Tensor) -> str:
        self.tokens += len(ids)
        text: str = self.tokenizer.decode(ids)
        return text


def test_the_cost_of_a_decode_hook_per_token_is_bounded() -> None:
    def cost(length: int) -> float:
        hook = Counting(byte_tokenizer())
        detokenizer = WholeDetokenizer(lambda ids: hook(torch.tensor(ids)), lambda i: False)
        for i in range(length):
            detokenizer.push(i % 90)
        return hook.tokens / length

    assert cost(4000) < 70
    assert cost(8000) < 1.1 * cost(4000)


def window_cost(length: int) -> int:
    decoded = 0
    tokenizer = SENTENCEPIECE.tokenizer

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        text: str = tokenizer.decode(list(ids))
        return text

    from deployments.engine.text.detokenizer import WindowDetokenizer

    detokenizer = WindowDetokenizer(decode, lambda i: True, lambda i: 3 <= i < 259)
    for i in range(length):
        detokenizer.push(259 + i % 15)
    return decoded


def test_a_window_decodes_few_tokens_per_token() -> None:
    assert window_cost(1000) <= 3 * 1000


class TestTokens:
    def test_bytes_of_byte_level_tokens_are_exact(self) -> None:
        data = "é€😀 \n\x00".encode()
        ids = BYTES.text_side.encode(data.decode()).input_ids
        assert b"".join(BYTES.token_bytes(i) for i in ids) == data
        assert BYTES.token_text(ids[0]) == "�"

    def test_bytes_of_byte_tokens_are_exact(self) -> None:
        assert [SENTENCEPIECE.token_bytes(3 + b) for b in (0, 0xE2, 0xFF)] == [b"\x00", b"\xe2", b"\xff"]

    @pytest.mark.parametrize(
        ("token", "text"), [("▁hello", " hello"), ("lo", "lo"), ("▁", " "), ("</s>", "</s>"), ("é", "é"), ("▁▁", "  ")]
    )
    def test_a_piece_has_the_space_it_adds(self, token: str, text: str) -> None:
        token_id = SENTENCEPIECE.tokenizer.convert_tokens_to_ids(token)
        assert SENTENCEPIECE.token_text(token_id) == text
        assert SENTENCEPIECE.token_bytes(token_id) == text.encode()

    def test_wordpieces(self) -> None:
        convert = WORDPIECE.tokenizer.convert_tokens_to_ids
        assert WORDPIECE.token_text(convert("wor")) == " wor"
        assert WORDPIECE.token_text(convert("##ld")) == "ld"

    @pytest.mark.parametrize("vocabulary", ALL.values(), ids=list(ALL))
    def test_ids_the_tokenizer_does_not_know_have_no_text(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.token_bytes(100_000) == b""

    def test_scored_names_the_token_and_its_alternatives(self) -> None:
        scored = BYTES.scored(32, TokenScore(-0.5, 2, (33, 32), (-0.25, -0.5)))
        assert (scored.token, scored.bytes, scored.logprob, scored.rank) == ("A", b"A", -0.5, 2)
        assert [(c.token, c.bytes, c.logprob) for c in scored.top] == [("B", b"B", -0.25), ("A", b"A", -0.5)]


class TestTerminators:
    def test_of_tokenizer_template_config_and_loader(self) -> None:
        model = llama()
        model.generation_config.eos_token_id = [10, 11]
        model.config.eos_token_id = 12
        vocabulary = Vocabulary(Hooks(ModelInfo(model=model, tokenizer=byte_tokenizer(), stop_token_ids=(13,))))
        assert vocabulary.eos_ids == {10, 11, 13, 257, 260}

    def test_the_config_counts_where_generation_config_names_none(self) -> None:
        model = llama()
        model.generation_config.eos_token_id = None
        model.config.eos_token_id = 12
        assert Vocabulary(Hooks(ModelInfo(model=model, tokenizer=byte_tokenizer()))).eos_ids == {12, 257, 260}

    @pytest.mark.parametrize(
        ("template", "found"),
        [
            (None, {257}),
            ("{% for m in messages %}{{ m.content }}\n{% endfor %}", {257}),
            ("{% for m in messages %}{{ m.content }} <|eos|>\n{% endfor %}", {257}),
            ("{% for m in messages %}{{ m.content }}\n<|im_end|>{% endfor %}", {257, 260}),
            ("{{ raise_exception('no') }}", {257}),
        ],
    )
    def test_the_template_tells_how_a_turn_ends(self, template: str | None, found: set[int]) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        assert Words(tokenizer).eos_ids == found

    def test_without_a_tokenizer(self) -> None:
        def encode(prompt: str, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": list(prompt.encode())}

        def decode(ids: torch.Tensor) -> str:
            return bytes(ids.tolist()).decode(errors="replace")

        vocabulary = Words(None, encode=encode, decode=decode)
        assert vocabulary.eos_ids == set()
        assert "".join(streamed(vocabulary, list("héllo 😀".encode()), True)) == "héllo 😀"
