"""One generation call on its way through an engine: prompts in, choices out, their events merged."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from deployments.core.calls import ChatPrompt, GenerateCall, Prompt, SamplingParams, Turn
from deployments.core.errors import BadRequest, ContextOverflow, UnsupportedParameter
from deployments.core.events import (
    Accepted,
    Captured,
    Delta,
    EngineEvent,
    Event,
    Failed,
    Finished,
    PromptScores,
    Recorded,
    Timings,
    Usage,
)
from deployments.core.token_ids import TokenIds
from deployments.engine.base.admission import check_supported, room_after
from deployments.engine.base.event_queue import merge_deltas
from deployments.engine.base.protocol import Engine, EngineRequest, engine_encodes_prompts
from deployments.engine.base.running_requests import Interval, RunningRequests
from deployments.host.inside.capturing import Capturing, capturing, check_inside, with_vectors
from deployments.host.inspection import Inspection
from deployments.host.loaded_model import EncodedPrompt, LoadedModel
from deployments.host.worker import Worker

_AT_ONCE = 16
"""Choices that a call queues before other calls have their turn."""


class Generation:
    """The choices of a call, their events merged.

    Args:
        call: the request.
        prompts: its prompts, encoded.
        texts: the prompts' texts; with `echo` each is there.
        interval: gives the seconds between two batches of a stream's events, the first excepted.
        started: by `time.monotonic()`, to report timings from; None reports none.
        fingerprint: of the model, for `Accepted`.
        inspection: is shown every event.
        capturing: makes files of what is captured.

    Attributes:
        accepted: the event that comes before all others.
        ended: `take` has given the last event.
    """

    def __init__(
        self,
        engine: Engine,
        call: GenerateCall,
        prompts: list[EncodedPrompt],
        texts: Sequence[str | None],
        *,
        interval: Interval,
        started: float | None = None,
        fingerprint: str = "",
        answers: Mapping[str, Any] | None = None,
        inspection: Inspection | None = None,
        capturing: Capturing | None = None,
    ) -> None:
        self.accepted = Accepted(
            prompt_token_ids=tuple(TokenIds(prompt.encoded.input_ids) for prompt in prompts),
            prompt_texts=tuple(texts),
            max_model_len=engine.max_model_len,
            fingerprint=fingerprint,
            answers=answers,
        )
        self.ended = False
        self._encoded = engine_encodes_prompts(engine)
        self._call = call
        self._prompts = prompts
        self._inspection = inspection
        self._capturing = capturing
        if inspection is not None and capturing is not None:
            inspection.captured = capturing.seen
        self._per_prompt = max(call.n, call.best_of or 0)
        self._ranked = self._per_prompt > call.n
        self._streams = call.stream and not self._ranked
        # The time of the first token is seen only if events are taken as they come.
        self._running = RunningRequests(
            engine, interval=interval if self._streams else None if started is None else lambda: 0.0
        )
        self._held: dict[int, list[Delta]] = defaultdict(list)
        if call.echo:
            for choice in range(len(prompts) * self._per_prompt):
                self._held[choice].append(Delta(text=texts[choice // self._per_prompt] or ""))
        self._shown = False
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._started = started
        self._first_token = 0.0
        self._cached: dict[int, int] = {}

    @classmethod
    async def start(cls, model: LoadedModel, call: GenerateCall, *, interval: Interval, started: float) -> Generation:
        """Encode a call's prompts and queue its choices in the model's engine.

        Raises:
            TroupeError: the model or its engine cannot answer the call.
        """
        model.check_text()
        check_supported(call.sampling, model.engine.supports)
        check_inside(model, call.sampling)
        call = replace(call, sampling=with_vectors(call.sampling, model.captures))
        prompts = await _encoded(model, call)
        generation = cls(
            model.engine,
            call,
            prompts,
            await _texts(model, call, prompts),
            interval=interval,
            started=started if model.entry.api.usage_timings else None,
            fingerprint=model.fingerprint,
            answers=model.answers,
            inspection=Inspection(model.info, call, prompts) if model.info.done_callback else None,
            capturing=capturing(model, call),
        )
        try:
            await generation.submit(model.submitting)
        except BaseException:
            generation.close()
            raise
        return generation

    async def submit(self, worker: Worker) -> None:
        """Queue the choices in a worker's thread: a thousand of them may each have a million ids to check.

        Calls that are queued at the same time take turns.

        Raises:
            BadRequest: a prompt is empty.
            ContextOverflow: a prompt leaves no room.
            TroupeError: the engine refuses a choice.
        """
        requests = self._requests()
        if self._capturing is not None:
            every = await worker.run(lambda: list(requests))
            await self._capturing.reserve(every, worker.run)
            requests = iter(every)
        while await worker.run(lambda: self._running.submit(islice(requests, _AT_ONCE))) == _AT_ONCE:
            pass

    async def take(self) -> list[Event]:
        """The next events; the last of them all is `Finished` or `Failed`."""
        events = await self._next()
        failed = bool(events) and isinstance(events[-1], Failed)
        if self._ranked and not failed:
            events = self._best(events)
        if self._inspection is not None:
            for event in events:
                if (call_back := self._inspection.ended(event)) is not None:
                    await asyncio.to_thread(call_back)
        self.ended = failed or not self._running
        if self._capturing is not None and self.ended and not failed:
            self._capturing.finish()
        return [*events, Finished(usage=self._usage())] if self.ended and not failed else events

    def close(self) -> None:
        """Cancel the choices that have not ended."""
        self._running.close()
        if self._capturing is not None:
            self._capturing.close()

    def _requests(self) -> Iterator[EngineRequest]:
        """What the engine is asked for, in the order of the choices; see `_budget` for its errors."""
        limit = self.accepted.max_model_len
        lengths = map(len, self.accepted.prompt_token_ids)
        budgets = [_budget(self._call, length, limit, encoded=self._encoded) for length in lengths]
        for i, budget in enumerate(budgets):
            request = self._request(self._call.prompts[i], self._prompts[i])
            for j in range(self._per_prompt):
                choice, sampling = i * self._per_prompt + j, self._sampling(j, budget)
                yield replace(
                    request,
                    request_id=f"{self._call.request_id}#{choice}",
                    turn=self._turn(choice),
                    sampling=sampling if self._capturing is None else self._capturing.sampling(sampling, choice),
                    inspect=None if self._capturing is None else self._capturing.shown,
                )

    def _turn(self, choice: int) -> Turn:
        """When a choice begins: the choices that are queued at once are one turn."""
        if len(self._prompts) * self._per_prompt == 1:
            return self._call.turn
        return replace(self._call.turn, group=f"{self._call.request_id}/{choice // _AT_ONCE}")

    def _request(self, asked: Prompt, prompt: EncodedPrompt) -> EngineRequest:
        """What the choices of a prompt have in common."""
        markers = self._call.reasoning
        continued = isinstance(asked, ChatPrompt) and asked.continue_final_message
        if markers is not None and markers.closed_by(prompt.text, continued=continued):
            markers = None
        return EngineRequest(
            request_id=self._call.request_id,
            input_ids=prompt.encoded.input_ids,
            sampling=self._call.sampling,
            model_inputs=prompt.encoded.model_inputs,
            content_key=prompt.encoded.content_key,
            prompt_text=prompt.text,
            continues=continued or not isinstance(asked, ChatPrompt),
            reasoning=markers,
            reasoning_opened=markers is not None and markers.opened_by(prompt.text, continued=continued),
        )

    def _sampling(self, j: int, max_tokens: int) -> SamplingParams:
        asked = self._call.sampling
        return replace(
            asked,
            max_tokens=max_tokens,
            beam_rank=j if asked.num_beams > 1 else 0,
            seed=None if asked.seed is None else asked.seed + j,
            prompt_logprobs=asked.prompt_logprobs if j == 0 else None,
            logprobs=0 if asked.logprobs is None and self._ranked else asked.logprobs,
        )

    async def _next(self) -> list[Event]:
        """What has come since the last time; of a call that does not stream, all of it once it is complete."""
        events: list[Event] = []
        while self._running:
            for choice, event in await self._running.take():
                if isinstance(event, Failed):
                    # A stream that has begun shows all it had; one that has shown nothing can be sent once more.
                    return [*events, *self._merged(), event] if self._shown else [event]
                if isinstance(event, Recorded):
                    assert self._capturing is not None
                    events.extend(await self._capturing.take(choice, event.recording))
                else:
                    events.extend(self._receive(choice, event))
            if self._streams:
                break
        self._shown = True
        return [*events, *self._merged()]

    def _receive(self, choice: int, event: EngineEvent) -> list[Event]:
        """Count an event; deltas are held for merging, prompt scores are returned for every choice of the prompt."""
        if isinstance(event, PromptScores):
            siblings = range(choice, choice + self._per_prompt)
            return [replace(event, choice=sibling) for sibling in siblings]
        assert isinstance(event, Delta)
        self._held[choice].append(event)
        if not self._first_token and event.token_ids:
            self._first_token = time.monotonic()
        self._completion_tokens += len(event.token_ids)
        self._reasoning_tokens += event.reasoning_tokens
        self._cached[choice] = max(self._cached.get(choice, 0), event.cached_tokens)
        return []

    def _merged(self) -> list[Delta]:
        """The deltas that were held, those of each choice as one."""
        held, self._held = self._held, defaultdict(list)
        return [merge_deltas(choice, deltas) for choice, deltas in held.items()]

    def _best(self, events: Sequence[Event]) -> list[Event]:
        """The events of the `n` most likely of `best_of` choices per prompt, renumbered."""
        scores = {event.choice: event for event in events if isinstance(event, PromptScores)}
        deltas = {event.choice: event for event in events if isinstance(event, Delta)}
        captured = {event.choice: event for event in events if isinstance(event, Captured)}
        chosen: list[Event] = []
        for i in range(len(self._prompts)):
            candidates = [deltas[i * self._per_prompt + j] for j in range(self._per_prompt)]
            candidates.sort(key=_mean_logprob, reverse=True)
            for loser in candidates[self._call.n :]:
                if self._capturing is not None:
                    self._capturing.drop(loser.choice)
            for index, delta in enumerate(candidates[: self._call.n], i * self._call.n):
                if delta.choice in scores:
                    chosen.append(replace(scores[delta.choice], choice=index))
                if delta.choice in captured:
                    chosen.append(replace(captured[delta.choice], choice=index))
                logprobs = delta.logprobs if self._call.sampling.logprobs is not None else None
                chosen.append(replace(delta, choice=index, logprobs=logprobs))
        return chosen

    def _usage(self) -> Usage:
        prompt_tokens = sum(map(len, self.accepted.prompt_token_ids))
        cached = sum(min(self._cached.get(i * self._per_prompt, 0), prompt_tokens) for i in range(len(self._prompts)))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
            cached_tokens=cached,
            timings=self._timings(),
        )

    def _timings(self) -> Timings | None:
        if self._started is None:
            return None
        ended = time.monotonic()
        total = ended - self._started
        return Timings(
            time_to_first_token=round((self._first_token or ended) - self._started, 6),
            total_time=round(total, 6),
            tokens_per_second=round(self._completion_tokens / max(total, 1e-6), 3),
        )


async def _encoded(model: LoadedModel, call: GenerateCall) -> list[EncodedPrompt]:
    """The prompts of a call, cut to what it asks for.

    Raises:
        TroupeError: one cannot be encoded, or is too long.
    """
    keep = call.truncate_prompt
    prompts = await model.encode(call.prompts, fits=keep is None)
    if keep is None:
        return prompts
    if keep < 0:
        asked = call.sampling.max_tokens
        encoded = engine_encodes_prompts(model.engine)
        keep = max(1, room_after(1 if asked is None else asked, model.engine.max_model_len, encoded=encoded))
    return [await _truncated(model, prompt, keep) for prompt in prompts]


async def _texts(model: LoadedModel, call: GenerateCall, prompts: Sequence[EncodedPrompt]) -> list[str | None]:
    """The texts of prompts; those of token ids only for `echo`."""
    return [
        await model.decode(prompt.encoded.input_ids) if call.echo and prompt.text is None else prompt.text
        for prompt in prompts
    ]


async def _truncated(model: LoadedModel, prompt: EncodedPrompt, keep: int) -> EncodedPrompt:
    """A prompt's last `keep` tokens.

    Raises:
        UnsupportedParameter: the tokens stand for images or the like, which have no part that could be left out.
    """
    ids = prompt.encoded.input_ids
    if len(ids) <= keep:
        return prompt
    if prompt.encoded.model_inputs:
        raise UnsupportedParameter(
            "Only a prompt of nothing but text can be truncated; leave 'truncate_prompt_tokens' out.",
            param="truncate_prompt_tokens",
        )
    kept = ids[-keep:]
    text = None if prompt.text is None else await model.decode(kept)
    return EncodedPrompt(text=text, encoded=replace(prompt.encoded, input_ids=kept))


def _budget(call: GenerateCall, length: int, limit: int, *, encoded: bool) -> int:
    """How many tokens may be generated after a prompt: what was asked for, at most what is left.

    Args:
        length: of the prompt, in tokens.
        limit: of prompt and answer together.
        encoded: an encoder reads the prompt, so that the limit is that of each.

    Raises:
        BadRequest: the prompt is empty.
        ContextOverflow: the prompt leaves no room.
    """
    if length == 0:
        raise BadRequest(f"{call.prompt_param} is empty: nothing to continue.", param=call.prompt_param)
    asked = call.sampling.max_tokens
    left = room_after(length, limit, encoded=encoded)
    if length > limit or (left == 0 and asked != 0):
        raise ContextOverflow(limit, length, param=call.prompt_param)
    return left if asked is None else min(asked, left)


def _mean_logprob(delta: Delta) -> float:
    """OpenAI's criterion for best_of: the highest log-probability per token."""
    entries = delta.logprobs or ()
    return sum(entry.logprob for entry in entries) / max(len(entries), 1)
