"""Which replica gets a request: one that has its model, the one that has its conversation, one that has room.

A Ray Serve request router: https://docs.ray.io/en/latest/serve/advanced-guides/custom-request-router.html
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.ray_internals import RequestMetadata
from deployments.routing.hint import RoutingHint
from deployments.routing.prefix_places import PrefixPlaces

logger = logging.getLogger("ray.serve")

PLAN_LIFETIME_S = 10.0
LOST_AFTER_S = 5.0


class ModelAffinityRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas for a request by model, conversation and load.

    1. Replicas that have the model, or were just sent a request for it. With several, the conversation's own
       (rendezvous hash of the session id), unless it is full and much busier than the idlest. If other prompts that
       begin like this one went elsewhere, and a replica there is hardly busier than the idlest, the conversation
       belongs there instead.
    2. Its next home, where all of these have had much to do for a while, so that a burst does not load a model twice:
       a quarter of what fills them, and a replica with a free place has nothing to do; full, and one with a free place
       has less than half as much; twice full, and one with other models has nothing to do. A model that is in use
       elsewhere is never driven out by another's queue.
    3. Where none has it: its home (rendezvous hash of the model id) among those with a free place, else among the
       idle, else among all, so that a burst loads it once.

    Rendezvous hashing (Thaler & Ravishankar, 1998) lets several ingress replicas agree without talking.

    Args, from request_router_kwargs:
        full_at: number of unfinished requests at which a replica is full.
        max_models: models a replica holds.
        slack: how many more requests a conversation's replica may have than the idlest one, once it is full.
        prefix_slack: how many more it may have to get a conversation for the beginning of its prompt.
        patience_s: seconds for which the replicas of a model have much to do before it gets a further one.
    """

    def initialize_state(
        self, full_at: int = 16, max_models: int = 1, slack: int = 8, prefix_slack: int = 4, patience_s: float = 1.0
    ) -> None:
        self._full_at = full_at
        self._prefix_slack = prefix_slack
        self._max_models = max_models
        self._slack = slack
        self._patience_s = patience_s
        self._since: dict[tuple[str, str], float] = {}
        self._planned: dict[str, dict[ReplicaID, float]] = {}
        self._sent: Counter[ReplicaID] = Counter()
        self._pending: dict[int, PendingRequest] = {}
        self._first_chosen: dict[int, float] = {}
        self._prefixes: PrefixPlaces[ReplicaID] = PrefixPlaces()
        self._moved: PrefixPlaces[ReplicaID] = PrefixPlaces()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        try:
            metadata = pending_request.metadata
            if not metadata.multiplexed_model_id or self._waited(metadata) > LOST_AFTER_S:
                return [candidate_replicas]
            hint = RoutingHint.from_text(metadata.session_id or "|")
            return [self.choose(candidate_replicas, metadata.multiplexed_model_id, hint.session, hint.blocks)]
        except Exception:
            logger.exception("routing by model failed; any replica will do")
            return [candidate_replicas]

    def _waited(self, metadata: RequestMetadata) -> float:
        """Seconds since a replica was first chosen for a request that has none yet.

        They do not begin when it came: behind a burst that took as long, every request would seem lost.
        """
        now, request = time.monotonic(), id(metadata)
        return now - self._first_chosen.setdefault(request, now) if request in self._pending else 0.0

    def choose(
        self, replicas: list[RunningReplica], model: str, session: str, blocks: Sequence[str] = ()
    ) -> list[RunningReplica]:
        """The replicas that may get a request; the least busy of them will."""
        chosen = self._chosen(replicas, model, session, blocks)
        if blocks and len(chosen) > 1:
            least = min(map(self._load, chosen))
            chosen = [max((r for r in chosen if self._load(r) == least), key=lambda r: _weight(blocks[-1], r))]
        if len(chosen) == 1:
            self._prefixes.note(blocks, chosen[0].replica_id)
        return chosen

    def _chosen(
        self, replicas: list[RunningReplica], model: str, session: str, blocks: Sequence[str]
    ) -> list[RunningReplica]:
        warm: list[RunningReplica] = []
        cold: list[RunningReplica] = []
        plans = self._plans(model)
        for replica in replicas:
            has_it = model in replica.multiplexed_model_ids or replica.replica_id in plans
            (warm if has_it else cold).append(replica)
        if not warm:
            free = [r for r in cold if self._models_on(r) < self._max_models]
            home = _home(model, free or [r for r in cold if not self._load(r)] or cold)
        elif further := self._further(model, warm, cold):
            home = _home(model, further)
        else:
            return self._by_session(warm, session, blocks)
        self._planned.setdefault(model, {})[home.replica_id] = time.monotonic()
        return [home]

    def _further(self, model: str, warm: list[RunningReplica], cold: list[RunningReplica]) -> list[RunningReplica]:
        """Replicas that could take on a model, if those that have it have had enough to do for long enough."""
        least = min(map(self._load, warm))
        busy = self._has_been(model, "busy", least >= max(2, self._full_at // 4))
        full = self._has_been(model, "full", least >= self._full_at)
        over = self._has_been(model, "over", least >= 2 * self._full_at)
        free = [r for r in cold if self._models_on(r) < self._max_models] if busy else []
        return (
            [r for r in free if not self._load(r)]
            or [r for r in free if full and 2 * self._load(r) < least]
            or [r for r in cold if over and not self._load(r)]
        )

    def _has_been(self, model: str, what: str, it_is: bool) -> bool:
        """Whether something has been so at every request of the last `patience_s`."""
        if not it_is:
            self._since.pop((model, what), None)
            return False
        now = time.monotonic()
        return now - self._since.setdefault((model, what), now) >= self._patience_s

    # The base class knows what waits by the id of the client's request. Calls that one request makes at once share it:
    # all but the first would wait for ever. A call's metadata are its own.
    def _add_pending_request_to_indices(self, pending_request: PendingRequest) -> None:
        self._pending[id(pending_request.metadata)] = pending_request

    def _remove_pending_request_from_indices(self, pending_request: PendingRequest) -> None:
        self._pending.pop(id(pending_request.metadata), None)
        self._first_chosen.pop(id(pending_request.metadata), None)

    def _get_pending_request_matching_internal_request_id(
        self, request_metadata: RequestMetadata | None = None
    ) -> PendingRequest | None:
        found = self._pending.get(id(request_metadata))
        return None if found is None or found.future.done() else found

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent[replica_id] += 1

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)
        self._sent[replica_id] = min(self._sent[replica_id], num_ongoing_requests)

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        super().decrement_queue_len_cache(replica_id)
        self._sent[replica_id] = max(0, self._sent[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        alive = {replica.replica_id for replica in replicas}
        tables: list[dict[ReplicaID, Any]] = [self._sent, *self._planned.values()]
        for known in tables:
            for replica_id in [r for r in known if r not in alive]:
                del known[replica_id]
        self._prefixes.keep_only(alive)
        self._moved.keep_only(alive)

    def _by_session(self, warm: list[RunningReplica], session: str, blocks: Sequence[str]) -> list[RunningReplica]:
        if len(warm) == 1:
            return warm
        own = max(warm, key=lambda r: _weight(session, r)) if session else None
        idlest = min(self._load(r) for r in warm)
        moved = self._moved.longest([session]) if session else []
        if moved:
            own = next((r for r in warm if r.replica_id in moved), own)
        elif (found := self._by_prefix(warm, blocks, idlest)) is not None:
            if session:
                self._moved.note([session], found.replica_id)
            return [found]
        if own is None:
            return warm
        if moved:
            self._moved.note([session], own.replica_id)
        load = self._load(own)
        return [own] if load < self._full_at or load <= idlest + self._slack else warm

    def _by_prefix(self, warm: list[RunningReplica], blocks: Sequence[str], idlest: int) -> RunningReplica | None:
        """The first replica that prompts with this beginning went to, of those that are hardly busier than the idlest.

        If they are all too busy, the idlest one is next. A beginning that all replicas have decides nothing.
        """
        by_id = {r.replica_id: r for r in warm}
        places = [by_id[place] for place in self._prefixes.longest(blocks) if place in by_id]
        if not places or len(places) == len(warm):
            return None
        fit = (r for r in places if self._load(r) <= idlest + self._prefix_slack)
        return next(fit, None) or min(warm, key=self._load)

    def _models_on(self, replica: RunningReplica) -> int:
        planned = {model for model in list(self._planned) if replica.replica_id in self._plans(model)}
        return len(planned | set(replica.multiplexed_model_ids))

    def _plans(self, model: str) -> dict[ReplicaID, float]:
        """Replicas that were sent a first request for the model too lately to have said that they load it."""
        plans = self._planned.get(model, {})
        oldest = time.monotonic() - PLAN_LIFETIME_S
        for replica_id in [r for r, sent in plans.items() if sent < oldest]:
            del plans[replica_id]
        if not plans:
            self._planned.pop(model, None)
        return plans

    def _load(self, replica: RunningReplica) -> int:
        """Unfinished requests: what the replica last said, but at least what was sent from here.

        What a replica says is forgotten after some seconds without a request, however long its streams run.
        """
        known = self.replica_queue_len_cache.get(replica.replica_id) or 0
        return max(known, self._sent[replica.replica_id])


def _home(model: str, replicas: list[RunningReplica]) -> RunningReplica:
    return max(replicas, key=lambda r: _weight(model, r))


def _weight(key: str, replica: Any) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica.replica_id.unique_id}".encode(), digest_size=8).digest()
