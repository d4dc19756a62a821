"""Folders that become models while the server runs."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from deployments.adapters.lora_config import CONFIG_FILE
from deployments.config.explain import read_faults
from deployments.config.model import ModelEntry
from deployments.config.sources import FolderSource, Spec, adapter_spec, spec_like
from deployments.registry.adapter_check import AdapterCheck
from deployments.registry.complete import incomplete
from deployments.registry.files import folder_files
from deployments.registry.stamp import Stamp

logger = logging.getLogger("troupe.registry")

State = Literal["settling", "ready", "refused", "gone"]
_PATIENCE = 10


@dataclass(frozen=True, slots=True)
class Found:
    """A folder as it was at the last search.

    Attributes:
        reason: why it is not ready.
        for_clients: the reason names no paths.
    """

    spec: Spec
    state: State
    reason: str | None = None
    for_clients: bool = False


class FolderSearch:
    """Searches for the folders of one pattern. A folder that was ready is not looked into again, unless it was gone.

    Args:
        known: the models of the configuration, by name.
        settle_s: seconds without a write until a folder is ready.
        check: reads adapters.
    """

    def __init__(
        self, source: FolderSource, known: Mapping[str, ModelEntry], settle_s: float, check: AdapterCheck
    ) -> None:
        self._source = source
        self._like = None if source.like is None else known[source.like]
        self._base = None if source.base is None else known[source.base]
        self._settle_s = settle_s
        self._check = check
        self._found: dict[str, Found] = {}
        self._nameless: set[str] = set()

    def search(self) -> list[Found]:
        """Every folder, those that are gone included, in the order of their paths and numbers. Blocks."""
        paths = [path for path in glob.glob(self._source.glob) if Path(path).is_dir()]
        for path in set(paths) - self._nameless:
            known = self._found.get(path)
            if known is None or known.state != "ready":
                try:
                    looked = self._look(path)
                except ValueError as error:
                    logger.warning("The folder %r is not a model: %s", path, _told(error))
                    self._nameless.add(path)
                    continue
                if looked is not None:
                    self._found[path] = looked
        for path in set(self._found).difference(paths):
            if self._found[path].state == "ready":
                self._found[path] = Found(self._found[path].spec, "gone", f"{path} is gone.")
            elif self._found[path].state != "gone":
                del self._found[path]
        return [self._found[path] for path in sorted(self._found, key=_in_order)]

    def _look(self, path: str) -> Found | None:
        files = folder_files(Path(path))
        names = {file.name for file in files}
        if not files:
            return None
        stamp = Stamp.of_files(files)
        is_adapter = CONFIG_FILE in names and "config.json" not in names
        spec = self._spec(path, stamp.written_at, is_adapter)
        if is_adapter and self._base is None:
            reason = "is a PEFT adapter without a model. Set base in this entry of folders, or merge the two."
            return Found(spec, "refused", f"{path} {reason}")
        if not is_adapter and self._like is None:
            return Found(spec, "refused", f"{path} is not a PEFT adapter. Set like in this entry of folders.")
        age = stamp.age
        if age < self._settle_s:
            return Found(spec, "settling", f"{path} is being written.")
        marker = None if self._like is None else self._like.marker
        fault = incomplete(files, marker) or (
            None if any(file.has_weights for file in files) else f"{path} has no weights."
        )
        if fault is None:
            refusal = self._check.reason(spec.entry)
            if refusal is not None and (path not in self._found or self._found[path].reason != refusal):
                logger.warning("The adapter %r in %s cannot be served: %s", spec.entry.id, path, refusal)
            return Found(spec, "ready") if refusal is None else Found(spec, "refused", refusal, for_clients=True)
        return Found(spec, "settling" if age < max(1.0, _PATIENCE * self._settle_s) else "refused", fault)

    def _spec(self, path: str, created: int, is_adapter: bool) -> Spec:
        folder = Path(path)
        numbers = re.findall(r"\d+", folder.name)
        fields = {"name": folder.name, "parent": folder.absolute().parent.name, "step": numbers[-1] if numbers else ""}
        if not numbers and "{step}" in self._source.id:
            raise ValueError(f"its name has no number for {{step}} in the id {self._source.id!r}.")
        name = self._source.id.format(**fields)
        base, like = self._base or self._like, self._like or self._base
        assert base is not None
        assert like is not None
        if is_adapter:
            return adapter_spec(base, None, name=name, source=path, origin="folder", created=created)
        return spec_like(like, self._source.like_key, name=name, source=path, origin="folder", created=created)


def _told(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    fault = next(read_faults(error))
    return f"{fault.place}: {fault.reason}"


def _in_order(path: str) -> list[tuple[int, str]]:
    """checkpoint-900 comes before checkpoint-1000."""
    return [(int(number), "") if number else (-1, text) for number, text in re.findall(r"(\d+)|(\D+)", path)]
