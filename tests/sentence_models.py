"""Tiny sentence-transformers folders, written as that library writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tests.tiny import bert

SIZE = 32


def tokenizer() -> PreTrainedTokenizerFast:
    """BERT's kind: [CLS] text [SEP], one token a letter, token types."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + each for each in letters), ":"]
    backend = Tokenizer(models.WordPiece(vocab={name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def dense(size: int, out: int) -> dict[str, torch.Tensor]:
    """The weights of a Dense module, the same for the same sizes."""
    generator = torch.Generator().manual_seed(size)
    return {
        "linear.weight": torch.randn((out, size), generator=generator) / size**0.5,
        "linear.bias": torch.randn((out,), generator=generator),
    }


def write(
    folder: Path,
    *modules: tuple[str, dict[str, Any]],
    prompts: dict[str, Any] | None = None,
    transformer: dict[str, Any] | None = None,
) -> str:
    """A folder of the model above.

    Args:
        modules: what comes after the transformer, each by its type and its config. A Dense gets weights.
        prompts: config_sentence_transformers.json.
        transformer: sentence_bert_config.json.
    """
    bert().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for i, (kind, config) in enumerate(modules, 1):
        path = f"{i}_{kind}"
        listed.append({"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"})
        (folder / path).mkdir()
        (folder / path / "config.json").write_text(json.dumps(config))
        if kind == "Dense":
            save_file(dense(config["in_features"], config["out_features"]), folder / path / "model.safetensors")
        if kind == "LayerNorm":
            weights = {
                "norm.weight": torch.full((config["dimension"],), 2.0),
                "norm.bias": torch.ones(config["dimension"]),
            }
            torch.save(weights, folder / path / "pytorch_model.bin")
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts or {}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(transformer or {}))
    return str(folder)


def pooling(*modes: str, **more: Any) -> tuple[str, dict[str, Any]]:
    return "Pooling", {"embedding_dimension": SIZE, "pooling_mode": list(modes), **more}


def old_pooling(*modes: str) -> tuple[str, dict[str, Any]]:
    """As versions before 5.2 wrote it."""
    known = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    flags = {f"pooling_mode_{name}": name in modes for name in known}
    return "Pooling", {"word_embedding_dimension": SIZE, **flags, "include_prompt": True}
