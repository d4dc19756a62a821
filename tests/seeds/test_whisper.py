"""What the transformers-openai-api servers did with Whisper, and what they got wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from deployments.local import make_app
from tests.seeds.serving import listening
from tests.whisper import as_file, recording, save_whisper

LONG = as_file(recording(65, seed=2))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Whisper as --hf-model would serve it, under the name that their clients send."""
    folder = save_whisper(tmp_path_factory.mktemp("whisper"), seed=5)
    entry = {"id": "base", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(folder)}}
    with listening(make_app({"models": [{**entry, "engine": {"threads": 1}}]})) as found:
        yield found


def send(address: str, audio: bytes = LONG, **fields: Any) -> requests.Response:
    """The request of their README: no /v1, a form."""
    url = f"{address}/audio/transcriptions"
    return requests.post(url, data={"model": "base", **fields}, files={"file": ("a.wav", audio)}, timeout=120)


def seconds(clock: str) -> float:
    hours, minutes, rest = clock.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


def test_their_form(address: str) -> None:
    fields = {"response_format": "text", "language": "null", "repetition_penalty": 1.0, "temperature": 0.0}
    whole = send(address, top_p=0.95, top_k=50, stream="false", **fields)
    assert whole.status_code == 200
    assert "x-troupe-ignored" not in whole.headers
    stream = send(address, stream="true", **fields)
    events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: ")]
    assert "".join(event.get("delta", "") for event in events) == whole.text
    assert "<|" not in stream.text


def test_12_times_are_of_the_recording_and_grow(address: str) -> None:
    srt = send(address, response_format="srt").text
    spans = [line.split(" --> ") for line in srt.splitlines() if " --> " in line]
    times = [(seconds(start), seconds(end)) for start, end in spans]
    assert len(times) > 6
    assert all(start <= end for start, end in times)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(times))
    assert times[0][0] < 30


def test_12_nothing_of_the_beginning_is_lost(address: str) -> None:
    segments = send(address, response_format="verbose_json").json()["segments"]
    assert segments[0]["seek"] == 0
    assert segments[0]["start"] < 5
    assert [segment["id"] for segment in segments] == list(range(len(segments)))


def test_12_a_recording_without_words_has_a_length(address: str) -> None:
    """Whatever the model hears in silence, the answer is one."""
    silence = as_file(np.zeros(16_000, dtype=np.float32))
    answer = send(address, silence, response_format="verbose_json", max_completion_tokens=1).json()
    assert answer["duration"] == 1
    assert answer["segments"] == []
    assert send(address, silence, response_format="srt", max_completion_tokens=1).text == ""


def test_tokens_are_those_of_the_checkpoint(address: str) -> None:
    """Their prompt was that of large-v3 whatever the model; here no id is beyond the checkpoint's vocabulary."""
    segments = send(address, response_format="verbose_json", language="ms").json()["segments"]
    assert all(token < 1800 for segment in segments for token in segment["tokens"])
    assert all(set(segment["text"]) <= set("abcdefghijkl .é©Ã\ufffd") for segment in segments)


def test_words_and_translations_which_they_had_not(address: str) -> None:
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": "word"}
    assert send(address, **fields).json()["words"]
    url = f"{address}/audio/translations"
    assert requests.post(url, files={"file": ("a.wav", LONG)}, timeout=120).json()["text"]


def test_a_file_that_is_no_sound_is_a_400(address: str) -> None:
    response = send(address, b"not a sound")
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_audio"


def test_the_checkpoint_needs_no_flag(tmp_path: Path) -> None:
    from deployments.compat.flags import read_flags, serve_config

    folder = save_whisper(tmp_path / "w")
    config = serve_config(*read_flags(["--hf-model", str(folder), "--serving-type", "whisper"], {}))
    (model,) = config["applications"][0]["args"]["models"]
    assert model["kwargs"] == {"model_name": str(folder)}
    assert "model" in model["aliases"]
