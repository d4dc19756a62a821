"""Segments from Whisper's answers, as transformers' long form cuts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperProcessor

from deployments.core.errors import BadRequest
from deployments.media.whisper.format import WhisperFormat
from model_loaders.contract import ModelInfo
from tests.tiny import byte_tokenizer, llama
from tests.whisper import model, tokenizer

WORDS = tokenizer()
MODEL = model(WORDS)
INFO = ModelInfo(
    model=MODEL, processor=WhisperProcessor(WhisperFeatureExtractor(feature_size=16), WORDS), model_name="w"
)
FORM = WhisperFormat(INFO)
TIME = int(MODEL.generation_config.no_timestamps_token_id) + 1
TOKENS = st.one_of(st.integers(0, 255), st.integers(TIME, TIME + 1500))
# Theirs loses a position to rounding at some lengths.
FRAMES = st.integers(1, 3000).filter(lambda frames: int(torch.tensor(frames) * 0.01 / 0.02) == frames // 2)


@settings(deadline=None, max_examples=300)
@given(ids=st.lists(TOKENS, max_size=24), frames=FRAMES)
def test_spans_are_those_of_transformers(ids: list[int], frames: int) -> None:
    expected, moved = WhisperForConditionalGeneration._retrieve_segment(
        seek_sequence=torch.tensor(ids, dtype=torch.long),
        seek_outputs=[None],
        time_offset=torch.zeros(1, dtype=torch.float64),
        timestamp_begin=TIME,
        seek_num_frames=torch.tensor([frames]),
        time_precision=0.02,
        time_precision_features=0.01,
        input_stride=2,
        prev_idx=0,
        idx=0,
        return_token_timestamps=False,
        decoder_input_ids=torch.zeros(1, 0),
    )
    spans, found = FORM.spans(ids, frames)
    times = [float(segment[name]) for segment in expected for name in ("start", "end")]
    assert [time for span in spans for time in (span.start, span.end)] == pytest.approx(times)
    texts = [[i for i in segment["tokens"].tolist() if i < 256] for segment in expected]
    assert [FORM.words_only(span.token_ids) for span in spans] == texts
    # A window that ends where it begins would be read for ever.
    assert found == (int(moved) if int(moved) > 0 else frames)


def test_prompts() -> None:
    def ids(*names: str) -> list[int]:
        return [WORDS.convert_tokens_to_ids(f"<|{name}|>") for name in names]

    german = FORM.language_id("German")
    assert [german] == ids("de")
    assert FORM.prompt(german, "transcribe", times=False) == ids(
        "startoftranscript", "de", "transcribe", "notimestamps"
    )
    before = FORM.context("ab")
    assert before == [*ids("startofprev"), *WORDS(" ab", add_special_tokens=False).input_ids]
    prompt = FORM.prompt(german, "translate", times=True, before=before)
    assert prompt == [*before, *ids("startoftranscript", "de", "translate")]
    assert prompt[FORM.after_opening(prompt) or 0] == german
    assert FORM.after_opening(FORM.opening()) is None
    assert FORM.context("  ") == []
    with pytest.raises(BadRequest, match="at most 30 tokens"):
        FORM.context("a" * 31)


def test_what_is_no_whisper() -> None:
    assert WhisperFormat.from_info(ModelInfo(model=llama(), tokenizer=byte_tokenizer())) is None
    assert WhisperFormat.from_info(INFO) is not None
