"""Computed prefixes, kept for prompts that begin the same way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from deployments.engine.batching.sequence import common_prefix
from deployments.engine.cache.cache import AnyCache
from deployments.engine.model.forward import Offset


@dataclass(slots=True, kw_only=True, eq=False)
class Prefix:
    """The cache after some tokens, at rest.

    Attributes:
        ids: the tokens in the cache, which has one sequence.
        logits: [vocab], of the token that follows; None where they were not kept.
        content_key: what the cache follows from beside its tokens.
        prefilled: of the tokens, how many were computed as a prompt is.
        adapter: the version of the adapter that computed them, which is a part of `content_key`; empty for the base.
    """

    ids: list[int]
    cache: AnyCache
    offset: Offset
    content_key: object = ""
    logits: Tensor | None = None
    prefilled: int = 0
    adapter: str = ""

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + (0 if self.logits is None else self.logits.nbytes)

    def usable(
        self, ids: Sequence[int], content_key: object, prefix_alignment: int | None = None, most: int | None = None
    ) -> int:
        """How many of a prompt's first tokens need not be computed; all of them only where `logits` are kept.

        Args:
            most: no more than these.
            prefix_alignment: the length of a reusable prefix is a multiple of this, or that of the whole prompt.
        """
        if content_key != self.content_key or ids[:1] != self.ids[:1]:
            return 0
        common = min(common_prefix(self.ids, ids), len(ids) if most is None else most)
        if common == len(ids) and not (common == len(self.ids) and self.logits is not None):
            common -= 1
        if prefix_alignment is not None and not common == len(ids) == self.prefilled:
            common = min(common, self.prefilled) // prefix_alignment * prefix_alignment
        return common if common > 0 and self.cache.holds(0, len(self.ids) - common) else 0


class PrefixStore:
    """Prefixes, least recently used first to go.

    Args:
        limit: bytes to hold at most; 0 turns the store off.

    Attributes:
        version: another number after every change of what is held.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self.version = 0
        self._entries: list[Prefix] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Prefix]:
        """Those that are held, the least recently used first."""
        return iter(self._entries)

    def find(
        self, ids: Sequence[int], content_key: object, prefix_alignment: int | None = None, most: int | None = None
    ) -> tuple[Prefix | None, int]:
        """The entry that saves most of a prompt, and how many tokens it saves; see `Prefix.usable`."""
        best, saved = None, 0
        for entry in self._entries:
            usable = entry.usable(ids, content_key, prefix_alignment, most)
            if usable > saved:
                best, saved = entry, usable
        if best is not None:
            self._entries.remove(best)
            self._entries.append(best)
        return best, saved

    def add(self, prefix: Prefix) -> None:
        """Keep a prefix. Entries whose every use it serves as well make room for it."""
        size = prefix.nbytes
        if size > self.limit:
            return
        for entry in [e for e in self._entries if _serves(prefix, e)]:
            self._remove(entry)
        self._entries.append(prefix)
        self.version += 1
        self.nbytes += size
        self.shrink(self.limit)

    def shrink(self, limit: int) -> None:
        """Drop entries until at most `limit` bytes are held."""
        while self._entries and self.nbytes > limit:
            self._remove(self._entries[0])

    def forget(self, adapter: str) -> None:
        """Drop what was computed with an adapter."""
        for entry in [e for e in self._entries if e.adapter == adapter]:
            self._remove(entry)

    def clear(self) -> None:
        self.shrink(-1)

    def _remove(self, entry: Prefix) -> None:
        self._entries.remove(entry)
        self.version += 1
        self.nbytes -= entry.nbytes


def _serves(longer: Prefix, entry: Prefix) -> bool:
    """Whether every prompt that could use `entry` could use `longer` as well, up to one token."""
    return (
        longer.content_key == entry.content_key
        and longer.ids[: len(entry.ids)] == entry.ids
        and longer.prefilled >= entry.prefilled
        and longer.cache.holds(0, len(longer.ids) - len(entry.ids))
    )
