"""Checks of images, recordings and embeddings."""

from __future__ import annotations

import base64
import io
import math
import wave
from typing import Any

from PIL import Image

from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Subject, refusal, user
from deployments.core.calls import ChatPrompt, SamplingParams, TextPrompt, TranscribeCall
from deployments.core.client import EmbedOptions
from deployments.core.errors import TroupeError
from deployments.core.events import Failed, Finished
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment
from deployments.engine.no_text import NoTextEngine

_SIDE, _SECONDS, _RATE = 224, 2, 16_000
_TOKENS = 8


async def images(subject: Subject) -> Finding:
    """Whether a chat with an image is answered, and how many tokens the image has."""
    subject.need_text()
    if not subject.model.hooks.sees_images and subject.trial.image is None:
        raise NotApplicable("The model takes no images.")
    return await _shown(subject, _image_part(subject), subject.trial.image or f"A test image of {_SIDE} x {_SIDE}")


async def audio(subject: Subject) -> Finding:
    """Whether a recording is written down, or a chat with one answered."""
    if subject.model.speech is not None:
        return await _transcribed(subject)
    subject.need_text()
    if not subject.model.hooks.hears and subject.trial.audio is None:
        raise NotApplicable("The model takes no recordings.")
    data = base64.b64encode(_recording(subject)).decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    return await _shown(subject, part, subject.trial.audio or f"A tone of {_SECONDS} s")


async def embeddings(subject: Subject) -> Finding:
    """Whether a text gets a vector."""
    if subject.model.speech is not None:
        raise NotApplicable("The model turns recordings into text.")
    try:
        found = await subject.host.embed(subject.entry.id, [TextPrompt(text=subject.trial.message)], EmbedOptions())
    except TroupeError as error:
        if subject.info.embed is not None or isinstance(subject.model.engine, NoTextEngine):
            return fault("request-failed", f"A client of /v1/embeddings gets {refusal(error)}")
        raise NotApplicable(f"A client of /v1/embeddings gets {refusal(error)}") from error
    count = len(found.vectors[0]) // 4
    made = "the loader's embed hook" if subject.info.embed else _pooling(subject)
    return fine(f"{count} dimensions, by {made}.", dimensions=count, by=made)


async def image_prompts(subject: Subject) -> list[ChatPrompt]:
    """A chat with the image and the user's message; none if the model takes none, or fails on it."""
    if not subject.model.hooks.sees_images or subject.template_error is not None:
        return []
    try:
        prompt = _chat(subject, _image_part(subject))
        await subject.host.render(subject.entry.id, prompt)
    except TroupeError:
        return []
    return [prompt]


def _chat(subject: Subject, *parts: dict[str, Any]) -> ChatPrompt:
    return subject.chat([user([*parts, {"type": "text", "text": subject.trial.message}])])


async def _shown(subject: Subject, part: dict[str, Any], what: object) -> Finding:
    """The finding for a chat with an image or a recording."""
    try:
        prompt = _chat(subject, part)
        length, plain = [
            len((await subject.host.render(subject.entry.id, each)).token_ids) for each in (prompt, _chat(subject))
        ]
        answer = await subject.answer(prompt, max_tokens=_TOKENS)
    except TroupeError as error:
        return fault("media-failed", f"{what}: a client gets {refusal(error)}")
    figures = {"prompt_tokens": length, "tokens": length - plain}
    return fine(f"{what} adds {length - plain} tokens to the prompt.", repr(answer.text), **figures)


async def _transcribed(subject: Subject) -> Finding:
    """The finding for a recording that a Whisper model writes down."""
    speech = subject.model.speech
    assert speech is not None
    sampling = SamplingParams(temperature=0, max_tokens=subject.trial.max_tokens)
    call = TranscribeCall(
        request_id="check-audio", model=subject.entry.id, audio=_recording(subject), sampling=sampling
    )
    figures: dict[str, Any] = {"window_s": speech.frames / 100, "languages": list(speech.languages)}
    texts = []
    async for event in subject.host.generate(call):
        match event:
            case Failed(error):
                return fault("media-failed", f"A client of /v1/audio/transcriptions gets {refusal(error)}")
            case TranscriptionStarted():
                figures |= {"audio_s": event.duration, "language": event.language}
            case TranscriptSegment():
                texts.append(event.text)
            case Finished():
                figures["tokens"] = event.usage.completion_tokens
    text = f"{figures['audio_s']:g} s of sound, taken for {figures['language']}; windows of {figures['window_s']:g} s."
    return fine(text, repr("".join(texts)), **figures)


def _image_part(subject: Subject) -> dict[str, Any]:
    if subject.trial.image is not None:
        data = subject.trial.image.read_bytes()
    else:
        file = io.BytesIO()
        Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB").save(file, "PNG")
        data = file.getvalue()
    return {"type": "image_url", "image_url": {"url": f"data:;base64,{base64.b64encode(data).decode()}"}}


def _recording(subject: Subject) -> bytes:
    """The user's file, or a tone of 440 Hz as a wav file."""
    if subject.trial.audio is not None:
        return subject.trial.audio.read_bytes()
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        tone = (round(8000 * math.sin(2 * math.pi * 440 * i / _RATE)) for i in range(_SECONDS * _RATE))
        file.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in tone))
    return made.getvalue()


def _pooling(subject: Subject) -> str:
    chosen = subject.entry.api.pooling
    if chosen is not None:
        return f"the pooling {chosen}, as api.pooling says"
    return "the modules of its sentence-transformers folder" if subject.info.sentence_format else "pooled hidden states"
