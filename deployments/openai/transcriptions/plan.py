"""From a recording and what is asked about it to the call."""

from __future__ import annotations

from typing import Literal
from uuid import uuid4

from deployments.config.api import ApiOptions
from deployments.core.calls import SamplingParams, TranscribeCall
from deployments.core.errors import BadRequest
from deployments.core.model_card import ModelCard
from deployments.openai.transcriptions.schema import TranscriptionBody, TranslationBody

Task = Literal["transcribe", "translate"]


def transcription_plan(body: TranslationBody, card: ModelCard, options: ApiOptions, task: Task) -> TranscribeCall:
    """What the model is asked.

    Raises:
        BadRequest: fields do not go with each other.
    """
    wanted: list[str] = []
    logprobs = False
    if isinstance(body, TranscriptionBody):
        _check(body)
        wanted, logprobs = list(body.timestamp_granularities), "logprobs" in body.include
    detailed = body.response_format == "verbose_json" and ("segment" in wanted or not wanted)
    return TranscribeCall(
        request_id=f"trsc-{uuid4().hex}",
        model=card.id,
        audio=body.file,
        task=task,
        language=body.language,
        prompt=body.prompt,
        segments=body.response_format in ("srt", "vtt") or detailed,
        words="word" in wanted,
        logprobs=logprobs,
        sampling=_sampling(body),
        max_seconds=options.max_audio_seconds,
        max_samples=options.media_max_samples,
        stream=body.stream,
    )


def _check(body: TranscriptionBody) -> None:
    if body.timestamp_granularities and body.response_format != "verbose_json":
        raise BadRequest(
            f"Invalid 'timestamp_granularities': it needs response_format verbose_json; got {body.response_format}.",
            param="timestamp_granularities",
        )
    if body.include and body.response_format != "json":
        raise BadRequest(
            f"Invalid 'include': logprobs need response_format json; got {body.response_format}.", param="include"
        )


def _sampling(body: TranslationBody) -> SamplingParams:
    return SamplingParams(
        max_tokens=body.max_completion_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        seed=body.seed,
    )
