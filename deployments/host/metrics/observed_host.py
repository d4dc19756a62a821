"""The models of a process that is a server of its own, with its metrics."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deployments.core.calls import Call
from deployments.core.events import Event
from deployments.host.host import ModelHost
from deployments.host.metrics.meters import PrometheusMeters
from deployments.host.metrics.metrics import HostMetrics


class ObservedHost(ModelHost):
    """A `ModelHost` that counts what it does; arguments as for that class."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._meters = PrometheusMeters()
        self._metrics = HostMetrics(self._meters)

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a generation, counted."""
        with self._metrics.observed(call) as seen:
            async with aclosing(super().generate(call)) as events:
                async for event in events:
                    seen.add(event)
                    yield event

    async def metrics(self) -> str:
        """The metrics in Prometheus' text format."""
        self._metrics.report(self.snapshot())
        return self._meters.text()
