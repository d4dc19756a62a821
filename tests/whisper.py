"""A tiny Whisper checkpoint with random weights, and recordings for it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

RATE = 16_000
LANGUAGES = ("en", "zh", "de", "ms")
_MARKS = ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")
_POSITIONS = 1500

Samples = npt.NDArray[np.float32]


def tokenizer(languages: tuple[str, ...] = LANGUAGES) -> WhisperTokenizer:
    """One token per byte, then Whisper's special ones and times, in Whisper's order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = WhisperTokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    names = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{name}|>" for name in (*languages, *_MARKS))]
    found.add_special_tokens(
        {"extra_special_tokens": [AddedToken(n, special=True, normalized=False) for n in names[1:]]}
    )
    times = [AddedToken(f"<|{i * 0.02:.2f}|>", special=False, normalized=False) for i in range(_POSITIONS + 1)]
    found.add_tokens(times)
    return found


def model(words: WhisperTokenizer, *, seed: int = 0, multilingual: bool = True) -> WhisperForConditionalGeneration:
    """A Whisper of two layers with windows of 30 s, in float32 on the CPU."""
    ids = {name: words.convert_tokens_to_ids(f"<|{name}|>") for name in ("startoftranscript", *LANGUAGES, *_MARKS)}
    end = words.convert_tokens_to_ids("<|endoftext|>")
    config = WhisperConfig(
        vocab_size=len(words),
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=_POSITIONS,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["startoftranscript"],
        suppress_tokens=None,
        begin_suppress_tokens=None,
        init_std=0.2,
    )
    torch.manual_seed(seed)
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Text is likelier than marks and times, and depends on its place.
        made.model.decoder.embed_tokens.weight[end:] *= 0.75
        made.model.decoder.embed_positions.weight.normal_(0, 1.0)
    settings: dict[str, Any] = {
        "decoder_start_token_id": ids["startoftranscript"],
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "no_timestamps_token_id": ids["notimestamps"],
        "prev_sot_token_id": ids["startofprev"],
        "suppress_tokens": [*_unspoken(words), *(ids[name] for name in _MARKS[:-1])],
        "begin_suppress_tokens": [words.convert_tokens_to_ids("Ġ"), end],
        "alignment_heads": [[0, 1], [1, 0]],
        "max_initial_timestamp_index": 50,
        "is_multilingual": multilingual,
        "return_timestamps": False,
        "max_length": 64,
    }
    if multilingual:
        settings["lang_to_id"] = {f"<|{name}|>": ids[name] for name in LANGUAGES}
        settings["task_to_id"] = {name: ids[name] for name in ("translate", "transcribe")}
    made.generation_config = GenerationConfig(**settings)
    return made


def _unspoken(words: WhisperTokenizer) -> list[int]:
    """Every byte but some letters, the space, a full stop and the two of é."""
    spoken = {words.convert_tokens_to_ids(character) for character in "abcdefghijklĠ.ÃÂ©"}
    return [i for i in range(256) if i not in spoken]


def save_whisper(folder: Path, **settings: Any) -> Path:
    """A checkpoint as a folder that `from_pretrained` reads."""
    words = tokenizer()
    model(words, **settings).save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), words).save_pretrained(folder)
    return folder


def recording(seconds: float, seed: int = 0, rate: int = RATE) -> Samples:
    """Tones that change twice a second, in noise; float32 [samples]."""
    chance = np.random.default_rng(seed)
    length = round(seconds * rate)
    pitch = np.repeat(chance.uniform(100, 3000, -(-length * 2 // rate) + 1), rate // 2)[:length]
    loud = np.repeat(chance.uniform(0, 0.5, len(pitch) * 2 // rate + 1), rate // 2)[:length]
    noise = chance.normal(0, 0.02, length)
    return np.asarray(loud * np.sin(2 * np.pi * np.cumsum(pitch) / rate) + noise, dtype=np.float32)


def as_file(samples: Samples, kind: str = "WAV", subtype: str | None = "FLOAT", rate: int = RATE) -> bytes:
    """The bytes of an audio file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()
