"""Which replica gets a request: one that has its model, the one that has its conversation, one that has room.

A Ray Serve request router: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

logger = logging.getLogger("ray.serve")

PLAN_LIFETIME_S = 5.0


class ModelAffinityRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas for a request by model, conversation and load.

    1. A replica that has the model, or was just sent a request for it, and is not full. With several, the
       conversation's own (rendezvous hash of the session id), unless it is much busier than the idlest.
    2. Where none has it, or all that have it are full: the model's home among those with room for another model,
       else among all (rendezvous hash of the model id), so that a burst loads it once.

    Rendezvous hashing (Thaler & Ravishankar, 1998) lets several ingress replicas agree without talking.

    Args, from request_router_kwargs:
        spill_at: a replica with so many unfinished requests is full.
        max_models: models a replica holds.
        slack: how many more requests a conversation's replica may have than the idlest one.
    """

    def initialize_state(self, spill_at: int = 32, max_models: int = 1, slack: int = 8) -> None:
        self._spill_at = spill_at
        self._max_models = max_models
        self._slack = slack
        self._planned: dict[str, dict[ReplicaID, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        try:
            metadata = pending_request.metadata
            if not metadata.multiplexed_model_id:
                return [candidate_replicas]
            return self._rank(candidate_replicas, metadata.multiplexed_model_id, metadata.session_id or "")
        except Exception:
            logger.exception("routing by model failed; any replica will do")
            return [candidate_replicas]

    def _rank(self, replicas: list[RunningReplica], model: str, session: str) -> list[list[RunningReplica]]:
        warm = [r for r in replicas if self._has(r, model)]
        open_warm = [r for r in warm if self._queue(r) < self._spill_at]
        if open_warm:
            chosen = self._by_session(open_warm, session)
        else:
            cold = [r for r in replicas if r not in warm]
            chosen = [self._home(cold, model)] if cold else warm
            if cold:
                self._planned.setdefault(model, {})[chosen[0].replica_id] = time.monotonic()
        return [chosen, warm, replicas]

    def _by_session(self, warm: list[RunningReplica], session: str) -> list[RunningReplica]:
        if not session or len(warm) == 1:
            return warm
        own = max(warm, key=lambda r: _weight(session, r))
        idlest = min(self._queue(r) for r in warm)
        return [own] if self._queue(own) <= idlest + self._slack else warm

    def _home(self, cold: list[RunningReplica], model: str) -> RunningReplica:
        roomy = [r for r in cold if self._models_on(r) < self._max_models]
        return max(roomy or cold, key=lambda r: _weight(model, r))

    def _has(self, replica: RunningReplica, model: str) -> bool:
        return model in replica.multiplexed_model_ids or replica.replica_id in self._plans(model)

    def _models_on(self, replica: RunningReplica) -> int:
        planned = {model for model in list(self._planned) if replica.replica_id in self._plans(model)}
        return len(planned | set(replica.multiplexed_model_ids))

    def _plans(self, model: str) -> Iterable[ReplicaID]:
        """Replicas that were sent a first request for the model too lately to have said that they load it."""
        plans = self._planned.get(model, {})
        oldest = time.monotonic() - PLAN_LIFETIME_S
        for replica_id in [r for r, sent in plans.items() if sent < oldest]:
            del plans[replica_id]
        if not plans:
            self._planned.pop(model, None)
        return plans

    def _queue(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def _weight(key: str, replica: Any) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica.replica_id.unique_id}".encode(), digest_size=8).digest()
