"""Tiny models and tokenizers built from nothing: random weights, no downloads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without merges: one token per byte, ids 0 to 255, then the special tokens.

    <|bos|> 256, <|eos|> 257, <|pad|> 258, <|im_start|> 259, <|im_end|> 260.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        **kwargs,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


_SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "initializer_range": 0.4,
}


class Words(Vocabulary):
    """A vocabulary of a model that has nothing but a tokenizer, which it shows."""

    def __init__(self, tokenizer: Any, **hooks: Any) -> None:
        model = SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace())
        super().__init__(Hooks(ModelInfo(model=model, tokenizer=tokenizer, **hooks)))
        self.tokenizer = tokenizer


def llama(*, seed: int = 0, **kwargs: Any) -> LlamaForCausalLM:
    """A Llama of two layers for `byte_tokenizer`, in float32 on the CPU."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**_SIZES, **kwargs})).eval()


def mistral(*, window: int = 64) -> MistralForCausalLM:
    """The same with a sliding window."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=window)).eval()


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer decoded as Llama 2's and Gemma's are: `▁` for spaces, byte tokens `<0x00>` to `<0xFF>`.

    <unk> 0, <s> 1, </s> 2, the byte tokens from 3, then pieces.
    """
    pieces = ["▁", "a", "b", "c", "e", "h", "l", "o", "é", "▁a", "▁b", "▁hello", "lo", "he", "!", ".", "▁.", "日", "▁▁"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    backend = Tokenizer(
        models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece_tokenizer(*, clean_up: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer decoded as BERT's is: `##` continues a word. `clean_up` removes spaces before punctuation."""
    names = ["[UNK]", "[SEP]", "[PAD]", "do", "n", "##n", "'", "t", "##t", ".", ",", "hello", "wor", "##ld", "s", "we"]
    vocab = {name: i for i, name in enumerate(names)}
    backend = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        eos_token="[SEP]",
        pad_token="[PAD]",
        clean_up_tokenization_spaces=clean_up,
    )


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer decoded as T5's and XLM-R's are: Unigram pieces with `▁`, no byte tokens."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁hello", "▁wor", "ld", "a", "b", "▁a", "é", "日", "!", "▁▁", "s"]
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def suffix_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer decoded as GPT-1's and CLIP's are: `</w>` ends a word."""
    pieces = ["<unk>", "<end>", "a", "b", "a</w>", "b</w>", "ab", "ab</w>", ".</w>", "é</w>"]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", end_of_word_suffix="</w>"
        )
    )
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>")
