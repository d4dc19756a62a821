"""Whether adapters can be served, as far as their own files say."""

from __future__ import annotations

from pathlib import Path

from deployments.adapters.lora_file import read_lora
from deployments.adapters.refused import AdapterRefused, NeedsMerge, needs_peft, peft_is_installed
from deployments.config.model import ModelEntry
from deployments.registry.files import folder_files
from deployments.registry.stamp import Stamp
from model_loaders.local_folder import found


class AdapterCheck:
    """Reads adapters, each once until its files change."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Stamp, str | None]] = {}

    def reason(self, entry: ModelEntry, base: Path = Path()) -> str | None:
        """Why an adapter is refused; None if it is not, or if the entry is a model. Blocks.

        Args:
            base: the folder that relative paths start from.
        """
        if entry.adapter is None:
            return None
        folder = found(entry.adapter, base)
        stamp = Stamp.of_files(folder_files(folder))
        known = self._known.get(entry.adapter)
        if known is None or not known[0].same(stamp):
            known = self._known[entry.adapter] = (stamp, _reason(folder, entry))
        return known[1]


def _reason(folder: Path, entry: ModelEntry) -> str | None:
    try:
        read_lora(folder, entry.adapters.max_rank)
    except NeedsMerge as reason:
        return None if peft_is_installed() else needs_peft(reason.message).reason
    except AdapterRefused as refused:
        return refused.reason
    except OSError as error:
        return f"it cannot be read: {error}."
    return None
