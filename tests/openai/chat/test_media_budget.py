"""What the media of one request may have together, told by their headers."""

from __future__ import annotations

import base64
import io
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import soundfile
from PIL import Image, ImageFile

import deployments.media.images
from deployments.core.errors import BadRequest
from deployments.media.audio import AudioBudget, check_headers, decode_audio, decode_source
from deployments.media.images import decode_image, open_images
from deployments.media.parts import MediaLimits, MediaSource
from tests.openai.chat.test_input_audio import save_qwen2_audio
from tests.openai.conftest import Server
from tests.seeds.vision import save_paligemma
from tests.tiny import byte_tokenizer

# transformers' PaliGemmaProcessor, at every call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

Serve = Callable[..., Server]
RATE = 16_000


def as_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(width: int, height: int, kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, kind, **options)
    return buffer.getvalue()


def only_a_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))

    head = struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"")


def sound(seconds: float, rate: int = RATE, channels: int = 1, kind: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros((int(seconds * rate), channels), dtype=np.int16), rate, format=kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:
    root = tmp_path_factory.mktemp("media")
    byte_tokenizer().save_pretrained(root / "lender")
    folders: dict[str, Path] = {"sees": save_paligemma(root / "sees"), "hears": save_qwen2_audio(root / "hears")}
    engine = {"threads": 1, "pack_linears": False}
    sees = {
        "loader": "model_loaders.examples.paligemma:load_model",
        "kwargs": {"model_name": str(folders["sees"]), "template_from": str(root / "lender")},
    }
    hears = {"loader": "model_loaders.auto:load_model", "kwargs": {"model_name": str(folders["hears"])}}
    limits = {"media_max_parts": 4, "media_max_pixels": 10_000, "media_max_samples": 100_000, "max_audio_seconds": 7}
    return serve([{"id": "sees", **sees, "engine": engine}, {"id": "hears", **hears, "engine": engine}], **limits)


def image_part(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": as_uri(data)}}


def sound_part(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def ask(server: Server, model: str, *parts: Any, route: str = "/v1/chat/completions/render") -> Any:
    """The answer to one message for each part, and a text."""
    text = {"type": "text", "text": "What?"}
    messages: list[Any] = []
    for part in parts:
        messages += [{"role": "user", "content": [part, text]}, {"role": "assistant", "content": "That."}]
    body = {"model": model, "messages": [*messages, {"role": "user", "content": "And?"}], "max_tokens": 1}
    return requests.post(server.url + route, json=body, timeout=60)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of what is decoded."""
    sizes: list[tuple[int, int]] = []
    decode = Image.Image.convert

    def convert(self: Image.Image, *args: Any, **kwargs: Any) -> Any:
        sizes.append(self.size)
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "convert", convert)
    return sizes


@pytest.mark.parametrize("last", ["PNG", "header", "WEBP", "GIF", "BMP", "JPEG", "TIFF"])
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
def test_pixels_of_a_request(server: Server, decoded: list[Any], last: str, route: str) -> None:
    """Each image alone is small enough, and those before the one that is too much are not decoded."""
    first, second = picture(80, 90), only_a_header(60, 60) if last == "header" else picture(60, 60, last)
    decoded.clear()
    error = ask(server, "sees", image_part(first), image_part(second), route=route).json()["error"]
    assert error["param"] == "messages[2].content[0].image_url"
    assert error["code"] == "invalid_image"
    for said in ("60 x 60", "10800", "10000", "media_max_pixels"):
        assert said in error["message"]
    assert decoded == []


def test_what_is_within_the_budget_is_read(server: Server, decoded: list[Any]) -> None:
    answer = ask(server, "sees", image_part(picture(90, 80)), route="/v1/chat/completions")
    assert answer.status_code == 200, answer.text
    assert (90, 80) in decoded


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([sound(4), sound(4)], "max_audio_seconds"),
        ([sound(1, rate=48_000), sound(1, rate=48_000, channels=2)], "media_max_samples"),
        ([sound(1, rate=1_000, kind="FLAC"), sound(3, channels=8, kind="FLAC")], "media_max_samples"),
        ([sound(4, kind="OGG"), sound(4, kind="MP3")], "max_audio_seconds"),
    ],
)
def test_sound_of_a_request(server: Server, monkeypatch: pytest.MonkeyPatch, parts: list[bytes], said: str) -> None:
    def read(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    error = ask(server, "hears", *map(sound_part, parts)).json()["error"]
    assert error["param"] == "messages[2].content[0].input_audio"
    assert error["code"] == "audio_too_long"
    assert said in error["message"]


def test_parts_of_a_request(server: Server, decoded: list[Any]) -> None:
    parts = [image_part(picture(2, 2))] * 5
    error = ask(server, "sees", *parts).json()["error"]
    assert error["param"] == "messages[8].content[0].image_url"
    for said in ("has 5 images", "at most 4", "media_max_parts"):
        assert said in error["message"]
    assert decoded == []
    assert ask(server, "hears", *[sound_part(sound(0.1))] * 5).json()["error"]["param"].startswith("messages[8]")


def test_the_one_too_many_in_the_order_of_the_conversation() -> None:
    limits = MediaLimits(parts=1)
    with pytest.raises(BadRequest) as caught:
        limits.check_parts([MediaSource("", "a"), MediaSource("", "b"), MediaSource("", "c")])
    assert caught.value.param == "b"
    limits.check_parts([MediaSource("", "a")])


def test_an_animation_is_its_first_frame() -> None:
    """It counts what is decoded of it."""
    frames = [Image.new("RGB", (30, 30), (shade, 0, 0)) for shade in (10, 200, 90)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        source = MediaSource(as_uri(buffer.getvalue()), "image")
        (opened,) = open_images([source], max_pixels=900)
        assert decode_image(opened, source).size == (30, 30)
        with pytest.raises(BadRequest, match="media_max_pixels"):
            open_images([source] * 2, max_pixels=1799)


def test_one_image_has_a_limit_of_its_own() -> None:
    source = MediaSource(as_uri(only_a_header(9000, 9000)), "image")
    with pytest.raises(BadRequest, match=f"9000 x 9000 pixels.*{deployments.media.images.MAX_PIXELS}"):
        open_images([source], max_pixels=10**9)


def test_samples_are_counted_again_as_they_are_read() -> None:
    """A header may say less than there is."""
    source = MediaSource(base64.b64encode(sound(4, kind="FLAC")).decode(), "audio")
    check_headers([source], max_seconds=7, max_samples=10**6)
    budget = AudioBudget(7, 10**6)
    assert len(decode_source(source, RATE, max_seconds=7, budget=budget)) == 4 * RATE
    with pytest.raises(BadRequest, match="max_audio_seconds"):
        decode_source(source, RATE, max_seconds=7, budget=budget)
    with pytest.raises(BadRequest, match="media_max_samples"):
        decode_source(source, RATE, max_seconds=7, budget=AudioBudget(7, RATE))


def test_a_file_of_a_transcription_has_the_same_limits() -> None:
    assert len(decode_audio(sound(2), RATE, max_seconds=7, max_samples=2 * RATE, param="file")) == 2 * RATE
    with pytest.raises(BadRequest, match="media_max_samples"):
        decode_audio(sound(2, channels=2), RATE, max_seconds=7, max_samples=2 * RATE, param="file")


def test_a_header_that_promises_too_much_is_what_the_file_has() -> None:
    """A WAV as a recorder leaves it that was cut off."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(bytes(2 * RATE))
    data = bytearray(buffer.getvalue())
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(decode_audio(bytes(data), RATE, max_seconds=2, param="file")) == RATE


def predicate(*parts: Any) -> dict[str, Any]:
    """A question about what it shows itself."""
    return {"type": "predicate", "instructions": [*parts, {"type": "input_text", "text": "It is so."}]}


def decide(server: Server, model: str, shown: list[Any], questions: list[Any]) -> requests.Response:
    text = {"type": "input_text", "text": "See."}
    body = {"model": model, "input": [{"role": "user", "content": [*shown, text]}], "questions": questions}
    return requests.post(f"{server.url}/v1/decisions", json=body, timeout=60)


def test_questions_share_what_is_decoded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The input is decoded once for all questions, and counts once; a question's own image counts, too."""
    shown, own, other = image_part(picture(90, 50)), image_part(picture(40, 30)), image_part(picture(30, 40))
    questions = [predicate(), predicate(own), predicate(other), predicate(TEXT, own), predicate(own)]
    sizes: list[tuple[int, int]] = []
    prepare = ImageFile.ImageFile.load_prepare

    def counted(image: ImageFile.ImageFile) -> None:
        sizes.append(image.size)
        prepare(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", counted)
    answer = decide(server, "sees", [shown], questions)
    assert answer.status_code == 200, answer.text
    assert sorted(sizes) == [(30, 40), (40, 30), (40, 30), (90, 50)]
    alone = [decide(server, "sees", [shown], [question]).json()["answers"][0] for question in questions]
    assert [each["probability"] for each in answer.json()["answers"]] == pytest.approx(
        [each["probability"] for each in alone], abs=1e-4
    )


def test_questions_share_what_is_heard(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = []
    read = soundfile.SoundFile.read

    def counted(file: soundfile.SoundFile, *args: Any, **kwargs: Any) -> Any:
        block = read(file, *args, **kwargs)
        heard.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    answer = decide(server, "hears", [sound_part(sound(4))], [predicate()] * 3)
    assert answer.status_code == 200, answer.text
    assert sum(heard) == 4 * RATE


TEXT = {"type": "input_text", "text": "See:"}


@pytest.mark.parametrize(
    ("questions", "param", "said"),
    [
        ([[picture(70, 80)], [TEXT, picture(50, 90)]], "questions[1].instructions[1].image_url", "media_max_pixels"),
        ([[picture(20, 20)], [TEXT, b"no image"]], "questions[1].instructions[1].image_url", "not a readable image"),
        ([[b"no image"], [b"neither"]], "questions", "questions[0].instructions[0].image_url or questions[1]."),
        ([[picture(n, n)] for n in range(2, 7)], "questions", "media_max_parts"),
    ],
)
def test_media_of_questions_are_counted_together(
    server: Server, decoded: list[tuple[int, int]], questions: list[list[Any]], param: str, said: str
) -> None:
    decoded.clear()
    parts = [[image_part(part) if isinstance(part, bytes) else part for part in own] for own in questions]
    error = decide(server, "sees", [], [predicate(*own) for own in parts]).json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert decoded == []


def test_media_of_questions_are_fetched(server: Server) -> None:
    """As those of the input are; here no server allows it."""
    part = {"type": "input_image", "image_url": "http://127.0.0.1:9/a.png"}
    error = decide(server, "sees", [], [predicate(), predicate(part)]).json()["error"]
    assert error["param"] == "questions[1].instructions[0].image_url"
