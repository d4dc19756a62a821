"""What Prometheus sees of the models of one process; docs/grafana.json draws it."""

from __future__ import annotations

import logging
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.core.calls import Call
from deployments.core.events import Delta, Event, Failed, Finished, Usage
from deployments.host.metrics.meters import Meters

logger = logging.getLogger("troupe.requests")

_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 180, 600]
_GAUGES = {
    "sequences": ("troupe_rows", "Choices being computed."),
    "waiting": ("troupe_waiting", "Choices that wait for a place in the batch."),
    "cache_bytes": ("troupe_cache_bytes", "Bytes of KV caches and states of running sequences."),
    "prefix_bytes": ("troupe_prefix_bytes", "Bytes of the prefix cache."),
    "budget_bytes": ("troupe_budget_bytes", "Bytes that caches may use."),
}
"""By figure of a model in a snapshot: the metric, and what it says."""


class Observation:
    """What has been seen of a call.

    Args:
        on_first: called with the seconds until the first token.

    Attributes:
        began, first: by `time.monotonic()`, the call and its first token; 0 is none yet.
        tokens: generated ones.
        outcome: "cancelled" until another end is seen.
        usage: of a call that has finished.
    """

    def __init__(self, on_first: Callable[[float], None]) -> None:
        self._on_first = on_first
        self.began = time.monotonic()
        self.first = 0.0
        self.tokens = 0
        self.outcome = "cancelled"
        self.usage: Usage | None = None

    def add(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, Delta) and event.token_ids:
            self.tokens += len(event.token_ids)
            if not self.first:
                self.first = time.monotonic()
                self._on_first(self.first - self.began)
        elif isinstance(event, Finished):
            self.outcome, self.usage = "ok", event.usage
        elif isinstance(event, Failed):
            self.outcome = event.error.code or "error"


class HostMetrics:
    """The metrics of one process.

    Args:
        meters: makes what counts.
    """

    def __init__(self, meters: Meters) -> None:
        by_model = ("model",)
        self._requests = meters.counter(
            "troupe_requests", "Requests by outcome: ok, cancelled, or an error's code.", ("model", "outcome")
        )
        self._prompt = meters.counter("troupe_prompt_tokens", "Prompt tokens.", by_model)
        self._cached = meters.counter("troupe_cached_tokens", "Prompt tokens taken from the prefix cache.", by_model)
        self._generated = meters.counter("troupe_generated_tokens", "Generated tokens.", by_model)
        self._first = meters.histogram(
            "troupe_time_to_first_token_seconds", "From a streaming request to its first token.", by_model, _SECONDS
        )
        self._between = meters.histogram(
            "troupe_inter_token_seconds", "Seconds per token after the first, of streams.", by_model,
            [0.001, 0.002, *_SECONDS],
        )  # fmt: skip
        self._total = meters.histogram("troupe_request_seconds", "From a request to its end.", by_model, _SECONDS)
        self._gauges = {figure: meters.gauge(metric, text, by_model) for figure, (metric, text) in _GAUGES.items()}
        self._loaded = meters.gauge("troupe_model_loaded", "1 while a model is loaded.", by_model)
        self._queue = meters.gauge("troupe_waiting_for_model", "Requests whose model is not loaded yet.", ())
        self._counters = {
            "loads": meters.counter("troupe_model_loads", "Loads begun.", ()),
            "load_failures": meters.counter("troupe_model_load_failures", "Loads that failed.", ()),
            "evictions": meters.counter("troupe_model_evictions", "Models unloaded.", ()),
        }
        self._seen: Tally[str] = Tally()
        self._models: set[str] = set()

    @contextmanager
    def observed(self, call: Call) -> Iterator[Observation]:
        """A call while it runs, to be shown its events; counted, and a line in the log, when it ends."""
        tags = {"model": call.model}
        seen = Observation(lambda seconds: self._first.observe(seconds, tags))
        try:
            yield seen
        finally:
            now = time.monotonic()
            self._requests.inc(1, {**tags, "outcome": seen.outcome})
            self._total.observe(now - seen.began, tags)
            if seen.tokens > 1 and now > seen.first:
                self._between.observe((now - seen.first) / (seen.tokens - 1), tags)
            if seen.usage is not None:
                self._count(seen.usage, tags)
            _log(call, seen, now)

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
            for figure, gauge in self._gauges.items():
                gauge.set(model[figure], {"model": key})
        self._queue.set(snapshot["waiting"])
        for name, counter in self._counters.items():
            if (new := snapshot[name] - self._seen[name]) > 0:
                counter.inc(new)
                self._seen[name] = snapshot[name]

    def _count(self, usage: Usage, tags: dict[str, str]) -> None:
        for counter, tokens in (
            (self._prompt, usage.prompt_tokens),
            (self._cached, usage.cached_tokens),
            (self._generated, usage.completion_tokens),
        ):
            if tokens:
                counter.inc(tokens, tags)


def _log(call: Call, seen: Observation, now: float) -> None:
    """One line for a call, its figures also as fields of their own for logs in JSON."""
    figures = {
        "call": call.request_id,
        "model": call.model,
        "outcome": seen.outcome,
        "tokens": seen.tokens,
        "seconds": round(now - seen.began, 4),
    }
    if seen.first:
        figures["first_token"] = round(seen.first - seen.began, 4)
    logger.info(" ".join(f"{name}=%s" for name in figures), *figures.values(), extra=figures)
