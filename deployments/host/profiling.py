"""A trace of a model's first requests, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity

from deployments.core.errors import ConfigError

logger = logging.getLogger("troupe.host")

REQUESTS = 8


class Trace:
    """Records every thread of the process from the first request on, until `REQUESTS` of them have ended.

    Args:
        folder: where the file goes, a `torch.profiler` trace of kernels and operators; made if it is not there.
        name: of the model, part of the file's name.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(self, folder: str, name: str) -> None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"profile_dir {folder!r} cannot be made: {error.strerror}.") from error
        stamp = time.strftime("%Y%m%dT%H%M%S")
        self._file = Path(folder) / f"{name.strip('/.').replace('/', '_')}-{stamp}.json"
        self._profiler: torch.profiler.profile | None = None
        self._lock = threading.Lock()
        self._begun = 0
        self._ended = 0

    def begin(self) -> None:
        """A request begins; the first one starts the recording. Blocks."""
        with self._lock:
            self._begun += 1
            if self._begun == 1:
                activities = [ProfilerActivity.CPU]
                if torch.cuda.is_available():
                    activities.append(ProfilerActivity.CUDA)
                everything = _ExperimentalConfig(profile_all_threads=True)
                self._profiler = torch.profiler.profile(activities=activities, experimental_config=everything)
                self._profiler.start()

    def end(self) -> None:
        """A request has ended; the last one writes the file. Blocks."""
        with self._lock:
            self._ended += 1
            full = self._ended == REQUESTS
        if full:
            self.close()

    def close(self) -> None:
        """Write what is recorded and not yet written. Blocks."""
        with self._lock:
            profiler, self._profiler = self._profiler, None
        if profiler is not None:
            profiler.stop()
            profiler.export_chrome_trace(str(self._file))
            logger.info("wrote a trace of %d requests to %s", self._ended, self._file)


@asynccontextmanager
async def traced(trace: Trace | None) -> AsyncIterator[None]:
    """While a request of a model is computed: it may be part of the model's trace, if there is one."""
    if trace is None:
        yield
        return
    await asyncio.to_thread(trace.begin)
    try:
        yield
    finally:
        await asyncio.to_thread(trace.end)
