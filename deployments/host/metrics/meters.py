"""What counts: counters, gauges and histograms, as Ray's metrics have them or as Prometheus reads them here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

PREFIX = "ray"
"""Ray begins the name of every metric with this; without Ray the names are the same."""


class CounterMeter(Protocol):
    """Counts up."""

    def inc(self, value: float, tags: Mapping[str, str] = ..., /) -> None:
        """Add a number."""


class GaugeMeter(Protocol):
    """Goes up and down."""

    def set(self, value: float, tags: Mapping[str, str] = ..., /) -> None:
        """Take a value."""


class HistogramMeter(Protocol):
    """Counts values by their size."""

    def observe(self, value: float, tags: Mapping[str, str] = ..., /) -> None:
        """Count a value."""


class Meters(Protocol):
    """Makes meters. `tags` are the names of a meter's tags, `boundaries` the upper ends of a histogram's buckets."""

    def counter(self, name: str, text: str, tags: Sequence[str]) -> CounterMeter:
        """A new counter."""

    def gauge(self, name: str, text: str, tags: Sequence[str]) -> GaugeMeter:
        """A new gauge."""

    def histogram(self, name: str, text: str, tags: Sequence[str], boundaries: Sequence[float]) -> HistogramMeter:
        """A new histogram."""


class PrometheusMeters:
    """Meters of this process, read by `text`."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()

    def counter(self, name: str, text: str, tags: Sequence[str]) -> CounterMeter:
        """A new counter."""
        return _Tagged(Counter(name, text, tags, namespace=PREFIX, registry=self._registry))

    def gauge(self, name: str, text: str, tags: Sequence[str]) -> GaugeMeter:
        """A new gauge."""
        return _Tagged(Gauge(name, text, tags, namespace=PREFIX, registry=self._registry))

    def histogram(self, name: str, text: str, tags: Sequence[str], boundaries: Sequence[float]) -> HistogramMeter:
        """A new histogram."""
        buckets = tuple(boundaries)
        return _Tagged(Histogram(name, text, tags, namespace=PREFIX, registry=self._registry, buckets=buckets))

    def text(self) -> str:
        """All meters, in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class _Tagged:
    """A metric of prometheus_client, called as the ones of Ray are."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def inc(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self._labelled(tags).inc(value)

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self._labelled(tags).set(value)

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        self._labelled(tags).observe(value)

    def _labelled(self, tags: Mapping[str, str] | None) -> Any:
        return self._metric.labels(**tags) if tags else self._metric
