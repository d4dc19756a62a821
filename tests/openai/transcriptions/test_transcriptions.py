"""Recordings to text over a tiny random Whisper: what `generate` gives, in every format."""

from __future__ import annotations

import base64
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from openai import OpenAI
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from deployments.media.audio import decode_audio
from tests.openai.conftest import Serve, Server
from tests.whisper import RATE, Samples, as_file, recording, save_whisper

# The client's own: OpenAI has announced the end of its translations.
pytestmark = pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")

SHORT, LONG = recording(7, seed=1), recording(65, seed=2)
FILE = {"short": as_file(SHORT), "middle": as_file(LONG[: 35 * RATE]), "long": as_file(LONG)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_whisper(tmp_path_factory.mktemp("whisper"), seed=5)


@pytest.fixture(scope="module")
def whisper(serve: Serve, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Server:
    english = save_whisper(tmp_path_factory.mktemp("english"), seed=1, multilingual=False)
    engine = {"pack_linears": False, "threads": 1}
    auto = "model_loaders.auto:load_model"
    return serve(
        [
            {"id": "whisper", "loader": auto, "kwargs": {"model_name": str(folder)}, "engine": engine},
            {
                "id": "whole",
                "loader": auto,
                "kwargs": {"model_name": str(folder)},
                "engine": {**engine, "kind": "generate"},
            },
            {"id": "english", "loader": auto, "kwargs": {"model_name": str(english)}, "engine": engine},
            {"id": "deaf", "loader": "tests.openai.tiny_models:load_model", "engine": engine},
        ],
        max_body_bytes=8 * 2**20,
        max_audio_seconds=120,
    )


@pytest.fixture(scope="module")
def client(whisper: Server) -> OpenAI:
    return whisper.client(timeout=120)


class Reference:
    """transformers' own way."""

    def __init__(self, folder: Path) -> None:
        self.model = WhisperForConditionalGeneration.from_pretrained(folder).eval()
        self.processor = WhisperProcessor.from_pretrained(folder)

    def features(self, samples: Samples) -> torch.Tensor:
        options = {} if len(samples) <= 30 * RATE else {"truncation": False, "padding": "longest"}
        found = self.processor(samples, sampling_rate=RATE, return_tensors="pt", **options)
        return found.input_features  # type: ignore[no-any-return]

    def text(self, samples: Samples, **options: Any) -> str:
        options = {"language": "de", "task": "transcribe", **options}
        # One call: `generate` would read on where a model that is to write no times does so all the same.
        ids = self.model.generate(self.features(samples), force_unique_generate_call=True, **options)[0].tolist()
        return self.decoded(ids[ids.index(self.model.generation_config.decoder_start_token_id) :])

    def segments(self, samples: Samples, **options: Any) -> list[tuple[float, float, list[int]]]:
        options = {"language": "de", "task": "transcribe", "return_timestamps": True, **options}
        found = self.model.generate(self.features(samples), return_segments=True, **options)["segments"][0]
        return [(round(float(s["start"]), 2), round(float(s["end"]), 2), s["tokens"].tolist()) for s in found]

    def decoded(self, ids: list[int]) -> str:
        return str(self.processor.tokenizer.decode([i for i in ids if i < 256]))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    torch.set_num_threads(1)
    return Reference(folder)


def transcribe(client: OpenAI, audio: bytes = FILE["short"], **options: Any) -> Any:
    options = {"model": "whisper", "language": "de", **options}
    return client.audio.transcriptions.create(file=("a.wav", audio), **options)


def post(server: Server, path: str = "/v1/audio/transcriptions", *, file: Any = FILE["short"], **fields: Any) -> Any:
    files = None if file is None else {"file": ("a.wav", file)}
    return requests.post(server.url + path, data={"model": "whisper", **fields}, files=files, timeout=120)


@pytest.mark.parametrize("model", ["whisper", "whole"])
def test_a_short_recording_is_what_generate_gives(client: OpenAI, reference: Reference, model: str) -> None:
    answer = transcribe(client, model=model)
    assert answer.text == reference.text(SHORT).strip()
    assert len(answer.text) > 10
    assert answer.usage.type == "duration"
    assert answer.usage.seconds == 7


@pytest.mark.parametrize("model", ["whisper", "whole"])
def test_a_long_recording_is_generates_long_form(client: OpenAI, reference: Reference, model: str) -> None:
    expected = reference.segments(LONG)
    answer = transcribe(client, FILE["long"], model=model, response_format="verbose_json")
    spoken = [segment for segment in expected if reference.decoded(segment[2]).strip()]
    assert len(spoken) > 6
    assert [(s.start, s.end, s.text) for s in answer.segments] == [
        (start, end, reference.decoded(ids)) for start, end, ids in spoken
    ]
    assert answer.text == "".join(reference.decoded(ids) for _, _, ids in expected).strip()
    assert (answer.duration, answer.language) == (65, "german")
    assert transcribe(client, FILE["long"], model=model).text == answer.text


def test_the_figures_of_a_segment(client: OpenAI, reference: Reference) -> None:
    answer = transcribe(client, as_file(LONG[: 30 * RATE]), response_format="verbose_json")
    first = answer.segments[0]
    model, ids = reference.model, reference.processor.tokenizer.convert_tokens_to_ids
    features = reference.features(LONG[: 30 * RATE])
    found = model.generate(
        features,
        language="de",
        task="transcribe",
        return_timestamps=True,
        return_dict_in_generate=True,
        output_scores=True,
        force_unique_generate_call=True,
    )
    written = found.sequences[0, -len(found.scores) :]
    logprobs = [score[0].float().log_softmax(-1)[token] for score, token in zip(found.scores, written, strict=True)]
    assert first.avg_logprob == pytest.approx(float(torch.stack(logprobs).mean()), abs=1e-3)
    start = torch.tensor([[ids("<|startoftranscript|>")]])
    with torch.inference_mode():
        silence = model(features, decoder_input_ids=start).logits[0, -1].softmax(-1)[ids("<|nospeech|>")]
    assert first.no_speech_prob == pytest.approx(float(silence), rel=1e-3)
    assert (first.seek, first.temperature) == (0, 0)
    assert first.compression_ratio > 0


def test_the_language_is_guessed(client: OpenAI, reference: Reference) -> None:
    guessed = int(reference.model.detect_language(reference.features(SHORT)))
    token = reference.processor.tokenizer.convert_ids_to_tokens(guessed)
    answer = transcribe(client, language=openai.omit, response_format="verbose_json")
    code = {"english": "en", "chinese": "zh", "german": "de", "malay": "ms"}[answer.language]
    assert token == f"<|{code}|>"
    assert transcribe(client, language=openai.omit).text == transcribe(client, language=code).text
    assert transcribe(client, language="null").text == transcribe(client, language=code).text


def test_languages_by_name_and_prompts(client: OpenAI, reference: Reference) -> None:
    assert transcribe(client, language="German").text == transcribe(client).text
    assert transcribe(client, language="zh").text == reference.text(SHORT, language="zh").strip()
    prompt = reference.processor.get_prompt_ids("a bad cab", return_tensors="pt")
    expected = reference.text(SHORT, prompt_ids=prompt).strip()
    assert transcribe(client, prompt="a bad cab").text == expected
    assert expected != transcribe(client).text


def test_translations(client: OpenAI, reference: Reference) -> None:
    answer = client.audio.translations.create(
        model="whisper", file=("a.wav", FILE["short"]), extra_body={"language": "de"}
    )
    assert answer.text == reference.text(SHORT, task="translate").strip()
    verbose = client.audio.translations.create(
        model="whisper", file=("a.wav", FILE["short"]), response_format="verbose_json", extra_body={"language": "de"}
    )
    assert verbose.language == "english"


def test_words_are_those_of_transformers(client: OpenAI, reference: Reference) -> None:
    samples = LONG[: 30 * RATE]
    answer = transcribe(
        client, as_file(samples), response_format="verbose_json", timestamp_granularities=["word", "segment"]
    )
    inputs = reference.processor(samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
    twin = Reference(Path(reference.model.config._name_or_path))
    found = twin.model.generate(
        **inputs,
        language="de",
        task="transcribe",
        return_timestamps=True,
        return_token_timestamps=True,
        return_segments=True,
    )
    ends = [
        round(float(end), 2)
        for segment in found["segments"][0]
        for token, end in zip(segment["tokens"].tolist(), segment["token_timestamps"].tolist(), strict=True)
        if token < 256 and twin.decoded([token]).strip()
    ]
    assert len(answer.words) > 3
    assert "".join(word.word for word in answer.words) == re.sub(r"\s", "", answer.text)
    assert {word.end for word in answer.words} <= set(ends)
    assert answer.words[-1].end == pytest.approx(ends[-1], abs=0.02)
    assert all(0 <= word.start <= word.end <= 30 for word in answer.words)
    alone = transcribe(client, as_file(samples), response_format="verbose_json", timestamp_granularities=["word"])
    assert alone.words == answer.words
    assert alone.segments is None


def test_subtitles(client: OpenAI) -> None:
    segments = transcribe(client, FILE["middle"], response_format="verbose_json").segments

    def clock(seconds: float, point: str) -> str:
        whole, milli = divmod(round(seconds * 1000), 1000)
        return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{milli:03d}"

    def block(segment: Any, point: str) -> str:
        text = " ".join(segment.text.split())
        return f"{clock(segment.start, point)} --> {clock(segment.end, point)}\n{text}\n\n"

    assert transcribe(client, FILE["middle"], response_format="srt") == "".join(
        f"{number}\n{block(segment, ',')}" for number, segment in enumerate(segments, 1)
    )
    assert transcribe(client, FILE["middle"], response_format="vtt") == "WEBVTT\n\n" + "".join(
        block(segment, ".") for segment in segments
    )


def test_the_types_of_texts(whisper: Server) -> None:
    for wanted, kind in (("text", "text/plain"), ("srt", "text/plain"), ("vtt", "text/vtt")):
        response = post(whisper, response_format=wanted)
        assert response.headers["content-type"].startswith(kind)
    assert post(whisper, response_format="text", language="de").text == post(whisper, language="de").json()["text"]


@pytest.mark.parametrize("length", ["short", "middle"])
@pytest.mark.parametrize("wanted", ["json", "text", "srt", "vtt", "verbose_json"])
def test_a_stream_has_the_same_text(client: OpenAI, length: str, wanted: str) -> None:
    whole = transcribe(client, FILE[length], response_format=wanted)
    text = whole if isinstance(whole, str) else whole.text
    events = list(transcribe(client, FILE[length], response_format=wanted, stream=True))
    assert [event.type for event in events[:-1]] == ["transcript.text.delta"] * (len(events) - 1)
    assert "".join(event.delta for event in events[:-1]) == text
    done = events[-1]
    assert (done.type, done.text) == ("transcript.text.done", text)
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    # What a window leaves to the next one is heard twice.
    assert done.usage.input_token_details.audio_tokens in ([350] if length == "short" else range(1750, 1850))
    if length == "middle":
        assert len(events) > 2
    if wanted == "verbose_json":
        assert [segment["text"] for segment in done.segments] == [segment.text for segment in whole.segments]


def test_logprobs(client: OpenAI) -> None:
    answer = transcribe(client, include=["logprobs"])
    assert b"".join(bytes(map(int, entry.bytes)) for entry in answer.logprobs).decode(errors="replace").strip() == (
        answer.text
    )
    assert all(entry.logprob <= 0 for entry in answer.logprobs)
    done = list(transcribe(client, include=["logprobs"], stream=True))[-1]
    assert [entry.logprob for entry in done.logprobs] == pytest.approx([e.logprob for e in answer.logprobs], abs=1e-4)


def test_sampling(client: OpenAI) -> None:
    def text(**options: Any) -> str:
        return str(transcribe(client, temperature=1, extra_body=options).text)

    assert text(seed=3) == text(seed=3)
    assert len({text() for _ in range(4)}) > 1
    assert text(top_k=1) == transcribe(client).text
    assert [text(seed=seed, repetition_penalty=1.8) for seed in range(3)] != [text(seed=seed) for seed in range(3)]
    assert len(transcribe(client, extra_body={"max_completion_tokens": 3}).text) <= 3


def test_many_at_once_are_what_each_is_alone(client: OpenAI) -> None:
    sounds = [as_file(recording(3 + seed, seed=seed)) for seed in range(6)]
    alone = [transcribe(client, sound).text for sound in sounds]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda sound: transcribe(client, sound).text, sounds)) == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(("kind", "subtype"), [("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("MP3", None), ("OGG", "VORBIS")])
def test_formats_rates_and_channels(client: OpenAI, reference: Reference, kind: str, subtype: str | None) -> None:
    stereo = torch.tensor(recording(4, rate=44_100))[:, None].repeat(1, 2).numpy()
    audio = as_file(stereo, kind, subtype, 44_100)
    samples = decode_audio(audio, RATE, max_seconds=60, param="file")
    assert len(samples) == pytest.approx(4 * RATE, abs=2000)
    assert transcribe(client, audio).text == reference.text(samples).strip()


def test_a_model_of_one_language(client: OpenAI) -> None:
    answer = transcribe(client, model="english", language="en", response_format="verbose_json")
    assert answer.language == "english"
    assert answer.segments[0].no_speech_prob > 0
    assert transcribe(client, model="english", language=openai.omit).text == (
        transcribe(client, model="english", language="en").text
    )
    for options in ({"language": "de"}, {"language": "klingon"}):
        with pytest.raises(openai.BadRequestError) as error:
            transcribe(client, model="english", **options)
        assert error.value.param == "language"
    with pytest.raises(openai.BadRequestError, match="cannot translate"):
        client.audio.translations.create(model="english", file=("a.wav", FILE["short"]))


EMPTY = as_file(SHORT[:0])
MISTAKES: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"file": None}, 415, None, "unsupported_media_type"),
    ({"file": b"no sound at all"}, 400, "file", "invalid_audio"),
    ({"file": b""}, 400, "file", "invalid_audio"),
    ({"file": FILE["short"][:30]}, 400, "file", "invalid_audio"),
    ({"file": EMPTY}, 400, "file", "invalid_audio"),
    ({"file": as_file(SHORT[:9000], rate=8)}, 400, "file", "invalid_audio"),
    ({"file": as_file(recording(121), "FLAC", "PCM_16")}, 400, "file", "audio_too_long"),
    ({"file": b"x" * (8 * 2**20)}, 413, None, "request_too_large"),
    ({"model": "nobody"}, 404, "model", "model_not_found"),
    ({"model": "deaf"}, 400, "model", "audio_unsupported"),
    ({"language": "klingon"}, 400, "language", "invalid_value"),
    ({"language": "fr"}, 400, "language", "invalid_value"),
    ({"prompt": "a <|nospeech|> b"}, 400, "prompt", "invalid_value"),
    ({"prompt": "a" * 100}, 400, "prompt", "invalid_value"),
    ({"response_format": "diarized_json"}, 400, "response_format", "invalid_value"),
    ({"temperature": "warm"}, 400, "temperature", "invalid_value"),
    ({"temperature": -1}, 400, "temperature", "invalid_value"),
    ({"timestamp_granularities[]": "word"}, 400, "timestamp_granularities", "invalid_value"),
    ({"include[]": "logprobs", "response_format": "srt"}, 400, "include", "invalid_value"),
    ({"chunking_strategy": '{"type": "server_vad"}'}, 400, "chunking_strategy", "unsupported_parameter"),
    ({"keywords[]": ["a", "b"]}, 400, "keywords", "unsupported_parameter"),
    ({"language": ["de", "en"]}, 400, "language", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "status", "param", "code"), MISTAKES)
def test_mistakes(whisper: Server, fields: dict[str, Any], status: int, param: str | None, code: str) -> None:
    response = post(whisper, **fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code), error["message"]
    assert "Traceback" not in error["message"]


FILE_IS_TEXT = b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n--x--\r\n'


def test_bodies_that_are_no_forms(whisper: Server) -> None:
    url = whisper.url + "/v1/audio/transcriptions"
    for kind, body in (
        ("multipart/form-data; boundary=x", b"garbage"),
        ("multipart/form-data", b"--x--"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n--x--\r\n',
        ),
    ):
        response = requests.post(url, data=body, headers={"Content-Type": kind}, timeout=10)
        assert response.status_code == 400, response.text
    response = requests.post(url, json={"model": "whisper"}, timeout=10)
    assert response.status_code == 415
    assert "multipart/form-data" in response.json()["error"]["message"]


def test_who_has_no_alignment_heads_tells_no_words(whisper: Server, serve: Serve, folder: Path) -> None:
    import shutil

    copy = folder.parent / "headless"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "generation_config.json").read_text())
    del config["alignment_heads"]
    (copy / "generation_config.json").write_text(json.dumps(config))
    models = [{"id": "whisper", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(copy)}}]
    fields = {"timestamp_granularities[]": "word", "response_format": "verbose_json"}
    response = post(serve(models), **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "timestamp_granularities"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_texts_for_a_model_that_hears_are_sent_elsewhere(whisper: Server, path: str, body: dict[str, Any]) -> None:
    response = requests.post(whisper.url + path, json={"model": "whisper", **body}, timeout=60)
    assert response.status_code == 400
    assert "/v1/audio/transcriptions" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "text_unsupported"


def test_paths(whisper: Server) -> None:
    texts = {
        post(whisper, path, language="de", **({"model": "deaf"} if "models" in path else {})).json()["text"]
        for path in ("/v1/audio/transcriptions", "/audio/transcriptions", "/models/whisper/v1/audio/transcriptions")
    }
    assert len(texts) == 1


def test_who_leaves_stops_the_computation(whisper: Server, client: OpenAI) -> None:
    def busy() -> bool:
        (line,) = requests.get(whisper.url + "/health?verbose", timeout=10).json()["replicas"]
        return "whisper (continuous_batching: 0 running, 0 waiting)" not in line

    audio = as_file(recording(115, seed=3), "FLAC", "PCM_16")
    stream = transcribe(client, audio, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(requests.exceptions.Timeout):
        requests.post(
            whisper.url + "/v1/audio/transcriptions",
            data={"model": "whisper"},
            files={"file": ("a.flac", audio)},
            timeout=0.3,
        )
    begun = time.monotonic()
    while busy():
        assert time.monotonic() - begun < 10
        time.sleep(0.05)
    time.sleep(0.3)
    assert not busy()


def test_unknown_fields_are_listed(whisper: Server) -> None:
    response = post(whisper, my_field="0.5")
    assert response.status_code == 200
    assert response.headers["x-troupe-ignored"] == "my_field"
    assert response.headers["x-troupe-fingerprint"].startswith("troupe-w")
    misspelt = post(whisper, temprature="0.5")
    assert (misspelt.status_code, misspelt.json()["error"]["param"]) == (400, "temprature")


def test_records_leave_the_sound_out(serve: Serve, folder: Path, tmp_path: Path) -> None:
    models = [{"id": "whisper", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(folder)}}]
    server = serve(models, record_dir=str(tmp_path))
    text = post(server, language="de").json()["text"]
    begun = time.monotonic()
    while not (lines := [line for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]):
        assert time.monotonic() - begun < 10
        time.sleep(0.05)
    (line,) = map(json.loads, lines)
    assert line["request"] == {"model": "whisper", "language": "de"}
    assert line["choices"][0]["text"].strip() == text
    assert base64.b64encode(FILE["short"][:60]).decode()[:40] not in lines[0]


def test_the_page_describes_the_form(whisper: Server) -> None:
    operation = requests.get(whisper.url + "/openapi.json", timeout=10).json()["paths"]["/v1/audio/transcriptions"]
    form = operation["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert "$ref" in form
