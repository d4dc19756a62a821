"""How often a stream gives a chunk: the more streams a process has, the more tokens come together, and all at once."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator

from deployments.engine.base.running_requests import Interval

_CHUNKS_OF_A_CORE = 125.0
_CHUNKS_OF_AN_INGRESS = 1000.0
_FEW = 10
"""Streams; one of fewer has no more chunks than if they were this many."""


class StreamPace:
    """When streams have their next chunk, for all streams of a process.

    Args:
        least: seconds between two, for few streams; with 0 every token has a chunk, however many streams there are.
        chunks_per_s: of all streams together.
    """

    def __init__(self, least: float, chunks_per_s: float = math.inf) -> None:
        self._least = least
        self._chunks_per_s = chunks_per_s
        self._streams = 0

    @classmethod
    def of_replica(cls, least: float, cores: float, replicas: int) -> StreamPace:
        """The pace of a replica whose machine also sends its chunks.

        Args:
            least: seconds, as the configuration says.
            cores: the replica's share.
            replicas: of the pool, whose chunks may all go through one ingress.
        """
        of_cores = _CHUNKS_OF_A_CORE * cores
        return cls(max(least, _FEW / of_cores) if least else 0.0, min(_CHUNKS_OF_AN_INGRESS / replicas, of_cores))

    @contextlib.contextmanager
    def streams(self, count: int) -> Iterator[Interval]:
        """Further streams, until the block ends.

        What it gives is called after each chunk, for the seconds until the next one. That is the same moment for all
        streams, because a few interruptions cost the threads that compute less than many. The streams count from the
        first call on: those that still wait for their first token have no chunks.
        """
        begun = 0

        def interval() -> float:
            nonlocal begun
            self._streams += count - begun
            begun = count
            if not self._least:
                return 0.0
            each = max(self._least, self._streams / self._chunks_per_s)
            return each - time.monotonic() % each

        try:
            yield interval
        finally:
            self._streams -= begun
