"""Recordings as clients send them, decoded: any format of libsndfile (wav, flac, mp3, ogg, …), as mono at one rate."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.media.parts import MediaSource, from_base64

Samples = npt.NDArray[np.float32]

# OpenAI's chat part, vLLM's, transformers'.
AUDIO_PARTS = {"input_audio": ("input_audio",), "audio_url": ("audio_url",), "audio": ("audio", "url", "base64")}
_RATES = (1_000, 384_000)
_MAX_CHANNELS = 32
_BLOCK_SAMPLES = 1 << 19
# What libsndfile reports of a file whose header does not say how long it is.
_UNKNOWN_FRAMES = 2**63 - 1


def audio_source(part: Mapping[str, Any], place: str) -> MediaSource:
    """The recording of a content part.

    Raises:
        BadRequest: the part has none.
    """
    name = next((key for key in AUDIO_PARTS[part["type"]] if key in part), "")
    given = part.get(name)
    data = given.get("data" if name == "input_audio" else "url") if isinstance(given, Mapping) else given
    if not isinstance(data, str) or not data:
        raise BadRequest(
            f'Invalid \'{place}\': input should have a recording, as {{"type": "input_audio", "input_audio": '
            '{"data": "…base64…", "format": "wav"}}.',
            param=place,
        )
    return MediaSource(data, f"{place}.{name}")


class AudioBudget:
    """What the recordings of one request may still have.

    Args:
        max_seconds: of all recordings together.
        max_samples: of their files together, over all channels.
    """

    def __init__(self, max_seconds: float, max_samples: float = math.inf) -> None:
        self._max_seconds = max_seconds
        self._max_samples = max_samples
        self._seconds = 0.0
        self._samples = 0

    def take(self, frames: int, file: soundfile.SoundFile, param: str) -> None:
        """Count frames of a file.

        Raises:
            BadRequest: they are too many.
        """
        self._seconds += frames / file.samplerate
        self._samples += frames * file.channels
        if self._seconds > self._max_seconds:
            raise _too_long(
                param, f"{self._seconds:.6g} s of sound; this server reads {self._max_seconds:g} s (max_audio_seconds)"
            )
        if self._samples > self._max_samples:
            raise _too_long(
                param, f"{self._samples} samples; this server reads {self._max_samples:g} (media_max_samples)"
            )


def check_headers(sources: Sequence[MediaSource], *, max_seconds: float, max_samples: int) -> None:
    """Refuse recordings by what their headers say, before any is decoded.

    Raises:
        UnsupportedParameter: one is not in the request itself.
        BadRequest: a recording cannot be read, or they are too long together.
    """
    budget = AudioBudget(max_seconds, max_samples)
    for source in sources:
        with _opened(_data(source), source.param) as file:
            _take_header(file, budget, source.param)


def decode_source(source: MediaSource, rate: int, *, max_seconds: float, budget: AudioBudget | None = None) -> Samples:
    """The samples of a recording in a conversation; see `decode_audio`.

    Raises:
        UnsupportedParameter: it is not in the request itself.
    """
    return decode_audio(_data(source), rate, max_seconds=max_seconds, param=source.param, budget=budget)


def _data(source: MediaSource) -> bytes:
    head, _, payload = source.text.rpartition(",")
    if "://" in source.text[:16] or (head and not head.lower().endswith(";base64")):
        raise UnsupportedParameter(
            f"Invalid '{source.param}': this server fetches no recordings (media_urls is off); send base64, "
            "or a data: URI with ;base64.",
            param=source.param,
        )
    try:
        return from_base64(payload)
    except ValueError as error:
        raise _bad(source.param, f"its base64 cannot be decoded ({error})") from None


def decode_audio(
    data: bytes,
    rate: int,
    *,
    max_seconds: float,
    max_samples: float = math.inf,
    param: str,
    budget: AudioBudget | None = None,
) -> Samples:
    """The samples of an audio file, channels averaged.

    Args:
        rate: samples per second of the result; others are resampled (soxr, high quality).
        max_seconds, max_samples: longer recordings are refused before they fill the memory.
        param: the request field that holds the file.
        budget: of all recordings of the request, whose headers were checked; in place of the limits.

    Returns:
        float32 [samples], within -1 and 1 as the file has them.

    Raises:
        BadRequest: the recording cannot be read, has no sound, or is too long.
    """
    with _opened(data, param) as file:
        if budget is None:
            _take_header(file, AudioBudget(max_seconds, max_samples), param)
        return _resampled(file, rate, budget or AudioBudget(max_seconds, max_samples), param)


@contextlib.contextmanager
def _opened(data: bytes, param: str) -> Iterator[soundfile.SoundFile]:
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            _check_format(file, param)
            yield file
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise _bad(param, "it is not an audio file that can be read; send wav, flac, mp3 or ogg") from error


def _check_format(file: soundfile.SoundFile, param: str) -> None:
    if not _RATES[0] <= file.samplerate <= _RATES[1]:
        raise _bad(param, f"it has {file.samplerate} samples per second; {_RATES[0]} to {_RATES[1]} can be read")
    if file.channels > _MAX_CHANNELS:
        raise _bad(param, f"it has {file.channels} channels; at most {_MAX_CHANNELS} can be read")


def _take_header(file: soundfile.SoundFile, budget: AudioBudget, param: str) -> None:
    if 0 < file.frames < _UNKNOWN_FRAMES:
        budget.take(file.frames, file, param)


def _resampled(file: soundfile.SoundFile, rate: int, budget: AudioBudget, param: str) -> Samples:
    resample = _resampler(file.samplerate, rate)
    blocks: list[Samples] = []
    while len(block := file.read(_BLOCK_SAMPLES // file.channels, dtype="float32", always_2d=True)):
        # A header may say nothing, or less than there is.
        budget.take(len(block), file, param)
        blocks.append(resample(block.mean(axis=1, dtype=np.float32), False))
    blocks.append(resample(np.zeros(0, dtype=np.float32), True))
    samples = np.concatenate(blocks)
    if not len(samples):
        raise _bad(param, "the recording is empty")
    if not np.isfinite(samples).all():
        raise _bad(param, "its samples are not finite numbers")
    return samples


def _resampler(given: int, wanted: int) -> Callable[[Samples, bool], Samples]:
    """What turns blocks of one rate into blocks of another; its caller marks the last one."""
    if given == wanted:
        return lambda block, last: block
    stream = soxr.ResampleStream(given, wanted, 1, dtype="float32")
    return lambda block, last: stream.resample_chunk(block, last=last)


def _too_long(param: str, has: str) -> BadRequest:
    why = f"with it the recordings of this request have {has}"
    return BadRequest(f"Invalid '{param}': {why}.", param=param, code="audio_too_long")


def _bad(param: str, why: str) -> BadRequest:
    return BadRequest(f"Invalid '{param}': {why}.", param=param, code="invalid_audio")
