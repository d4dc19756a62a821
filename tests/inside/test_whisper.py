"""Words of a recording are aligned while states of the same weights are captured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import WhisperFeatureExtractor, WhisperProcessor

from deployments.core.transcript import Word
from deployments.media.whisper.format import Span, WhisperFormat
from deployments.media.whisper.word_times import WordAligner
from model_loaders.contract import ModelInfo
from tests.inside.asking import ask, capture, hooked
from tests.inside.test_capture import engine_of
from tests.whisper import RATE, model, recording, tokenizer


def test_an_alignment_within_a_captured_forward_leaves_no_piece_of_it() -> None:
    """It computes with modules of its own around the same weights."""
    torch.set_num_threads(1)
    words, features = tokenizer(), WhisperFeatureExtractor(feature_size=16)
    whisper = model(words)
    info = ModelInfo(model=whisper, processor=WhisperProcessor(features, words), tokenizer=words, model_name="w")
    form = WhisperFormat(info)
    aligner = WordAligner.from_info(info, form)
    assert aligner is not None
    window = features(recording(2.0), sampling_rate=RATE, return_tensors="pt").input_features
    prompt = form.prompt(form.language_id("de"), "transcribe", times=False)
    engine = engine_of(whisper)
    taken = capture("model.decoder.layers.*", "model.encoder.layers.1", "proj_out", positions="generated")

    def captured() -> dict[str, Any]:
        seen = ask(engine, prompt, 8, capture=taken, inputs={"input_features": window}, content_key="sound")
        assert len(seen.numbered["positions"]) == 7
        return {"ids": seen.token_ids, **seen.tensors}

    alone = captured()
    spans = [Span(0.0, 2.0, tuple(alone["ids"]))]

    def aligned() -> list[list[Word]]:
        return aligner.words(window, 200, prompt, alone["ids"], spans, language="de")

    expected = aligned()
    assert expected[0]
    found: list[list[list[Word]]] = []
    with ThreadPoolExecutor(1) as pool:

        def align(*call: Any) -> None:
            assert hooked(whisper)
            # In the engine's thread, whose forwards are captured, only modules of its own keep it out.
            found.extend([pool.submit(aligned).result(30), aligned()])

        handle = whisper.model.decoder.layers[0].register_forward_pre_hook(align)
        beside = captured()
        handle.remove()
    engine.close()
    assert len(found) >= 16
    assert all(each == expected for each in found)
    assert alone.keys() == beside.keys()
    assert alone.pop("ids") == beside.pop("ids")
    assert all(torch.equal(beside[name], tensor) for name, tensor in alone.items())
    assert hooked(whisper) == []
