"""Recordings are decoded as they are, whatever their format, and bounded before they fill the memory."""

from __future__ import annotations

import base64
import tracemalloc

import numpy as np
import pytest

from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.media.audio import decode_audio, decode_source
from deployments.media.parts import MediaSource
from tests.whisper import RATE, as_file, recording

pytestmark = pytest.mark.usefixtures("all_is_walked")

SOUND = recording(2)


def decode(data: bytes, seconds: float = 10) -> np.ndarray:
    return decode_audio(data, RATE, max_seconds=seconds, param="file")


def test_samples_are_not_changed_without_need() -> None:
    assert np.array_equal(decode(as_file(SOUND)), SOUND)
    assert np.array_equal(decode(as_file(SOUND, "FLAC", "PCM_24")), np.round(SOUND * 2**23) / 2**23)


def test_channels_are_averaged() -> None:
    both = np.stack([SOUND, np.zeros_like(SOUND)], axis=1)
    assert np.allclose(decode(as_file(both)), SOUND / 2)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
def test_other_rates(rate: int) -> None:
    time = np.arange(rate) / rate
    tone = np.sin(2 * np.pi * 440 * time, dtype=np.float64).astype(np.float32)
    found = decode(as_file(tone, rate=rate))
    assert len(found) == pytest.approx(RATE, abs=2)
    spectrum = np.abs(np.fft.rfft(found[:RATE], RATE))
    assert int(spectrum.argmax()) == 440


def test_a_long_recording_is_refused_before_it_is_read() -> None:
    """Eight hours of silence are a file of a few hundred kB."""
    silence = as_file(np.zeros(2 * 3600 * 8000, dtype=np.int16), "FLAC", "PCM_16", 8000)
    assert len(silence) < 1_000_000
    tracemalloc.start()
    with pytest.raises(BadRequest) as error:
        decode(silence, 60)
    assert error.value.code == "audio_too_long"
    assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    tracemalloc.stop()


def test_sources() -> None:
    data = base64.b64encode(as_file(SOUND)).decode()
    for text in (data, f"data:audio/wav;base64,{data}", data.replace("+", "-").replace("/", "_")):
        assert np.array_equal(decode_source(MediaSource(text, "a"), RATE, max_seconds=9), SOUND)
    for text in ("https://a/b.wav", "file:///b.wav", "data:audio/wav,abc"):
        with pytest.raises(UnsupportedParameter):
            decode_source(MediaSource(text, "a"), RATE, max_seconds=9)
