"""The tokens of a vocabulary, as grammars see them."""

from __future__ import annotations

import llguidance

from deployments.engine.text.vocabulary import Vocabulary


class GrammarTokens:
    """A vocabulary as llguidance sees it: the bytes of every token id, and which of them end the text.

    Args:
        vocabulary: of the model.
        width: of the logits. Ids beyond the tokenizer's have no bytes and are never allowed.
    """

    def __init__(self, vocabulary: Vocabulary, width: int) -> None:
        # Bytes that begin with 0xFF are not text: llguidance never allows them inside a string.
        self._texts = [vocabulary.token_bytes(i) for i in range(width)]
        self._ids: dict[bytes, int] | None = None
        self._leading: dict[bytes, list[int]] = {}
        texts = [b"\xff" + text if i in vocabulary.special_ids else text for i, text in enumerate(self._texts)]
        eos = sorted(i for i in vocabulary.eos_ids if i < width)
        if not eos:
            # A model without terminators still needs a name for the end of the text; no logit belongs to it.
            eos, texts = [width], [*texts, b"\xff<end>"]
        for i in eos:
            texts[i] = texts[i] if texts[i].startswith(b"\xff") else b"\xff" + texts[i]
        self.width = len(texts)
        self.eos = eos[0]
        self.eos_ids = frozenset(eos)
        self.single = {text[0]: i for i, text in reversed(list(enumerate(texts))) if len(text) == 1}
        self.tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Tokens(texts, self.eos, self.single)), n_vocab=self.width, eos_token=eos
        )

    def text_of(self, token_id: int) -> bytes:
        """The bytes of a token, special or not."""
        return self._texts[token_id] if token_id < len(self._texts) else b""

    def exact(self, text: bytes) -> int | None:
        """The first token with these bytes."""
        if self._ids is None:
            self._ids = {text: i for i, text in reversed(list(enumerate(self._texts)))}
        return self._ids.get(text)

    def leading_to(self, text: bytes) -> list[int]:
        """The tokens that begin a text, or begin with it."""
        if text not in self._leading:
            self._leading[text] = [
                i for i, each in enumerate(self._texts) if each and (text.startswith(each) or each.startswith(text))
            ]
        return self._leading[text]


class _Tokens:
    """What llguidance asks of a tokenizer. Encoding only serves its hints, so bytes are looked up one by one."""

    def __init__(self, tokens: list[bytes], eos: int, single: dict[int, int]) -> None:
        self.tokens = tokens
        self.eos_token_id = eos
        self.bos_token_id = None
        self.special_token_ids = [i for i, text in enumerate(tokens) if text.startswith(b"\xff")]
        self._single = single

    def __call__(self, text: bytes | str) -> list[int]:
        data = text if isinstance(text, bytes) else text.encode()
        return [self._single[byte] for byte in data if byte in self._single]
