"""Tiny models and tokenizers built from nothing: random weights, no downloads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


def mistral(**kwargs: Any) -> Any:
    """The same with a sliding window."""
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**{**_SIZES, "sliding_window": 64, **kwargs})
    ).eval()


_SPECIAL = {"vocab_size": 261, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}


def gpt2(**kwargs: Any) -> Any:
    """Learned positions, and linears of the kind that GPT-2 alone has."""
    torch.manual_seed(1)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256, "initializer_range": 0.4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**_SPECIAL, **sizes, **kwargs})).eval()


def mamba() -> Any:
    """States in the place of keys and values."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "initializer_range": 0.4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**_SPECIAL, **sizes)).eval()


def t5(*, seed: int = 0, **kwargs: Any) -> Any:
    """An encoder-decoder with relative positions."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 258}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**{**_SPECIAL, **sizes, **kwargs})).eval()


def bart() -> Any:
    """An encoder-decoder with learned positions, and a forced first token."""
    torch.manual_seed(4)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    more = {"d_model": 32, "max_position_embeddings": 256, "decoder_start_token_id": 257, "init_std": 0.8}
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**_SPECIAL, **sizes, **more)).eval()
    # A forced first token belongs to the format; a last one is not forced, since it would follow from max_tokens.
    model.generation_config.update(forced_bos_token_id=7, forced_eos_token_id=None)
    return model


_BART = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}


def bert(**kwargs: Any) -> Any:
    """An encoder that gives states and no text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    more = {"max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "vocab_size": 57}
    return transformers.BertModel(transformers.BertConfig(**{**sizes, **more, **kwargs})).eval()


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
