"""From token ids to text, one token at a time: what `push` and `finish` return, joined, is the text of the whole.

The text of a completion depends on its prompt: sentencepiece decoders strip the space of a text's first token. Given
the prompt's last tokens, the pieces joined are what the new tokens add to the decoded prompt.

There are three classes. `Vocabulary` selects one and checks it against the tokenizer at load:

ByteLevelDetokenizer   byte-level BPE (GPT-2, Llama 3, Qwen …): each token is bytes, joined by a UTF-8 decoder
WindowDetokenizer      other fast tokenizers: a token's text depends on the one before it, so two are decoded
WholeDetokenizer       anything else, also a loader's decode hook: everything is decoded again, at growing intervals

Each one holds back text that a later token could still change.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

Decode = Callable[[Sequence[int]], str]
_SHARE = 64
"""Where all is decoded again, it is so whenever it has grown by 1 / 64."""


class Detokenizer(Protocol):
    """The text of one choice."""

    def push(self, token_id: int) -> str:
        """The text that later tokens cannot change any more."""

    def finish(self) -> str:
        """The text still held back."""


class ByteLevelDetokenizer:
    """Joins tokens that are byte strings. An unfinished UTF-8 character is held back.

    Args:
        token_bytes: the bytes of a token; empty for one that is not shown.
        prompt: the last bytes of the prompt; a character that begins there may end in the text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], prompt: bytes = b"") -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        unfinished = _unfinished(prompt)
        known = self._decoder.decode(unfinished)
        # The prompt's own text ends with this; it is not given out again if the character is never finished.
        self._owed = unfinished.decode("utf-8", "replace")[len(known) :]

    def push(self, token_id: int) -> str:
        text = self._decoder.decode(self._token_bytes(token_id))
        return self._without_owed(text) if self._owed else text

    def finish(self) -> str:
        text = self._decoder.decode(b"", final=True)
        return self._without_owed(text) if self._owed else text

    def _without_owed(self, text: str) -> str:
        if not text:
            return ""
        owed, self._owed = self._owed, ""
        return text.removeprefix(owed)


class WindowDetokenizer:
    """Decodes each token together with the last one before it, and takes what it adds.

    Byte tokens (`<0xE2>`) are held back until the run of them ends: the tokenizer decodes a run as a whole, and one
    bad byte turns all of it into U+FFFD.

    Args:
        decode: of a short sequence of ids.
        shown: whether a token has text; special tokens that are skipped and unknown ids have none.
        is_byte: whether a token is a single byte.
        prompt: the last shown tokens of the prompt: one, or all of the run of byte tokens at its end.
    """

    def __init__(
        self, decode: Decode, shown: Callable[[int], bool], is_byte: Callable[[int], bool], prompt: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._shown = shown
        self._is_byte = is_byte
        self._before = list(prompt)
        self._new: list[int] = []
        # The text's first bytes may change what the prompt's last ones mean.
        self._after_bytes = bool(prompt) and is_byte(prompt[-1])

    def push(self, token_id: int) -> str:
        if not self._shown(token_id):
            return ""
        self._new.append(token_id)
        if self._is_byte(token_id):
            return ""
        known, text = self._decode(self._before), self._decode(self._before + self._new)
        if self._after_bytes:
            known = _common(known, text)
        if text.endswith("�") or not text.startswith(known):
            return ""
        self._before, self._new, self._after_bytes = [token_id], [], False
        return text[len(known) :]

    def finish(self) -> str:
        known, text = self._decode(self._before), self._decode(self._before + self._new)
        if self._after_bytes:
            known = _common(known, text)
        self._before, self._new, self._after_bytes = self._new[-1:], [], False
        return text[len(known) :]


class WholeDetokenizer:
    """Decodes all ids again, at intervals that grow with the text so that the cost per token stays bounded.

    Text is given out where two decodings in a row agree, without a trailing U+FFFD or a space that a clean-up of
    English punctuation could still take away.

    Args:
        decode: of the whole sequence of ids.
        is_byte: whether a token is a single byte; runs of them are held back.
        prompt: the last tokens of the prompt.
    """

    def __init__(self, decode: Decode, is_byte: Callable[[int], bool], prompt: Sequence[int] = ()) -> None:
        self._decode = _added(decode, list(prompt)) if prompt else decode
        self._is_byte = is_byte
        self._ids: list[int] = []
        self._due = 1
        self._last = ""
        self._given = 0

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        if len(self._ids) < self._due or self._is_byte(token_id):
            return ""
        self._due = len(self._ids) + max(1, len(self._ids) // _SHARE)
        text = self._decode(self._ids)
        certain = _without_doubtful_end(_common(self._last, text))
        self._last = text
        given = certain[self._given :]
        self._given += len(given)
        return given

    def finish(self) -> str:
        text = self._decode(self._ids) if self._ids else ""
        given = text[self._given :]
        self._given += len(given)
        return given


def _added(decode: Decode, prompt: list[int]) -> Decode:
    """Decodes what tokens add to a prompt; by themselves if the prompt's own text changes with them."""
    known = decode(prompt)

    def added(ids: Sequence[int]) -> str:
        text = decode([*prompt, *ids])
        if text.startswith(known):
            return text[len(known) :]
        return text[len(_common(known, text)) :] if known.endswith("�") else decode(ids)

    return added


def _unfinished(data: bytes) -> bytes:
    """The character that begins in the last bytes of a UTF-8 text and does not end there."""
    for size in range(1, min(3, len(data)) + 1):
        lead = data[-size]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return data[-size:] if length > size else b""
    return b""


def _common(first: str, second: str) -> str:
    """The longest common beginning."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return first[:length]
    return first[: next(i for i in range(length) if first[i] != second[i])]


def _without_doubtful_end(text: str) -> str:
    text = text.rstrip("�")
    # clean_up_tokenization drops the space of " n't" and the like: four characters at most are in doubt.
    space = text.find(" ", max(0, len(text) - 4))
    return text if space < 0 else text[:space]
