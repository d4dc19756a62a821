"""The record of one call: a line of JSON, and the events that it stands for."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from datetime import UTC, datetime
from typing import Any

from deployments.core.calls import Call, GenerateCall
from deployments.core.errors import TroupeError
from deployments.core.events import Accepted, Captured, Delta, Event, Failed, Finished, PromptScores, Timings, Usage
from deployments.core.json_text.writer import JsonWriter
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.core.token_ids import TokenIds
from deployments.core.transcript import TranscriptionStarted, TranscriptSegment

# What does not change an answer.
_ASIDE = {"request_id", "affinity", "blocks", "stream", "expect", "spec", "owner", "turn"}


class RecordLine:
    """The record of one call.

    Args:
        request: what to write of the request besides the call.
        whole: also write the log-probabilities that the answer reports, so that the line can answer the call again.
    """

    def __init__(self, call: Call, request: Mapping[str, Any], *, whole: bool = False) -> None:
        self._begun = time.monotonic()
        self._whole = whole
        self._seconds: dict[str, float] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": call.request_id,
            "model": call.model,
            "call": None,
            **request,
            # Vectors are megabytes, and stand in the request.
            "sampling": replace(call.sampling, capture=None, interventions=()),
            "fingerprint": None,
            "prompts": [],
            "usage": None,
            "error": None,
        }

    def add(self, event: Event) -> None:
        """Take note of an event of the answer."""
        match event:
            case Accepted():
                self._stamp("accepted")
                prompts = zip(event.prompt_texts, event.prompt_token_ids, strict=True)
                self._line["fingerprint"] = event.fingerprint
                self._line["prompts"] = [{"text": text, "token_ids": ids} for text, ids in prompts]
            case Delta():
                self._stamp("first")
                self._add(event)
            case PromptScores() if self._whole:
                self._choice(event.choice)["prompt_tokens"] = [None if t is None else _written(t) for t in event.scores]
            case Captured():
                self._line.setdefault("captures", []).append(event.handle["id"])
            case TranscriptionStarted():
                self._line["fingerprint"] = event.fingerprint
            case TranscriptSegment():
                self._stamp("first")
                self._add(Delta(text=event.text))
            case Failed():
                self._line["error"] = _error(event.error)
            case Finished():
                self._line["usage"] = asdict(event.usage)

    def finish(self) -> dict[str, Any]:
        """The whole line. A call with neither usage nor error was given up by its client."""
        self._stamp("finished")
        return {**self._line, "choices": list(self._choices.values()), "seconds": self._seconds}

    def _choice(self, index: int) -> dict[str, Any]:
        fresh = {"index": index, "text": "", "token_ids": [], "finish_reason": None, "stop_reason": None}
        return self._choices.setdefault(index, fresh)

    def _add(self, delta: Delta) -> None:
        choice = self._choice(delta.choice)
        choice["text"] += delta.text
        choice["token_ids"].extend(delta.token_ids)
        if delta.logprobs is not None:
            choice.setdefault("logprobs", []).extend(token.logprob for token in delta.logprobs)
            if self._whole:
                choice.setdefault("tokens", []).extend(map(_written, delta.logprobs))
        if delta.finish_reason is not None:
            choice["finish_reason"], choice["stop_reason"] = delta.finish_reason, delta.stop_reason

    def _stamp(self, name: str) -> None:
        self._seconds.setdefault(name, round(time.monotonic() - self._begun, 6))


def is_repeatable(call: Call) -> bool:
    """Whether the same model gives the same answer again: it is greedy, has a seed, or draws nothing."""
    if not isinstance(call, GenerateCall) or call.sampling.reports_vocabulary or call.sampling.capture is not None:
        return False
    sampling = call.sampling
    return sampling.temperature == 0 or sampling.seed is not None or sampling.max_tokens == 0


def call_digest(call: GenerateCall, fingerprint: str) -> str:
    """What a call and the model that answers it are, in 32 hex digits: equal calls have equal answers.

    Args:
        fingerprint: of the model.
    """
    asked = {each.name: getattr(call, each.name) for each in fields(call) if each.name not in _ASIDE}
    return hashlib.sha256(WRITER.data([fingerprint, asked])).hexdigest()[:32]


def events(line: Mapping[str, Any], call: GenerateCall) -> Iterator[Event] | None:
    """The answer that a line has; None if it is not whole."""
    choices, sampling = line["choices"], call.sampling
    if line["usage"] is None or line["error"] is not None or not choices:
        return None
    if any(choice["finish_reason"] is None for choice in choices):
        return None
    if sampling.logprobs is not None and not all("tokens" in choice or not choice["token_ids"] for choice in choices):
        return None
    if sampling.prompt_logprobs is not None and not all("prompt_tokens" in choice for choice in choices):
        return None
    return _events(line)


def _events(line: Mapping[str, Any]) -> Iterator[Event]:
    yield Accepted(
        prompt_token_ids=tuple(TokenIds(prompt["token_ids"]) for prompt in line["prompts"]),
        prompt_texts=tuple(prompt["text"] for prompt in line["prompts"]),
        fingerprint=line["fingerprint"],
    )
    for choice in line["choices"]:
        if "prompt_tokens" in choice:
            scores = tuple(None if each is None else _read(each) for each in choice["prompt_tokens"])
            yield PromptScores(choice=choice["index"], scores=scores)
        yield Delta(
            choice=choice["index"],
            text=choice["text"],
            token_ids=TokenIds(choice["token_ids"]),
            logprobs=tuple(map(_read, choice.get("tokens", ()))) if "logprobs" in choice else None,
            finish_reason=choice["finish_reason"],
            stop_reason=choice["stop_reason"],
        )
    usage = dict(line["usage"])
    timings = usage.pop("timings", None)
    yield Finished(usage=Usage(**usage, timings=None if timings is None else Timings(**timings)))


def _written(token: TokenLogprob) -> list[Any]:
    top = [[each.token_id, each.token, each.bytes.hex(), each.logprob] for each in token.top]
    return [token.token_id, token.token, token.bytes.hex(), token.logprob, token.rank, top]


def _read(written: Sequence[Any]) -> TokenLogprob:
    token_id, token, data, logprob, rank, top = written
    return TokenLogprob(
        token_id=token_id,
        token=token,
        bytes=bytes.fromhex(data),
        logprob=logprob,
        rank=rank,
        top=tuple(Candidate(i, text, bytes.fromhex(raw), value) for i, text, raw, value in top),
    )


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return dict(value) if isinstance(value, Mapping) else str(value)


def _error(error: TroupeError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "status": error.status}


WRITER = JsonWriter(nan=True, errors="backslashreplace", default=_plain)
