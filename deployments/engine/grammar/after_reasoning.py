"""A constraint on an answer that begins after the model's reasoning.

Until then every token is free, and no mask is computed. A model that opens its reasoning itself decides at its first
token: it begins the opening marker, or a constrained answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from deployments.core.calls import ThinkingBudget
from deployments.core.errors import BadRequest
from deployments.core.events import FinishReason
from deployments.core.reasoning import ReasoningMarkers
from deployments.engine.grammar.grammar_tokens import GrammarTokens
from deployments.engine.sampling.state import TokenMask

_NEWLINES = 2
"""Newlines that may stand between the reasoning and the answer: models are trained to write them, readers drop them."""
_CHARACTER = 4
"""Tokens that a character may take: one for each of its bytes."""
_CALL_TOKENS = 2048
"""Tokens beyond its budget that a reasoning may have to end a tool call."""


class AnswerMask(TokenMask, Protocol):
    def accepts(self, token_id: int) -> bool:
        """Whether the token may come next."""


class AnswerGrammar(Protocol):
    """What constrains the answer.

    Attributes:
        free: nothing does.
    """

    ending: list[int] | None
    free: bool

    def answer(self, max_tokens: int, begun: Sequence[int] = ()) -> AnswerMask | None:
        """The constraint on a text of at most `max_tokens` tokens after `begun`; None if it cannot begin so."""


class FreeMask:
    """An answer that nothing constrains; implements `AnswerMask`."""

    ends: FinishReason | None = None

    def mask(self, scores: torch.Tensor) -> None:
        """Every token may come next."""

    def accepts(self, token_id: int) -> bool:
        return True

    def advance(self, token_id: int) -> int:
        return token_id


class _NotEmpty(FreeMask):
    """An answer that nothing constrains, but that the model's turn does not end before it begins."""

    def __init__(self, tokens: GrammarTokens) -> None:
        self._tokens = tokens
        self._begun = False

    def mask(self, scores: torch.Tensor) -> None:
        if not self._begun:
            scores[[each for each in self._tokens.eos_ids if each < len(scores)]] = float("-inf")

    def advance(self, token_id: int) -> int:
        self._begun = self._begun or bool(self._tokens.text_of(token_id).strip())
        return token_id


class AfterReasoning:
    """Implements `TokenMask` of `sampling/state.py`.

    Args:
        grammar: of the answer.
        tokens: the vocabulary.
        markers: how the model marks its reasoning.
        opened: the prompt has opened it.
        max_tokens: the budget of reasoning and answer together.
        budget: how many tokens the reasoning may have, its markers included, and what is written before its forced end;
            None leaves it to the model.
    """

    def __init__(
        self,
        grammar: AnswerGrammar,
        tokens: GrammarTokens,
        markers: ReasoningMarkers,
        *,
        opened: bool,
        max_tokens: int,
        budget: ThinkingBudget | None = None,
    ) -> None:
        self._grammar = grammar
        self._tokens = tokens
        self._opening = markers.first.encode()
        self._closings = [text.encode() for text in markers.last]
        self._end = markers.end.encode()
        # What is left of the end of a reasoning that the model did not end.
        self._owed = b""
        self._forced = False
        self._budget = budget
        # Tokens of the reasoning so far, and how many its forced end takes.
        self._count = 0
        self._cost = 0 if budget is None else self._tokens_of(budget.message.encode() + self._end)
        if budget is not None and budget.message and self._cost > budget.tokens:
            raise BadRequest(
                f"Invalid 'thinking_budget_message': it takes {self._cost} tokens with the end of the reasoning, more "
                f"than thinking_token_budget, {budget.tokens}; shorten it or raise the budget.",
                param="thinking_budget_message",
            )
        self._last = b""
        self._calls = _Calls(() if budget is None else budget.calls)
        self._left = max_tokens
        self._inside = opened
        self._undecided = not opened
        # What may become the opening marker, or the end of the reasoning so far, which may become a closing one.
        self._text = b""
        self._newlines = 0
        self._answer = None if opened else grammar.answer(max_tokens)

    def mask(self, scores: torch.Tensor) -> None:
        if self._inside:
            return
        free = self._free()
        kept = scores[free]
        if self._answer is None:
            scores.fill_(float("-inf"))
        else:
            self._answer.mask(scores)
        scores[free] = kept

    def advance(self, token_id: int) -> int:
        self._left -= 1
        if self._inside:
            self._spend(token_id)
            # With a budget or a constraint an answer follows, also if the model ends its turn without one.
            ends = self._owed or (token_id in self._tokens.eos_ids and not self._is_answered)
            self._calls.add(self._tokens.text_of(token_id))
            return self._reason(self._ending(token_id) if ends else token_id)
        if self._undecided:
            self._count += 1
            return self._begin(token_id)
        assert self._answer is not None
        if self._newlines and token_id in self._free():
            self._newlines -= len(self._tokens.text_of(token_id))
            self._answer = self._grammar.answer(self._left)
            return token_id
        self._newlines = 0
        return self._answer.advance(token_id)

    @property
    def ends(self) -> FinishReason | None:
        return None if self._inside or self._answer is None else self._answer.ends

    def _free(self) -> list[int]:
        """Tokens that may come next beside those that begin or continue the answer."""
        if self._undecided:
            return self._tokens.leading_to(self._opening[len(self._text) :])
        room = self._left - len(self._grammar.ending or ())
        sizes = range(1, self._newlines + 1) if room > 0 else ()
        return [i for size in sizes if (i := self._tokens.exact(b"\n" * size)) is not None]

    def _begin(self, token_id: int) -> int:
        """A token before it is known whether the model reasons."""
        if self._answer is not None and self._answer.accepts(token_id):
            token_id = self._answer.advance(token_id)
        else:
            self._answer = None
        text = self._text + self._tokens.text_of(token_id)
        if text.startswith(self._opening):
            self._undecided, self._inside, self._answer = False, True, None
            return self._reason(token_id)
        self._undecided = self._opening.startswith(text)
        self._text = text
        return token_id

    def _spend(self, token_id: int) -> None:
        """Begin the end of a reasoning that has used its budget, where the text is whole characters."""
        self._count += 1
        text = (self._last + self._tokens.text_of(token_id))[-4:]
        if self._budget is not None and not self._owed:
            # What begins a character must leave room for the rest of it.
            used = self._count + self._cost + (0 if _is_whole(text) else _CHARACTER - 1)
            if used > self._budget.tokens and _is_whole(self._last) and not self._is_calling(token_id):
                begun = self._begun_end()
                if not self._ends_itself(token_id, self._end[begun:]):
                    self._owed = self._end[begun:] if begun else self._budget.message.encode() + self._end
                    return
        self._last = text

    def _begun_end(self) -> int:
        """How many bytes of the end of the reasoning the model has written."""
        sizes = range(min(len(self._text), len(self._end) - 1), 0, -1)
        return next((size for size in sizes if self._text.endswith(self._end[:size])), 0)

    def _ends_itself(self, token_id: int, rest: bytes) -> bool:
        """Whether a token is a part of the model's own end of the reasoning, which fits into the budget."""
        assert self._budget is not None
        text = self._tokens.text_of(token_id)
        left = self._tokens_of(rest[len(text) :])
        return bool(text) and rest.startswith(text) and self._count + left <= self._budget.tokens

    @property
    def _is_answered(self) -> bool:
        """Whether the reasoning ends with a call, which is then the answer."""
        return self._grammar.free and self._calls.state() == "after"

    def _is_calling(self, token_id: int) -> bool:
        """Whether the end of the reasoning would cut a call, or make one that ended a part of the reasoning."""
        assert self._budget is not None
        if self._count > self._budget.tokens + _CALL_TOKENS:
            return False
        if token_id in self._tokens.eos_ids:
            return self._is_answered
        return self._calls.state() is not None and self._calls.state(self._tokens.text_of(token_id)) is not None

    def _tokens_of(self, text: bytes) -> int:
        """How many tokens a text is, each the longest one."""
        count = 0
        while text:
            size = next((size for size in range(len(text), 0, -1) if self._tokens.exact(text[:size]) is not None), 1)
            text, count = text[size:], count + 1
        return count

    def _ending(self, token_id: int) -> int:
        """The next token of the end of the reasoning; the given one if no token begins it."""
        owed = self._owed or self._end
        for size in range(len(owed), 0, -1):
            if (found := self._tokens.exact(owed[:size])) is not None:
                self._owed, self._forced = owed[size:], True
                return found
        return token_id

    def _reason(self, token_id: int) -> int:
        """A token of the reasoning, or its beginning if it goes on to an answer that the grammar does not allow."""
        known = self._text
        text, closings = known + self._tokens.text_of(token_id), list(self._closings)
        end = 0
        while closings and (place := text.find(closings[0], end)) >= 0:
            end = place + len(closings.pop(0))
        if closings:
            self._closings = closings
            tail = text[end:]
            self._text = tail[max(0, len(tail) - len(closings[0]) + 1) :]
            return token_id
        if self._close(text[end:].lstrip(b"\n")):
            return token_id
        return self._cut(text[len(known) : end], known)

    def _close(self, rest: bytes) -> bool:
        """Begin the answer with what the last token of the reasoning has of it; whether it can begin so."""
        if self._grammar.free:
            self._inside = False
            self._answer = _NotEmpty(self._tokens) if self._forced else self._grammar.answer(self._left)
            return True
        begun = [token_id for byte in rest if (token_id := self._tokens.exact(bytes([byte]))) is not None]
        answer = self._grammar.answer(self._left, begun) if len(begun) == len(rest) else None
        if answer is None:
            return False
        self._inside, self._answer, self._newlines = False, answer, 0 if rest else _NEWLINES
        return True

    def _cut(self, wanted: bytes, known: bytes) -> int:
        """A token that begins these bytes, the last of which closes the reasoning."""
        for size in range(len(wanted), 0, -1):
            token_id = self._tokens.exact(wanted[:size])
            if token_id is not None:
                self._text = known + wanted[:size]
                if size == len(wanted):
                    self._close(b"")
                return token_id
        raise BadRequest("No token of this model ends its reasoning at the beginning of a constrained answer.")


class _Calls:
    """Follows the tool calls of a text.

    Args:
        markers: what stands around a call; nothing after it if the end of the text ends it.
    """

    def __init__(self, markers: Sequence[tuple[str, str]]) -> None:
        self._markers = [(begin.encode(), end.encode()) for begin, end in markers]
        self._text = b""

    def add(self, text: bytes) -> None:
        if self._markers:
            self._text += text

    def state(self, more: bytes = b"") -> Literal["within", "after"] | None:
        """Whether the text, and `more`, ends within a call, or after one: white space or a part of a marker follows."""
        text = self._text + more
        for begin, end in self._markers:
            if (place := text.rfind(begin)) < 0:
                continue
            rest = text[place + len(begin) :]
            if not end or end not in rest:
                return "within" if end else "after"
            return "after" if begin.startswith(rest.rpartition(end)[2].strip()) else None
        return None


def _is_whole(data: bytes) -> bool:
    """Whether bytes end with a whole character of UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        # The beginning may be cut off; an end that is has too few bytes.
        return error.reason != "unexpected end of data"
    return True
