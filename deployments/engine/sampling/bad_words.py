"""Texts that are never generated, however they fall into tokens."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_KEPT = 256


class WordIndex:
    """Finds the tokens of a vocabulary by their bytes; built once per model.

    Args:
        token_bytes: the bytes a token adds to the text.
        count: ids from 0 to `count` - 1 are looked at.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], count: int) -> None:
        pairs = sorted((data, i) for i in range(count) if (data := token_bytes(i)))
        self._bytes = [data for data, _ in pairs]
        self._ids = np.array([i for _, i in pairs], dtype=np.int64)
        self._containing: dict[bytes, npt.NDArray[np.int64]] = {}

    def starting(self, beginning: bytes) -> npt.NDArray[np.int64]:
        """Tokens whose bytes begin so."""
        first = bisect_left(self._bytes, beginning)
        last = first
        while last < len(self._bytes) and self._bytes[last].startswith(beginning):
            last += 1
        return self._ids[first:last]

    def containing(self, word: bytes) -> npt.NDArray[np.int64]:
        """Tokens in whose bytes the word occurs."""
        found = self._containing.get(word)
        if found is None:
            found = self._ids[[place for place, data in enumerate(self._bytes) if word in data]]
            if len(self._containing) >= _KEPT:
                self._containing.clear()
            self._containing[word] = found
        return found


class BadWords:
    """The bad words of one row and the end of its text.

    Args:
        index: of the vocabulary.
        token_bytes: the bytes a token adds to this row's text.
        words: the texts; empty ones are ignored.
    """

    def __init__(self, index: WordIndex, token_bytes: Callable[[int], bytes], words: Sequence[str]) -> None:
        self._index = index
        self._token_bytes = token_bytes
        self._words = [word.encode() for word in words if word]
        none = np.empty(0, dtype=np.int64)
        self._whole = np.unique(np.concatenate([none, *(index.containing(word) for word in self._words)]))
        self._kept = max((len(word) for word in self._words), default=1) - 1
        self._tail = b""

    def add(self, token_id: int) -> None:
        """Take note of a generated token."""
        text = self._tail + self._token_bytes(token_id)
        self._tail = text[max(0, len(text) - self._kept) :]

    def banned(self) -> npt.NDArray[np.int64]:
        """Tokens that would contain or complete a bad word."""
        found = [self._whole]
        for word in self._words:
            for k in range(1, min(len(word), len(self._tail) + 1)):
                if self._tail.endswith(word[:k]):
                    found.append(self._index.starting(word[k:]))
        return found[0] if len(found) == 1 else np.unique(np.concatenate(found))
