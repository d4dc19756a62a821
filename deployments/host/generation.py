"""One generation call on its way through an engine: choices out, events back."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams
from deployments.core.events import Accepted, Delta, EngineEvent, Event, Failed, Finished, PromptScores, Timings, Usage
from deployments.engine.base.event_queue import EventQueue, merge_deltas
from deployments.engine.base.protocol import Engine, EngineRequest

if TYPE_CHECKING:
    from deployments.host.loaded_model import EncodedPrompt


class Generation:
    """The choices of a call, their events merged into one stream.

    Args:
        call: the request.
        prompts: its prompts, encoded.
        texts: the prompts' texts; with `echo` each is there.
        interval: seconds between two deltas of a stream, the first excepted.
        max_model_len: what `Accepted` tells of the model.
        started: by `time.monotonic()`, to report timings from; None reports none.
    """

    def __init__(
        self,
        call: GenerateCall,
        prompts: Sequence[EncodedPrompt],
        texts: Sequence[str | None],
        *,
        interval: float,
        max_model_len: int,
        started: float | None = None,
    ) -> None:
        self.call = call
        self._prompts = prompts
        self._texts = texts
        self._interval = interval if call.stream else None
        self._max_model_len = max_model_len
        self._per_prompt = max(call.n, call.best_of or 0)
        self._inbox = EventQueue()
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._cancelled = False
        self._requests: list[EngineRequest] = []
        self._completion_tokens = 0
        self._reasoning_tokens = 0
        self._started = started
        self._first_token = 0.0
        self._cached: dict[int, int] = {}

    def requests_for(self, prompt: EncodedPrompt, max_tokens: int) -> list[EngineRequest]:
        """The engine requests that answer one prompt; their order over all prompts is that of the choices."""
        first = len(self._requests)
        markers = self.call.reasoning
        asked = self.call.prompts[first // self._per_prompt]
        continued = isinstance(asked, ChatPrompt) and asked.continue_final_message
        if markers is not None and markers.closed_by(prompt.text, continued=continued):
            markers = None
        opened = markers is not None and markers.opened_by(prompt.text, continued=continued)
        continues = continued or not isinstance(asked, ChatPrompt)
        for j in range(self._per_prompt):
            self._requests.append(
                EngineRequest(
                    request_id=f"{self.call.request_id}#{first + j}",
                    input_ids=prompt.encoded.input_ids,
                    sampling=self._sampling(j, max_tokens),
                    model_inputs=prompt.encoded.model_inputs,
                    content_key=prompt.encoded.content_key,
                    prompt_text=prompt.text,
                    continues=continues,
                    reasoning=markers,
                    reasoning_opened=opened,
                )
            )
        return self._requests[first:]

    def submit(self, engine: Engine, requests: Sequence[EngineRequest], first: int = 0) -> None:
        """Queue choices, in any thread; none after `cancel`. A TroupeError of any of them is the call's.

        Args:
            first: the number of the first one.
        """
        for choice, request in enumerate(requests, first):
            with self._lock:
                if self._cancelled:
                    return
                self._running.add(choice)
                engine.submit(request, self._inbox.emitter(choice))

    def cancel(self, engine: Engine) -> None:
        """Drop the choices that have not ended."""
        with self._lock:
            self._cancelled = True
        for choice in self._running:
            engine.cancel(self._requests[choice].request_id)
        self._running.clear()

    async def events(self) -> AsyncGenerator[Event, None]:
        """`Accepted`, then what the choices give, then `Finished`; or `Failed`."""
        yield Accepted(
            prompt_token_ids=tuple(tuple(prompt.encoded.input_ids) for prompt in self._prompts),
            prompt_texts=tuple(self._texts),
            max_model_len=self._max_model_len,
        )
        ranked = self._per_prompt > self.call.n
        source = self._best(self._batches()) if ranked else self._batches()
        async with aclosing(source):
            async for batch in source:
                for event in batch:
                    yield event
                    if isinstance(event, Failed):
                        return
        prompt_tokens = sum(len(prompt.encoded.input_ids) for prompt in self._prompts)
        cached = sum(min(self._cached.get(i * self._per_prompt, 0), prompt_tokens) for i in range(len(self._prompts)))
        yield Finished(
            usage=Usage(
                prompt_tokens=prompt_tokens,
                completion_tokens=self._completion_tokens,
                reasoning_tokens=self._reasoning_tokens,
                cached_tokens=cached,
                timings=self._timings(),
            )
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

    async def _batches(self) -> AsyncGenerator[list[Event], None]:
        """Batches of events: as they come, then at most one per interval; all at the end if not streaming."""
        held: dict[int, list[Delta]] = defaultdict(list)
        if self.call.echo:
            for choice in self._running:
                held[choice].append(Delta(text=self._texts[choice // self._per_prompt] or ""))
        due = 0.0
        while self._running:
            events: list[Event] = []
            for choice, event in await self._inbox.take(not_before=due):
                if isinstance(event, Failed):
                    # A stream that has begun shows all it had; one that has shown nothing can be sent once more.
                    yield [*events, *_merged(held), event] if due and self._interval is not None else [event]
                    return
                events.extend(self._receive(choice, event, held))
            if self._interval is None and self._running:
                if events:
                    yield events
                continue
            due = time.monotonic() + (self._interval or 0)
            yield [*events, *_merged(held)]
            held.clear()

    def _receive(self, choice: int, event: EngineEvent, held: dict[int, list[Delta]]) -> list[Event]:
        """Count an event; deltas are held for merging, prompt scores are returned for every choice of the prompt."""
        if isinstance(event, PromptScores):
            siblings = range(choice, choice + self._per_prompt)
            return [replace(event, choice=sibling) for sibling in siblings]
        assert isinstance(event, Delta)
        held[choice].append(event)
        if not self._first_token and event.token_ids:
            self._first_token = time.monotonic()
        self._completion_tokens += len(event.token_ids)
        self._reasoning_tokens += event.reasoning_tokens
        self._cached[choice] = max(self._cached.get(choice, 0), event.cached_tokens)
        if event.finish_reason is not None:
            self._running.discard(choice)
        return []

    async def _best(self, batches: AsyncGenerator[list[Event], None]) -> AsyncGenerator[list[Event], None]:
        """The `n` likeliest of `best_of` choices per prompt, renumbered."""
        deltas: dict[int, list[Delta]] = defaultdict(list)
        scores: dict[int, PromptScores] = {}
        async for batch in batches:
            for event in batch:
                if isinstance(event, Failed):
                    yield [event]
                    return
                if isinstance(event, PromptScores):
                    scores[event.choice] = event
                if isinstance(event, Delta):
                    deltas[event.choice].append(event)
        chosen: list[Event] = []
        for i in range(len(self._prompts)):
            candidates = range(i * self._per_prompt, (i + 1) * self._per_prompt)
            merged = {choice: merge_deltas(choice, deltas[choice]) for choice in candidates}
            ranking = sorted(candidates, key=lambda choice: _mean_logprob(merged[choice]), reverse=True)
            for j, choice in enumerate(ranking[: self.call.n]):
                index = i * self.call.n + j
                if choice in scores:
                    chosen.append(replace(scores[choice], choice=index))
                logprobs = merged[choice].logprobs if self.call.sampling.logprobs is not None else None
                chosen.append(replace(merged[choice], choice=index, logprobs=logprobs))
        yield chosen

    def _sampling(self, j: int, max_tokens: int) -> SamplingParams:
        asked = self.call.sampling
        return replace(
            asked,
            max_tokens=max_tokens,
            beam_rank=j if asked.num_beams > 1 else 0,
            seed=None if asked.seed is None else asked.seed + j,
            prompt_logprobs=asked.prompt_logprobs if j == 0 else None,
            logprobs=0 if asked.logprobs is None and self._per_prompt > self.call.n else asked.logprobs,
        )


def _merged(held: Mapping[int, Sequence[Delta]]) -> list[Delta]:
    """The deltas of each choice as one."""
    return [merge_deltas(choice, deltas) for choice, deltas in held.items()]


def _mean_logprob(delta: Delta) -> float:
    """OpenAI's criterion for best_of: the highest log-probability per token."""
    entries = delta.logprobs or ()
    return sum(entry.logprob for entry in entries) / max(len(entries), 1)
