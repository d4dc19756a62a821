"""Loaders of models that say what the prompt tells them to, token by token, through the real engines.

A prompt holds `<|say|>TEXT<|said|>`; the answer is TEXT, then the end of a turn. The tokens are made likely by a logits
processor, so a grammar or a ban may still have its way. Without such a text the model is a random one.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer, llama

SPECIALS = ("<|say|>", "<|said|>")
CHANNELS_OPENED = "<|end|><|start|>assistant"
"""The end of a prompt in a format of channels."""
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if think is defined %}"
    "{% if think %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}{% endif %}"
)


def say(text: str) -> str:
    return f"do {SPECIALS[0]}{text}{SPECIALS[1]}"


class Says(LogitsProcessor):  # type: ignore[misc]
    """Makes the tokens between the last <|say|> and <|said|> likely, then <|im_end|>."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        def ids(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        self._say, self._said = (tokenizer.convert_tokens_to_ids(each) for each in SPECIALS)
        self._end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        opened = "<|im_end|>\n<|im_start|>assistant\n"
        tails = [opened + tail for tail in ("<think>\n\n</think>\n\n", "<think>\n", "")]
        self._tails = [ids(tail) for tail in (*tails, CHANNELS_OPENED)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ids = input_ids[0].tolist()
        if self._said not in ids:
            return scores
        last = len(ids) - 1 - ids[::-1].index(self._said)
        first = last - 1 - ids[:last][::-1].index(self._say)
        script = [*ids[first + 1 : last], self._end]
        after = ids[last + 1 :]
        begin = next((len(tail) for tail in self._tails if after[: len(tail)] == tail), 0)
        count = len(after) - begin
        scores = torch.full_like(scores, -20.0)
        scores[0, script[count] if count < len(script) else self._end] = 20.0
        return scores


def load_model(
    kind: str = "bytes", special: Sequence[str] = (), plain: Sequence[str] = (), template: str = TEMPLATE
) -> dict[str, Any]:
    """A tiny Llama with one token a byte, or with a vocabulary like Llama 2's (`sentencepiece`).

    Args:
        special, plain: tokens to add, special ones and others.
    """
    torch.set_num_threads(1)
    tokenizer = byte_tokenizer() if kind == "bytes" else sentencepiece()
    for names, is_special in ((SPECIALS, True), (special, True), (plain, False)):
        added = [AddedToken(name, special=is_special, normalized=False) for name in names]
        tokenizer.add_tokens(added, special_tokens=is_special)
    model = llama(vocab_size=len(tokenizer), max_position_embeddings=4096)
    return {
        "model": model,
        "tokenizer": tokenizer,
        "chat_template": template,
        "logits_processors": (Says(tokenizer),),
    }


def described() -> dict[str, Any]:
    """A model whose tokenizer describes its answers."""
    loaded = load_model()
    loaded["tokenizer"].response_template = {
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "content": {},
            "thinking": {"open_pattern": r"<think>\n?", "close_pattern": r"\s*</think>\s*", "content": "text"},
            "tool_calls": {"open": "<call>", "close": "</call>", "content": "json", "repeats": True},
        },
    }
    return loaded


def sentencepiece() -> PreTrainedTokenizerFast:
    """Pieces with `▁`, byte tokens for the rest, and a decoder that strips a text's first space."""
    words = ["▁", "▁▁", "▁▁▁▁", "▁return", "▁Paris", "▁the", "▁is", "ing", "ris", "▁x", "▁.", "▁["]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = [(name, 0.0) for name in names]
    pieces += [(word, -2.0 / len(word)) for word in words]
    pieces += [(letter, -9.0) for letter in string.ascii_letters + string.digits + string.punctuation]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    ends = [AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(ends, special_tokens=True)
    return tokenizer
