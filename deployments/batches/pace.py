"""How many lines of a model run at the same time: what live requests leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.config.app import AppArgs
from deployments.core.client import ModelClient
from deployments.core.errors import last_line

logger = logging.getLogger("troupe.batches")

_EVERY_S = 0.25
_DEFAULT_SLOTS = 8


class Pace:
    """Asks the replicas what they work on. One line of a model may always run, so that a batch comes to its end.

    Args:
        concurrency: see `BatchOptions`.
    """

    def __init__(self, args: AppArgs, models: ModelClient) -> None:
        self._args = args
        self._models = models
        self._concurrency = args.api.batches.concurrency
        self._sizes = {entry.id: entry.engine.max_batch_size for entry in args.models}
        self._replicas: Sequence[Mapping[str, Any]] = ()
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def look(self) -> None:
        """Ask the replicas again, unless their last answer is fresh."""
        if self._asking is None or (self._asking.done() and time.monotonic() - self._asked >= _EVERY_S):
            self._asked = time.monotonic()
            self._asking = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        try:
            self._replicas = await self._models.status()
        except Exception as error:  # a replica is lost at this moment
            logger.info("The replicas do not say what they do: %s", last_line(error))

    def limit(self, seat: str, own: int, all_own: int) -> int:
        """How many lines may run now whose model is loaded at one place.

        Args:
            seat: id of the model that is loaded there; empty for models that do not exist.
            own: lines of it that run.
            all_own: lines of all models that run.
        """
        if any(replica["waiting"] > all_own for replica in self._replicas):
            return 1  # A live request waits for its model to be loaded.
        holders = [model for replica in self._replicas for model in replica["models"] if model["id"] == seat]
        slots = self._sizes.get(seat, _DEFAULT_SLOTS) * max(1, len(holders))
        others = max(0, sum(model["in_use"] for model in holders) - own)
        most = max(1, slots * 3 // 4) if self._concurrency is None else self._concurrency
        # Live requests that come find a free slot; while some run, lines take a quarter of what these leave.
        return most if not others else max(1, min(most, (slots - others) // 4))
