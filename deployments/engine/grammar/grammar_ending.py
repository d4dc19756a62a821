"""Completing a constrained text before its token limit.

Some models open strings and lists without closing them (random weights are the extreme case), and a JSON text
cut off at `max_tokens` is not JSON. So the shortest ending of the text is estimated as it grows. If the remaining
tokens would not suffice after the model's choice, the ending is used instead; the choice then finishes as `length`.
"""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np

from deployments.engine.grammar.grammar_tokens import GrammarTokens

_LONGEST = 1024
_PLENTY = 256
# What completes a JSON text soonest, then any other byte, white space last. A place that admits "#" is inside a string.
_LATE = b" \t\n\r"


def _order(first: bytes) -> list[int]:
    return [*first, *(byte for byte in range(256) if byte not in first and byte not in _LATE), *_LATE]


_OUTSIDE, _INSIDE = _order(b'}]",:0'), _order(b'"')


Closers = Sequence[Sequence[int]]


def shortest_ending(
    matcher: llguidance.LLMatcher, tokens: GrammarTokens, known: list[int] | None = None, closers: Closers = ()
) -> list[int] | None:
    """A short list of tokens that completes the text from the matcher's state, found greedily.

    Args:
        known: an ending of the text before its last token; often it still is one, or its last part is.
        closers: tokens that end a bare value of the grammar.

    Returns:
        The tokens, a terminator included if it is needed; None if none were found within a bounded search.
    """
    matcher = matcher.deep_copy()
    path: list[int] = []
    while len(path) < _LONGEST and not matcher.is_stopped():
        if known and _completes(matcher, tokens, known):
            path += known
            return path if len(path) <= _LONGEST else None
        step = _step(matcher, tokens, closers)
        if not step or not matcher.consume_tokens(step):
            return None
        path += step
    found = matcher.is_stopped() and not matcher.is_error() and len(path) <= _LONGEST
    return path if found else None


def _completes(matcher: llguidance.LLMatcher, tokens: GrammarTokens, ending: list[int]) -> bool:
    """Whether the text is complete after these tokens; asking the matcher takes a fortieth of stepping a copy of it."""
    whole = ending if ending[-1] in tokens.eos_ids else [*ending, min(tokens.eos_ids)]
    return matcher.validate_tokens(whole) == len(whole)


def _step(matcher: llguidance.LLMatcher, tokens: GrammarTokens, closers: Closers) -> list[int]:
    """The next tokens towards the end; none if the matcher is stuck."""
    if matcher.is_accepting():
        return [min(tokens.eos_ids)]
    allowed = _allowed(matcher, tokens)
    inside = _is_inside(allowed, tokens)
    for closer in closers:
        after = matcher.deep_copy()
        if after.try_consume_tokens(list(closer)) < len(closer):
            continue
        # Inside a string of JSON the same text would end nothing.
        if not inside or after.is_stopped() or not _is_inside(_allowed(after, tokens), tokens):
            return list(closer)
    forced = matcher.compute_ff_tokens()
    if forced:
        return forced
    for byte in _INSIDE if inside else _OUTSIDE:
        token_id = tokens.single.get(byte)
        if token_id is not None and allowed[token_id]:
            return [token_id]
    found = allowed.nonzero()[0]
    return [int(found[0])] if len(found) else []


def _allowed(matcher: llguidance.LLMatcher, tokens: GrammarTokens) -> np.ndarray:
    """Which tokens may come next."""
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    return np.unpackbits(bits, bitorder="little", count=tokens.width)


def _is_inside(allowed: np.ndarray, tokens: GrammarTokens) -> bool:
    """Whether any text may stand here, as in a string."""
    place = tokens.single.get(ord("#"))
    return place is not None and bool(allowed[place])


class GrammarEnding:
    """Watches the remaining tokens of one sequence.

    An ending is looked for again at every token that makes the known one wrong, once it could be too long for what is
    left; what it may grow by in one token (an object with many required fields) has no bound worth naming.

    Args:
        ending: a way to complete the empty text; None leaves the sequence to itself.
        max_tokens: the budget.
        closers: tokens that end a bare value of the grammar.

    Attributes:
        forced: whether the model's choice was ever replaced.
    """

    def __init__(self, ending: list[int] | None, max_tokens: int, closers: Closers = ()) -> None:
        self.forced = False
        self._closers = closers
        self._ending = list(ending) if ending is not None and len(ending) <= max_tokens else None
        self._left = max_tokens
        self._due = _LONGEST
        self._fresh = True

    def choose(self, matcher: llguidance.LLMatcher, tokens: GrammarTokens, token_id: int) -> int:
        """The token to take: the given one if the text can still be completed after it, else the next of the ending."""
        self._left -= 1
        if self._ending is None:
            return token_id
        if self._left >= self._due:
            self._fresh = False
            return token_id
        if not self._fresh:
            self._ending = shortest_ending(matcher, tokens, None, self._closers)
            self._fresh = self._ending is not None
            if self._ending is None or len(self._ending) > self._left + 1:
                self._postpone()
                return token_id
        known = self._ending
        after = self._after(matcher, tokens, token_id)
        if after is not None and len(after) <= self._left:
            self._ending = after
            return token_id
        if after is None and self._left > _PLENTY:
            self._postpone()
            return token_id
        self.forced, self._ending = True, known[1:]
        return known[0] if known else min(tokens.eos_ids)

    def _after(self, matcher: llguidance.LLMatcher, tokens: GrammarTokens, token_id: int) -> list[int] | None:
        """An ending of the text with one more token."""
        known = self._ending or []
        if known[:1] == [token_id]:
            return known[1:]
        after = matcher.deep_copy()
        if not after.consume_token(token_id):
            return None
        found = shortest_ending(after, tokens, known, self._closers)
        return found or shortest_ending(after, tokens, None, self._closers)

    def _postpone(self) -> None:
        """An ending that was not found may be there: look again later, as long as there is plenty left."""
        if self._left > _PLENTY:
            self._ending, self._fresh, self._due = [], False, self._left * 7 // 8
        else:
            self._ending = None
