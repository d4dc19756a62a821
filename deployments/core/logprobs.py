"""Tokens of an answer with their log-probabilities."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """A token that could have stood at a position, with its log-probability (natural logarithm)."""

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """The text and the bytes of every token id of a model."""

    texts: tuple[str, ...]
    bytes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WholeVocabulary(Sequence[Candidate]):
    """Every token of a model as a candidate, best first; tokens of probability 0 are left out.

    A vocabulary of 128k tokens is 512 KiB for each position; the texts cross once with the positions of one message.

    Attributes:
        tokens: the model's, the same object at every position.
        logprobs: float32 in this machine's byte order, by token id.
    """

    tokens: TokenTexts
    logprobs: bytes

    def __iter__(self) -> Iterator[Candidate]:
        values = array("f", self.logprobs).tolist()
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
        for i in order[: len(self)]:
            yield Candidate(i, self.tokens.texts[i], self.tokens.bytes[i], values[i])

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __len__(self) -> int:
        values = array("f", self.logprobs)
        return len(values) - values.count(float("-inf"))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The token at a position, its log-probability and the most likely alternatives, best first.

    `rank` is 1 for the likeliest token.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float
    rank: int = 0
    top: Sequence[Candidate] = ()
