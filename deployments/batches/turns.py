"""Which models have their turn: a model is loaded once for all of its lines, and not for each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.batches.job import Job
from deployments.config.app import AppArgs


@dataclass(slots=True)
class Turn:
    """A model's turn, which ends when these batches have no more lines of it.

    Attributes:
        seat: id of the model that is loaded.
        jobs: the batches that were there when it began, each taking the next line after the others.
    """

    seat: str
    jobs: list[Job]

    def next(self) -> Job | None:
        """The batch whose line is next; None if there is none."""
        for job in self.jobs:
            if not job.stop and self.seat in job.waits_for():
                self.jobs.remove(job)
                self.jobs.append(job)
                return job
        return None


class Turns:
    """At most as many turns at a time as a replica of the pool holds models.

    Attributes:
        running: lines that are computed, by the model that is loaded for them.
    """

    def __init__(self, args: AppArgs) -> None:
        self._pools = args.all_pools()
        self._pool_of = args.pool_of()
        self._holds = {
            name: pool.max_models_per_replica or args.max_models_per_replica for name, pool in self._pools.items()
        }
        self._turns: list[Turn] = []
        self.running: Counter[str] = Counter()

    def now(self, jobs: Sequence[Job]) -> Sequence[Turn]:
        """The turns at this moment.

        Args:
            jobs: the batches that have lines, the oldest first.
        """
        self._turns = [turn for turn in self._turns if self.running[turn.seat] or turn.next() is not None]
        for job in jobs:
            for seat in job.waits_for():
                if all(turn.seat != seat for turn in self._turns) and self._has_room(seat):
                    self._turns.append(Turn(seat, list(jobs)))
        return self._turns

    def _has_room(self, seat: str) -> bool:
        if not seat:  # There is no such model: nothing is loaded.
            return True
        pool = self._pool(seat)
        return sum(bool(turn.seat) and self._pool(turn.seat) == pool for turn in self._turns) < self._holds[pool]

    def _pool(self, seat: str) -> str:
        """The pool of a model; one that came while the server runs counts as of the first."""
        return self._pool_of.get(seat, next(iter(self._pools)))
