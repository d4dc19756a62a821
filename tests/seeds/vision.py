"""Tiny Fuyu and PaliGemma checkpoints with random weights, as folders that `from_pretrained` reads."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)
from transformers.models.fuyu.image_processing_pil_fuyu import FuyuImageProcessorPil

from tests.tiny import byte_tokenizer

ASCII = [chr(code) for code in range(32, 127)] + ["\n"]


def picture(color: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture of one color with a black corner."""
    image = Image.new("RGB", size, color)
    image.paste("black", (0, 0, size[0] // 3, size[1] // 3))
    return image


def data_uri(image: Image.Image, kind: str = "PNG") -> str:
    """An image as the data: URI that clients send."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def save_fuyu(folder: Path) -> Path:
    """A Fuyu of two layers; its tokenizer has one token per ASCII character and Fuyu's underscore before the text."""
    names = ["|ENDOFTEXT|", "<s>", "<0x04>", "|SPEAKER|", "|NEWLINE|", "▁", *ASCII]
    vocab = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocab=vocab, unk_token="|ENDOFTEXT|"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces = Regex(r"<0x04>|\|SPEAKER\||\|NEWLINE\||[\s\S]")
    backend.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:2]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="|ENDOFTEXT|", pad_token="|ENDOFTEXT|"
    )
    images = FuyuImageProcessorPil(size={"height": 30, "width": 40}, patch_size={"height": 10, "width": 10})
    FuyuProcessor(images, tokenizer).save_pretrained(folder)
    text = {
        "model_type": "persimmon",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = FuyuConfig(text_config=text, patch_size=10, image_token_id=3, initializer_range=0.3)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 0, 0
    torch.manual_seed(0)
    FuyuForCausalLM(config).save_pretrained(folder)
    return folder


def save_paligemma(folder: Path) -> Path:
    """A PaliGemma of two layers; byte tokens, four positions per image, no chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    images = SiglipImageProcessor(size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = PaliGemmaProcessor(images, tokenizer)
    processor.save_pretrained(folder)
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    }
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "image_size": 16, "patch_size": 8, **size},
        text_config={
            "model_type": "gemma",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 1,
            "head_dim": 8,
            "max_position_embeddings": 256,
            **size,
        },
        image_token_index=processor.image_token_id,
        projection_dim=32,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    torch.manual_seed(0)
    PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
    return folder
