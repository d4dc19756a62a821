"""The version of a model, found anew when its files change. Files that are being written are waited for."""

from __future__ import annotations

import asyncio
import logging
import time

from deployments.config.model import ModelEntry
from deployments.core.errors import LoadTimeout, ModelLoadFailed, Unavailable, last_line
from deployments.registry.complete import incomplete
from deployments.registry.digest import files_digest
from deployments.registry.files import ModelFile, entry_files
from deployments.registry.stamp import Stamp
from deployments.registry.version import Version

logger = logging.getLogger("troupe.registry")

LOOK_EVERY_S = 1.0
LOOK_LIMIT_S = 2.0
_PATIENCE = 10
"""Files that are not complete are given up after `settle_s` times this, if nothing is written."""

Look = tuple[list[ModelFile], Stamp]


class Watch:
    """Looks at a model's files when they are asked for, at most once a second.

    Files that change are a new version once nothing was written for `settle_s` and they are complete; who asks in the
    meantime waits. Files that are gone keep their version: a model that is loaded does not need them.

    Args:
        entry: the model, whose loader's arguments name files.
        settle_s: seconds without a write until files are read.
        digest: of the entry, if that can change while the server runs.
    """

    def __init__(self, entry: ModelEntry, settle_s: float, digest: str = "") -> None:
        self._entry = entry
        self._digest = digest
        self._settle_s = settle_s
        self._version: Version | None = None
        self._looked = float("-inf")
        self._finding: asyncio.Task[Version] | None = None
        self._changing = False

    def expire(self) -> None:
        """Look again at the next call, however soon it comes."""
        self._looked = float("-inf")

    async def current(self) -> Version:
        """The version of the files.

        Raises:
            Unavailable: they are not complete, and nobody writes them any more.
            LoadTimeout: they have been written for longer than a load may take.
            ModelLoadFailed: they cannot be read.
        """
        if self._version is not None and time.monotonic() - self._looked < LOOK_EVERY_S:
            return self._version
        if self._finding is None:
            self._finding = asyncio.create_task(self._find(), name=f"look at {self._entry.id}")
            self._finding.add_done_callback(self._found)
        finding = self._finding
        await asyncio.wait({finding}, timeout=LOOK_LIMIT_S)
        if not finding.done() and self._version is not None and not self._changing:
            # A file system that hangs does not stop a model that is in memory.
            logger.warning("the files of %s do not answer; it is served as it was loaded", self._entry.id)
            return self._version
        await asyncio.wait({finding}, timeout=self._entry.load_timeout_s)
        if not finding.done():
            raise LoadTimeout(
                f"The files of model {self._entry.id!r} have been written for {self._entry.load_timeout_s:g} s."
            )
        return finding.result()

    async def is_current(self, version: Version) -> bool:
        """Whether the files are those of a version at this moment."""
        return (await self._look())[1].same(version.stamp)

    def _found(self, finding: asyncio.Task[Version]) -> None:
        self._finding, self._changing = None, False
        if not finding.cancelled() and finding.exception() is None:
            self._version, self._looked = finding.result(), time.monotonic()

    async def _find(self) -> Version:
        try:
            files, stamp = await self._look()
            if self._version is not None and (not files or stamp.same(self._version.stamp)):
                return self._version
            self._changing = True
            version = await self._settle(stamp)
        except OSError as error:
            if self._version is None:
                raise ModelLoadFailed(
                    f"The files of model {self._entry.id!r} cannot be read: {last_line(error)}"
                ) from error
            logger.warning("the files of %s cannot be read: %s; it is served as it was", self._entry.id, error)
            return self._version
        if self._version is not None and version.key != self._version.key:
            logger.info("the files of %s were rewritten: %s is now %s", version.model, self._version.key, version.key)
        return version

    async def _settle(self, before: Stamp) -> Version:
        """The version of the files once they are complete and nothing was written for `settle_s`."""
        since = time.monotonic() - max(0.0, before.age)
        while True:
            await asyncio.sleep(min(max(0.0, since + self._settle_s - time.monotonic()), 0.2))
            files, stamp = await self._look()
            if not files:
                return self._version or Version(model=self._entry.id, entry=self._digest)
            if not stamp.same(before):
                before, since = stamp, time.monotonic()
                continue
            quiet = time.monotonic() - since
            if quiet < self._settle_s:
                continue
            fault = await asyncio.to_thread(incomplete, files, self._entry.marker)
            if fault is None:
                version = await self._read(files, stamp)
                if await self.is_current(version):
                    return version
            elif quiet >= max(1.0, _PATIENCE * self._settle_s):
                raise Unavailable(f"The files of model {self._entry.id!r} are not complete: {fault}", retry_after=5)
            else:
                await asyncio.sleep(0.2)

    async def _read(self, files: list[ModelFile], stamp: Stamp) -> Version:
        digest = await asyncio.to_thread(files_digest, files, self._entry.kwargs)
        return Version(model=self._entry.id, digest=digest, stamp=stamp, entry=self._digest)

    async def _look(self) -> Look:
        return await asyncio.to_thread(_look, self._entry)


def _look(entry: ModelEntry) -> Look:
    files = entry_files(entry)
    return files, Stamp.of_files(files)
