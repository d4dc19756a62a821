"""Recordings in chats: over a tiny random Qwen2-Audio, equal to its own processor and `generate`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai import OpenAI
from tokenizers import AddedToken
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from tests.openai.conftest import Serve, Server
from tests.tiny import byte_tokenizer
from tests.whisper import RATE, Samples, as_file, recording

FIRST, SECOND = recording(1.5, seed=1), recording(3, seed=2)


def save_qwen2_audio(folder: Path) -> Path:
    """Windows of 4 s, two layers on each side, byte tokens."""
    tokenizer = byte_tokenizer()
    names = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(name, special=True, normalized=False) for name in names]}
    )
    tokenizer.chat_template = None
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    processor = Qwen2AudioProcessor(extractor, tokenizer)
    processor.save_pretrained(folder)
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.4,
    }
    audio = {
        "model_type": "qwen2_audio_encoder",
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "max_source_positions": 200,
        "initializer_range": 0.4,
    }
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=processor.audio_token_id)
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 257, 258
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_audio(tmp_path_factory.mktemp("qwen2audio"))


@pytest.fixture(scope="module")
def server(serve: Serve, folder: Path) -> Server:
    engine = {"threads": 1}
    hearing = {"loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(folder)}}
    return serve(
        [
            {"id": "hearing", **hearing, "engine": engine},
            {"id": "deaf", "loader": "tests.openai.tiny_models:load_model", "engine": engine},
        ],
        max_audio_seconds=30,
    )


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    return server.client(timeout=120)


def part(samples: Samples, kind: str = "WAV", subtype: str | None = "FLOAT") -> dict[str, Any]:
    data = base64.b64encode(as_file(samples, kind, subtype)).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind.lower()}}


def ask(client: OpenAI, *parts: Any, model: str = "hearing", **options: Any) -> Any:
    options = {"max_tokens": 16, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": list(parts)}], **options)


def expected(folder: Path, content: list[Any], sounds: list[Samples]) -> str:
    """The model's own answer."""
    processor = Qwen2AudioProcessor.from_pretrained(folder)
    model = Qwen2AudioForConditionalGeneration.from_pretrained(folder).eval()
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=text, audio=sounds, sampling_rate=RATE, return_tensors="pt", add_special_tokens=False)
    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs.input_ids.shape[1] :]
    return str(processor.tokenizer.decode(ids, skip_special_tokens=True))


TEXT = {"type": "text", "text": "What is it?"}
SOUND = {"type": "audio"}


def test_a_recording_is_heard(client: OpenAI, folder: Path) -> None:
    torch.set_num_threads(1)
    first = ask(client, part(FIRST), TEXT).choices[0].message.content
    assert first == expected(folder, [SOUND, TEXT], [FIRST])
    assert ask(client, part(SECOND), TEXT).choices[0].message.content != first
    both = ask(client, part(FIRST), TEXT, part(SECOND, "FLAC", "PCM_16")).choices[0].message.content
    assert both == expected(folder, [SOUND, TEXT, SOUND], [FIRST, SECOND])
    assert ask(client, TEXT).choices[0].message.content


def test_other_shapes_of_parts(client: OpenAI) -> None:
    uri = "data:audio/wav;base64," + part(FIRST)["input_audio"]["data"]
    answers = {
        ask(client, sound, TEXT).choices[0].message.content
        for sound in (part(FIRST), {"type": "audio_url", "audio_url": {"url": uri}}, {"type": "audio", "audio": uri})
    }
    assert len(answers) == 1


def test_the_prompt_says_how_long_it_is(client: OpenAI) -> None:
    lengths = [ask(client, part(recording(s)), TEXT).usage.prompt_tokens for s in (1, 2)]
    assert lengths[1] - lengths[0] == 25


@pytest.mark.parametrize(
    ("sound", "param", "code"),
    [
        (part(recording(5)), "input_audio", "audio_too_long"),
        (part(recording(31), "FLAC", "PCM_16"), "input_audio", "audio_too_long"),
        ({"type": "input_audio", "input_audio": {"data": "?", "format": "wav"}}, "input_audio", "invalid_audio"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}, "input_audio", "invalid_audio"),
        ({"type": "input_audio", "input_audio": {"format": "mp3"}}, "", "invalid_value"),
        ({"type": "audio_url", "audio_url": {"url": "http://a/b.wav"}}, "audio_url", "unsupported_parameter"),
        ({"type": "audio", "audio": "file:///etc/passwd"}, "audio", "unsupported_parameter"),
    ],
)
def test_mistakes(client: OpenAI, sound: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, TEXT, sound)
    assert error.value.param == f"messages[0].content[1]{'.' if param else ''}{param}"
    assert error.value.code == code


def test_a_model_that_cannot_hear_drops_nothing(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="takes no recordings") as error:
        ask(client, TEXT, part(FIRST), model="deaf")
    assert error.value.code == "audio_unsupported"
    assert error.value.param == "messages[0].content[1].input_audio"


def test_a_model_that_hears_sees_nothing(client: OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, TEXT, image)
    assert error.value.code == "images_unsupported"
