"""Log-probabilities in the two shapes of OpenAI's API: a list of objects in chats, parallel lists in completions."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any

from typing_extensions import TypedDict

from deployments.core.logprobs import Candidate, TokenLogprob

# OpenAI's value for "too unlikely to say"; JSON has no infinity.
UNLIKELY = -9999.0
NO_TOKEN = Candidate(token_id=-1, token="", bytes=b"", logprob=0.0)


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def chat_logprobs(tokens: Iterable[TokenLogprob], *, as_ids: bool = False) -> ChatLogprobs:
    """The chat shape.

    Args:
        as_ids: write every token as `token_id:N` (the field `return_tokens_as_token_ids`).
    """
    return {"content": [_chat_token(token, as_ids) for token in tokens], "refusal": None}


def _chat_token(token: TokenLogprob, as_ids: bool) -> ChatTokenLogprob:
    top = [_top(candidate, as_ids) for candidate in token.top]
    return {**_top(token, as_ids), "top_logprobs": top}


def _top(token: TokenLogprob | Candidate, as_ids: bool) -> TopLogprob:
    return {"token": _name(token, as_ids), "logprob": finite(token.logprob), "bytes": list(token.bytes)}


class TextOffsets:
    """Where tokens begin in their text, in characters; one that goes on with a character begins where that does."""

    def __init__(self) -> None:
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: Candidate | TokenLogprob) -> int:
        """Where the next token begins."""
        if token.bytes and token.bytes[0] & 0xC0 != 0x80:
            # No continuation byte: a character that has begun is never finished.
            self._offset += len(self._decoder.decode(b"", final=True))
        offset = self._offset
        self._offset += len(self._decoder.decode(token.bytes))
        return offset


def completion_logprobs(
    tokens: Iterable[TokenLogprob | None],
    *,
    offsets: TextOffsets | None = None,
    as_ids: bool = False,
    first: Candidate | None = None,
) -> CompletionLogprobs:
    """The completions shape. A None among `tokens` is the first token of a prompt, which nothing predicts.

    Args:
        offsets: of the tokens of the choice so far; these are added.
        as_ids: write every token as `token_id:N`.
        first: the token that is None.
    """
    shape: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    offsets = offsets or TextOffsets()
    for token in tokens:
        here = token or first or NO_TOKEN
        shape["tokens"].append(_name(here, as_ids))
        shape["token_logprobs"].append(None if token is None else finite(token.logprob))
        shape["top_logprobs"].append(None if token is None else _by_name(token, as_ids))
        shape["text_offset"].append(offsets.next(here))
    return shape


def _by_name(token: TokenLogprob, as_ids: bool) -> dict[str, float]:
    """Alternatives and the token itself. Where two ids have the same text, the likelier one has the name."""
    named: dict[str, float] = {}
    candidates: list[TokenLogprob | Candidate] = [*token.top]
    if all(candidate.token_id != token.token_id for candidate in candidates):
        candidates.append(token)
    for candidate in sorted(candidates, key=lambda each: -each.logprob):
        name = _name(candidate, as_ids)
        if name in named:
            name = f"token_id:{candidate.token_id}"
        named[name] = finite(candidate.logprob)
    return named


def _name(token: TokenLogprob | Candidate, as_ids: bool) -> str:
    return f"token_id:{token.token_id}" if as_ids else token.token


def finite(logprob: float) -> float:
    return max(logprob, UNLIKELY) if logprob == logprob else UNLIKELY


def prompt_logprobs(scores: Iterable[TokenLogprob | None]) -> list[dict[str, Any] | None]:
    """vLLM's shape of a prompt's log-probabilities: token id to its entry, the prompt's own token first."""
    return [None if token is None else _prompt_entry(token) for token in scores]


def _prompt_entry(token: TokenLogprob) -> dict[str, Any]:
    entry = {str(token.token_id): _ranked(token, token.rank or None)}
    for rank, candidate in enumerate(token.top, start=1):
        entry.setdefault(str(candidate.token_id), _ranked(candidate, rank))
    return entry


def _ranked(token: TokenLogprob | Candidate, rank: int | None) -> dict[str, Any]:
    return {"logprob": finite(token.logprob), "rank": rank, "decoded_token": token.token}
