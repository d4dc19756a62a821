"""What Prometheus sees of a replica, through Ray's metrics; docs/grafana.json draws it.

Every metric has Serve's tags `deployment`, `replica` and `application` besides its own. Ray exports them on every node
under the port given to `ray start --metrics-export-port`, with the prefix `ray_`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from deployments.core.events import Delta, Event, Failed, Finished

logger = logging.getLogger("troupe.requests")

_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180, 600]
_GAUGES = {
    "rows": "Choices being computed.",
    "waiting": "Choices that wait for a place in the batch.",
    "cache_bytes": "Bytes of KV caches and states of running sequences.",
    "prefix_bytes": "Bytes of the prefix cache.",
    "budget_bytes": "Bytes that caches may use.",
}


class ReplicaMetrics:
    """The metrics of one replica."""

    def __init__(self) -> None:
        by_model = ("model",)
        self._requests = Counter(
            "troupe_requests", description="Requests by outcome: ok, cancelled, or an error's code.",
            tag_keys=("model", "outcome"),
        )  # fmt: skip
        self._prompt = Counter("troupe_prompt_tokens", description="Prompt tokens.", tag_keys=by_model)
        self._cached = Counter(
            "troupe_cached_tokens", description="Prompt tokens taken from the prefix cache.", tag_keys=by_model
        )
        self._generated = Counter("troupe_generated_tokens", description="Generated tokens.", tag_keys=by_model)
        self._first = Histogram(
            "troupe_time_to_first_token_seconds", description="From a streaming request to its first token.",
            boundaries=_SECONDS, tag_keys=by_model,
        )  # fmt: skip
        self._between = Histogram(
            "troupe_inter_token_seconds", description="Seconds per token after the first, of streams.",
            boundaries=[0.001, 0.002, *_SECONDS], tag_keys=by_model,
        )  # fmt: skip
        self._total = Histogram(
            "troupe_request_seconds", description="From a request to its end.", boundaries=_SECONDS, tag_keys=by_model
        )
        self._gauges = {
            name: Gauge(f"troupe_{name}", description=text, tag_keys=by_model) for name, text in _GAUGES.items()
        }
        self._loaded = Gauge("troupe_model_loaded", description="1 while a model is loaded.", tag_keys=by_model)
        self._queue = Gauge("troupe_waiting_for_model", description="Requests whose model is not loaded yet.")
        self._counters = {
            "loads": Counter("troupe_model_loads", description="Loads begun."),
            "load_failures": Counter("troupe_model_load_failures", description="Loads that failed."),
            "evictions": Counter("troupe_model_evictions", description="Models unloaded."),
        }
        self._seen: Tally[str] = Tally()
        self._models: set[str] = set()

    async def observed(
        self, call_id: str, model: str, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[Event, None]:
        """The events of a call as they are, counted; a line in the log when it ends."""
        tags = {"model": model}
        began = time.monotonic()
        first, tokens, outcome = 0.0, 0, "cancelled"
        try:
            async for event in events:
                if isinstance(event, Delta) and event.token_ids:
                    tokens += len(event.token_ids)
                    if not first:
                        first = time.monotonic()
                        self._first.observe(first - began, tags)
                elif isinstance(event, Finished):
                    outcome = "ok"
                    self._count(event, tags)
                elif isinstance(event, Failed):
                    outcome = event.error.code or "error"
                yield event
        finally:
            now = time.monotonic()
            self._requests.inc(tags={**tags, "outcome": outcome})
            self._total.observe(now - began, tags)
            _log(call_id, model, outcome, tokens, seconds=now - began, first_token=first - began if first else None)
            if tokens > 1 and now > first:
                self._between.observe((now - first) / (tokens - 1), tags)

    def report(self, snapshot: dict[str, Any]) -> None:
        """Bring gauges and counters up to a host's snapshot."""
        models = {model["id"]: model for model in snapshot["models"]}
        for gone in self._models - set(models):
            self._loaded.set(0, {"model": gone})
            for gauge in self._gauges.values():
                gauge.set(0, {"model": gone})
        self._models = set(models)
        for key, model in models.items():
            self._loaded.set(1, {"model": key})
            for name, gauge in self._gauges.items():
                gauge.set(model[name], {"model": key})
        self._queue.set(snapshot["waiting"])
        for name, counter in self._counters.items():
            if (new := snapshot[name] - self._seen[name]) > 0:
                counter.inc(new)
                self._seen[name] = snapshot[name]

    def _count(self, event: Finished, tags: dict[str, str]) -> None:
        usage = event.usage
        for counter, tokens in (
            (self._prompt, usage.prompt_tokens),
            (self._cached, usage.cached_tokens),
            (self._generated, usage.completion_tokens),
        ):
            if tokens:
                counter.inc(tokens, tags)


def _log(call_id: str, model: str, outcome: str, tokens: int, *, seconds: float, first_token: float | None) -> None:
    """One line for a call, its figures also as fields of their own for logs in JSON."""
    figures = {"call": call_id, "model": model, "outcome": outcome, "tokens": tokens, "seconds": round(seconds, 4)}
    if first_token is not None:
        figures["first_token"] = round(first_token, 4)
    logger.info(" ".join(f"{name}=%s" for name in figures), *figures.values(), extra=figures)
