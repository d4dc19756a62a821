"""Texts and token ids on our side of the wire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.engine.text.vocabulary import Vocabulary


class Words:
    """A tokenizer's terminators, and the ids of short texts.

    Attributes:
        eos_ids: all terminators.
        eos_id: the one that the server stops at; None if there is none.
        pad_id: what the server may fill up with.
    """

    def __init__(self, tokenizer: Any, vocabulary: Vocabulary) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = vocabulary.eos_ids
        own = getattr(tokenizer, "eos_token_id", None)
        self.eos_id: int | None = own if own is not None else min(self.eos_ids, default=None)
        pad = getattr(tokenizer, "pad_token_id", None)
        self.pad_id: int | None = pad if pad is not None else self.eos_id

    def ids(self, text: str) -> list[int]:
        """Without special tokens at either end."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids)))


def word_list(words: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    """TensorRT-LLM's list of words, int32 [2, length]: all ids one after the other; where each word ends, then -1."""
    ids = [token_id for word in words for token_id in word]
    ends = np.cumsum([len(word) for word in words]).tolist()
    return np.array([ids, ends + [-1] * (len(ids) - len(ends))], dtype=np.int32)
