"""Texts that are never generated, whatever tokens they consist of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from deployments.engine.base.phrase_search import Begun, Phrases

Ids = npt.NDArray[np.int64]

_KEPT = 16
_KEPT_BEGINNINGS = 1 << 14
_KEPT_IDS = 1 << 21
# No byte of UTF-8: no word goes from one token into the next.
_BETWEEN = b"\xff"


class WordIndex:
    """Finds the tokens of a vocabulary by their bytes; built once per model.

    Args:
        token_bytes: the bytes a token adds to the text.
        count: ids from 0 to `count` - 1 are looked at.

    Attributes:
        longest: bytes of the longest token.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], count: int) -> None:
        texts = [token_bytes(i) for i in range(count)]
        sizes = np.fromiter(map(len, texts), dtype=np.int64, count=count)
        self._all = np.frombuffer(_BETWEEN.join([*texts, b""]), dtype=np.uint8)
        self._starts = np.cumsum(sizes + 1) - (sizes + 1)
        self.longest = int(sizes.max(initial=0))
        # The places of every pair of bytes, one pair after the other.
        pairs = self._all.astype(np.uint16) << 8
        pairs[:-1] |= self._all[1:]
        self._places = np.argsort(pairs, kind="stable")
        self._bounds = np.concatenate([[0], np.cumsum(np.bincount(pairs, minlength=1 << 16))])
        self._starting: OrderedDict[bytes, Ids] = OrderedDict()
        self._words: OrderedDict[tuple[str, ...], Words] = OrderedDict()

    def words(self, words: Sequence[str]) -> Words:
        """What is known of some texts before any token is generated; the last ones are kept."""
        key = tuple(words)
        known = self._words.pop(key, None) or Words(self, key)
        self._words[key] = known
        while len(self._words) > _KEPT:
            self._words.popitem(last=False)
        return known

    def starting(self, beginning: bytes) -> Ids:
        """Tokens whose bytes begin with `start`."""
        if len(beginning) > self.longest:
            return np.empty(0, dtype=np.int64)
        found = self._starting.get(beginning)
        if found is None:
            places = self._occurrences(beginning, 0)
            tokens = np.searchsorted(self._starts, places, side="right") - 1
            found = tokens[self._starts[tokens] == places]
            self._starting[beginning] = found
            if len(self._starting) > _KEPT_BEGINNINGS:
                self._starting.popitem(last=False)
        return found

    def containing(self, word: bytes) -> Ids:
        """Tokens in whose bytes the word occurs."""
        if len(word) > self.longest:
            return np.empty(0, dtype=np.int64)
        rarest = min(range(max(1, len(word) - 1)), key=lambda place: len(self._pair(word, place)))
        return np.unique(np.searchsorted(self._starts, self._occurrences(word, rarest), side="right") - 1)

    def _pair(self, word: bytes, place: int) -> Ids:
        """Where the two bytes of a word at a place are, or its only byte."""
        first = word[place] << 8 | (word[place + 1] if len(word) > 1 else 0)
        last = first + (1 if len(word) > 1 else 256)
        return self._places[self._bounds[first] : self._bounds[last]]

    def _occurrences(self, word: bytes, known: int) -> Ids:
        """Where a word is, looked for where its pair of bytes at the place `known` is."""
        places = self._pair(word, known) - known
        places = places[(places >= 0) & (places + len(word) <= len(self._all))]
        for offset, byte in enumerate(word):
            if offset not in (known, known + 1) and len(places):
                places = places[self._all[places + offset] == byte]
        return places


class Words:
    """Bad words, and the tokens that contain one.

    Args:
        index: of the vocabulary.
        words: the texts; empty ones are ignored.
    """

    def __init__(self, index: WordIndex, words: Sequence[str]) -> None:
        self.phrases = Phrases(word.encode() for word in words)
        none = np.empty(0, dtype=np.int64)
        self.containing = np.unique(np.concatenate([none, *map(index.containing, self.phrases.sorted)]))
        self._index = index
        self._completing: dict[Begun, Ids] = {}
        self._size = 0

    def completing(self, begun: Begun) -> Ids:
        """Tokens that complete one of the words that have begun."""
        found = self._completing.get(begun)
        if found is None:
            words = self.phrases.sorted[begun.low : begun.high]
            rests = [word[begun.depth :] for word in words if len(word) - begun.depth <= self._index.longest]
            found = np.concatenate([np.empty(0, dtype=np.int64), *map(self._index.starting, rests)])
            if self._size > _KEPT_IDS:
                self._completing, self._size = {}, 0
            self._completing[begun] = found
            self._size += len(found)
        return found


class BadWords:
    """The bad words of one sequence and the end of its text.

    Args:
        index: of the vocabulary.
        token_bytes: the bytes a token adds to this sequence's text.
        words: the texts; empty ones are ignored.
    """

    def __init__(self, index: WordIndex, token_bytes: Callable[[int], bytes], words: Sequence[str]) -> None:
        self._token_bytes = token_bytes
        self._words = index.words(words)
        self._begun: list[Begun] = []

    def add(self, token_id: int) -> None:
        """Add a generated token."""
        text = self._token_bytes(token_id)
        for place in range(len(text)):
            self._begun, _ = self._words.phrases.step(self._begun, text[place : place + 1])

    def banned(self) -> Ids:
        """Tokens that would contain or complete a bad word; some are there more than once."""
        found = [tokens for begun in self._begun if len(tokens := self._words.completing(begun))]
        return np.concatenate([self._words.containing, *found]) if found else self._words.containing
