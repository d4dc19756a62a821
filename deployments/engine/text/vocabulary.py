"""What an engine knows of a model's tokens: their text and bytes, the terminators, how to decode them."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from typing import Any, Literal

import torch

from deployments.core.calls import SamplingParams
from deployments.core.errors import TroupeError
from deployments.core.logprobs import Candidate, TokenLogprob, TokenTexts, WholeVocabulary
from deployments.engine.base.text_side import TextSide
from deployments.engine.sampling.bad_words import BadWords, WordIndex
from deployments.engine.sampling.format_rules import FormatRules
from deployments.engine.sampling.logprobs import TokenScore
from deployments.engine.sampling.state import SequenceSampler, TokenMask
from deployments.engine.text.detokenizer import ByteLevelDetokenizer, Detokenizer, WholeDetokenizer, WindowDetokenizer
from deployments.engine.text.stop_tokens import special_tokens, terminator_ids

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_Strategy = Literal["bytes", "window", "whole"]
# Tokens of the prompt that are decoded again with the text, if the whole of it has to be: clean-up looks back at few.
_CONTEXT = 16


class Vocabulary:
    """The tokens of one loaded model.

    Attributes:
        text_side: the model's encoder and decoder.
        eos_ids: its terminators.
        special_ids: ids left out of the text when special tokens are skipped.
        special_contents: the text of every special token, and its id.
        strategy: how token ids become text, see `detokenizer`.
    """

    def __init__(self, text_side: TextSide) -> None:
        self.text_side, info = text_side, text_side.info
        self.eos_ids = terminator_ids(text_side)
        self.special_contents = special_tokens(info.tokenizer)
        self.special_ids = frozenset(self.special_contents.values())
        self._info = info
        self._backend: Any = getattr(info.tokenizer, "backend_tokenizer", None)
        self._texts: dict[int, tuple[str, bytes]] = {}
        self._words: WordIndex | None = None
        self._tokens: TokenTexts | None = None
        self._rules: dict[int, FormatRules] = {}
        self._lock = threading.Lock()
        self.strategy: _Strategy = self._choose_strategy()

    def __len__(self) -> int:
        """The number of tokens of the tokenizer, or 0 without one; the logits may be wider."""
        try:
            return len(self._info.tokenizer)
        except TypeError:
            return 0

    def sampler(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        device: torch.device,
        mask: TokenMask | None = None,
        processors: Sequence[Any] = (),
    ) -> SequenceSampler:
        """The sampling state of a new sequence of this model; the request's `processors` come before the loader's."""
        return SequenceSampler(
            params,
            prompt_ids,
            eos_ids=self.eos_ids,
            vocab_size=vocab_size,
            device=device,
            rules=self.format_rules(vocab_size),
            processors=(*processors, *self._info.logits_processors),
            mask=mask,
            bad_words=self._bad_words(params, vocab_size),
        )

    def lacks_tables(self, params: SamplingParams) -> bool:
        """Whether a request needs something of every token that no request has needed before; see `build_tables`."""
        return (any(params.bad_words) and self._words is None) or (params.reports_vocabulary and self._tokens is None)

    def build_tables(self, params: SamplingParams, width: int) -> None:
        """Look up the text of every token, which takes seconds for some tokenizers, if a request needs it.

        Args:
            width: of the logits.
        """
        if any(params.bad_words):
            self._word_index(width)
        if params.reports_vocabulary:
            self._every(width)

    def detokenizer(
        self, *, skip_special_tokens: bool = True, markers: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> Detokenizer:
        """The incremental decoder of a new choice.

        Args:
            skip_special_tokens: leave special tokens out of the text.
            markers: texts whose special tokens stay in it all the same.
            prompt: the token ids that the text goes on from. A loader's own decode hook gets new tokens only.
        """
        return self._detokenizer(self.strategy, self.hidden(skip_special_tokens, markers), prompt)

    def hidden(self, skip_special_tokens: bool, markers: Sequence[str] = ()) -> frozenset[int]:
        """The token ids that are left out of a text; see `detokenizer`."""
        if not skip_special_tokens:
            return frozenset()
        if not markers:
            return self.special_ids
        # A special token may be a part of a marker, or a marker and the white space around it.
        kept = {
            i
            for text, i in self.special_contents.items()
            if text and any(text in each or each in text for each in markers)
        }
        return self.special_ids - kept

    def token_text(self, token_id: int) -> str:
        """The text of a token in the middle of a text, special tokens included."""
        return self._text_and_bytes(token_id)[0]

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of a token in the middle of a text, also where they are part of a UTF-8 character."""
        return self._text_and_bytes(token_id)[1]

    def scored(self, token_id: int, score: TokenScore) -> TokenLogprob:
        """A token and its alternatives with their texts."""
        text, data = self._text_and_bytes(token_id)
        if score.every is not None:
            whole = WholeVocabulary(self._every(len(score.every) // 4), score.every)
            return TokenLogprob(token_id, text, data, score.logprob, score.rank, whole)
        top = tuple(
            Candidate(i, *self._text_and_bytes(i), logprob)
            for i, logprob in zip(score.top_ids, score.top_logprobs, strict=True)
        )
        return TokenLogprob(token_id, text, data, score.logprob, score.rank, top)

    def _every(self, width: int) -> TokenTexts:
        """The texts of all ids of the logits."""
        if self._tokens is None:
            texts, data = zip(*map(self._text_and_bytes, range(width)), strict=True)
            self._tokens = TokenTexts(texts, data)
        return self._tokens

    def _bad_words(self, params: SamplingParams, vocab_size: int) -> BadWords | None:
        if not any(params.bad_words):
            return None
        hidden = self.hidden(params.skip_special_tokens, params.markers)
        index = self._word_index(vocab_size)
        return BadWords(index, lambda i: b"" if i in hidden else self.token_bytes(i), params.bad_words)

    def _word_index(self, width: int) -> WordIndex:
        with self._lock:
            if self._words is None:
                self._words = WordIndex(self._visible_bytes, width)
            return self._words

    def _visible_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else self.token_bytes(token_id)

    def format_rules(self, width: int) -> FormatRules:
        """What the model's format bans or forces, for logits of some width."""
        if width not in self._rules:
            config = getattr(self._info.model, "generation_config", None)
            self._rules[width] = FormatRules.from_config(config, self.eos_ids, width)
        return self._rules[width]

    def _text_and_bytes(self, token_id: int) -> tuple[str, bytes]:
        known = self._texts.get(token_id)
        if known is None:
            known = self._texts[token_id] = self._look_up(token_id)
        return known

    def _look_up(self, token_id: int) -> tuple[str, bytes]:
        token = self._token(token_id)
        if token is not None and self.strategy == "bytes":
            data = _byte_level(token)
            return data.decode("utf-8", "replace"), data
        if token is not None and (byte := _BYTE_TOKEN.fullmatch(token)):
            data = bytes.fromhex(byte[1])
            return data.decode("utf-8", "replace"), data
        if token is not None and token_id in self.special_ids:
            return token, token.encode()
        text = self._added_text(token_id)
        return text, text.encode()

    def _added_text(self, token_id: int) -> str:
        """What a token adds after another one: its own decoding, with the space that decoders strip from the first."""
        try:
            alone = self.text_side.decode([token_id], skip_special_tokens=False)
            twice = self.text_side.decode([token_id, token_id], skip_special_tokens=False)
        except TroupeError:
            return ""
        return twice[len(alone) :] if twice.startswith(alone) and len(twice) > len(alone) else alone

    def _token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it."""
        if self._backend is not None:
            token = self._backend.id_to_token(token_id)
        else:
            convert = getattr(self._info.tokenizer, "convert_ids_to_tokens", None)
            try:
                token = convert(token_id) if convert is not None else None
            except (IndexError, KeyError, ValueError, OverflowError):
                token = None
        return token if isinstance(token, str) else None

    def _is_byte(self, token_id: int) -> bool:
        token = self._token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _choose_strategy(self) -> _Strategy:
        """The cheapest strategy whose pieces, joined, are what the tokenizer makes of the whole."""
        if self._backend is None or self._info.decode is not None:
            return "whole"
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        first: _Strategy = "bytes" if decoder.get("type") == "ByteLevel" else "window"
        return first if self._agrees(first) else "whole"

    def _agrees(self, strategy: _Strategy) -> bool:
        chance = random.Random(0)
        size = max(1, len(self))
        for length in (1, 2, 3, 40, 80):
            for skip in (True, False):
                ids = [chance.randrange(size) for _ in range(length)]
                pieces = self._detokenizer(strategy, self.hidden(skip))
                text = "".join(pieces.push(i) for i in ids) + pieces.finish()
                try:
                    if text != self.text_side.decode(ids, skip_special_tokens=skip):
                        return False
                except TroupeError:
                    return False
        return True

    def _detokenizer(self, strategy: _Strategy, hidden: frozenset[int], prompt: Sequence[int] = ()) -> Detokenizer:
        if strategy == "bytes":
            last = self._last_shown(prompt, hidden, 4)
            return ByteLevelDetokenizer(
                lambda i: b"" if i in hidden else self._shown_bytes(i), b"".join(map(self._shown_bytes, last))
            )
        if strategy == "window":
            return WindowDetokenizer(
                lambda ids: self._backend.decode(ids, skip_special_tokens=False) if ids else "",
                lambda i: i not in hidden and self._token(i) is not None,
                self._is_byte,
                self._last_shown(prompt, hidden, 1),
            )
        last = [] if self._info.decode is not None else self._last_shown(prompt, hidden, _CONTEXT)
        return WholeDetokenizer(lambda ids: self._decode_without(hidden, ids), self._is_byte, prompt=last)

    def _decode_without(self, hidden: frozenset[int], token_ids: Sequence[int]) -> str:
        """The decoding of all ids but the hidden ones."""
        if not hidden or hidden == self.special_ids:
            return self.text_side.decode(token_ids, skip_special_tokens=bool(hidden))
        shown = [i for i in token_ids if i not in hidden]
        return self.text_side.decode(shown, skip_special_tokens=False) if shown else ""

    def _last_shown(self, prompt: Sequence[int], hidden: frozenset[int], count: int) -> list[int]:
        """The last tokens of a prompt that have text: at least `count`, and no part of a run of byte tokens alone."""
        last: list[int] = []
        for token_id in reversed(prompt):
            if token_id in hidden or (self._backend is not None and self._token(token_id) is None):
                continue
            if len(last) >= count and not self._is_byte(last[-1]):
                break
            last.append(token_id)
        return last[::-1]

    def _shown_bytes(self, token_id: int) -> bytes:
        token = self._token(token_id)
        return b"" if token is None else _byte_level(token)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: themselves where printable, else U+0100 and up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins.update({chr(0x100 + i): byte for i, byte in enumerate(others)})
    return stand_ins


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """The bytes a byte-level token stands for; added tokens with other characters stand for themselves."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()
