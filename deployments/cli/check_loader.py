"""`troupe check`: load a model, and pass one message through its hooks and its engine."""

from __future__ import annotations

import asyncio
import io
import logging
import math
import sys
import time
import wave
from typing import Any

import yaml

from deployments.config.app import parse_args
from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, TextPrompt, TranscribeCall
from deployments.core.client import EmbedOptions
from deployments.core.errors import ConfigError, TemplateFailed, TroupeError
from deployments.core.events import Delta, Failed, Finished
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment
from deployments.engine.no_text import NoTextEngine
from deployments.host.host import ModelHost

_ID = "model"
_RATE = 16_000


async def check(loader: str, kwargs: dict[str, Any], *, message: str, max_tokens: int, device: str | None) -> None:
    """Print the result of each step for one message.

    Raises:
        TroupeError: a step failed; the error names it.
    """
    args = parse_args({"models": [{"id": _ID, "loader": loader, "kwargs": kwargs}]})
    host = ModelHost(args, device)
    try:
        started = time.monotonic()
        async with host.lease(_ID) as model:
            _say("loaded", f"{type(model.info.model).__name__} in {time.monotonic() - started:.1f} s on {host.device}")
            _say("engine", f"{model.engine.stats().kind}, {model.engine.max_model_len} positions")
            speech, gives_text = model.speech, not isinstance(model.engine, NoTextEngine)
        if speech is not None:
            _say("speech", f"windows of {speech.frames / 100:g} s; {', '.join(speech.languages) or 'English'}")
            await _transcribe(host, max_tokens)
            return
        if not gives_text:
            (vector,) = (await host.embed(_ID, [TextPrompt(text=message)], EmbedOptions())).vectors
            _say("embed", f"{len(vector) // 4} dimensions")
            return
        chat = ChatPrompt(messages=[{"role": "user", "content": message}])
        try:
            rendered = await host.render(_ID, chat)
            prompt: ChatPrompt | TextPrompt = chat
            _say("template", repr(rendered.text))
        except TemplateFailed as error:
            _say("template", f"none: {error}")
            prompt = TextPrompt(text=message)
            rendered = await host.render(_ID, prompt)
        _say("encode", f"{len(rendered.token_ids)} ids: {list(rendered.token_ids[:16])}")
        _say("decode", repr(await host.detokenize(_ID, rendered.token_ids)))
        await _generate(host, prompt, max_tokens)
    finally:
        await host.close()


async def _generate(host: ModelHost, prompt: ChatPrompt | TextPrompt, max_tokens: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    call = GenerateCall(request_id="check", model=_ID, prompts=(prompt,), sampling=sampling)
    started = time.monotonic()
    async for event in host.generate(call):
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Delta):
            seconds = time.monotonic() - started
            _say("generate", repr(event.text))
            _say("", f"{len(event.token_ids)} tokens in {seconds:.2f} s, finish_reason {event.finish_reason}")


async def _transcribe(host: ModelHost, max_tokens: int) -> None:
    """Transcribe two seconds of a tone with a Whisper model."""
    audio = io.BytesIO()
    with wave.open(audio, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        tone = (round(8000 * math.sin(2 * math.pi * 440 * i / _RATE)) for i in range(2 * _RATE))
        file.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in tone))
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    call = TranscribeCall(request_id="check", model=_ID, audio=audio.getvalue(), sampling=sampling)
    started = time.monotonic()
    async for event in host.generate(call):
        match event:
            case Failed():
                raise event.error
            case TranscriptionStarted():
                _say("hear", f"{event.duration:g} s of a tone, taken for {event.language}")
            case TranscriptSegment():
                _say("write", repr(event.text))
            case Finished():
                tokens, seconds = event.usage.completion_tokens, time.monotonic() - started
                _say("", f"{tokens} tokens in {seconds:.2f} s")


def _say(step: str, what: str) -> None:
    print(f"{step:9} {what}")


def run(loader: str, kwargs: str, *, message: str, max_tokens: int, device: str | None) -> None:
    """Print the result of each step. Ends the process with status 1 if one failed."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        asyncio.run(check(loader, yaml.safe_load(kwargs), message=message, max_tokens=max_tokens, device=device))
    except (ConfigError, TroupeError) as error:
        sys.exit(f"error     {error}")
