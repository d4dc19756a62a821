"""Where a prompt may begin: prefixes kept for it, and rows that run and have the same beginning."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from torch import Tensor

from deployments.engine.base.failures import is_out_of_memory
from deployments.engine.batching.prefill import Source
from deployments.engine.batching.prefix_cache import Prefix, PrefixStore
from deployments.engine.batching.sequence import Batch, Row, common_prefix
from deployments.engine.cache.row_bytes import RowBytes
from deployments.engine.model.forward import Forward

logger = logging.getLogger(__name__)

_WORTH_REUSING = 16


class Reuse:
    """Finds the beginnings of prompts, and keeps them.

    Args:
        forward: the model's forward passes.
        store: prefixes of finished rows.
        row_bytes: what a row costs.
        border: see `Limits.border`.
    """

    def __init__(self, forward: Forward, store: PrefixStore, row_bytes: RowBytes, border: int | None) -> None:
        self._forward = forward
        self._store = store
        self._row_bytes = row_bytes
        self._border = border

    def source(self, row: Row, batches: Iterable[Batch]) -> Source | None:
        """The best beginning of a row's tokens among kept prefixes and running rows; sets the row's offset by it."""
        border = self._border
        if not self._shares(row) or (border is not None and row.request.model_inputs):
            return None
        entry, saved = self._store.find(row.ids, row.salt, border)
        source = None
        if entry is not None:
            logits = entry.logits if saved == len(row.ids) else None
            source = Source(entry.cache, 0, len(entry.ids) - saved, logits)
            offset = entry.offset
        for batch in batches:
            for index, other in enumerate(batch.rows):
                if other.ids[:_WORTH_REUSING] != row.ids[:_WORTH_REUSING]:
                    continue
                usable = min(common_prefix(other.ids, row.ids), len(row.ids) - 1, batch.cache.lengths[index])
                if border is not None:
                    usable = min(usable, self._prefilled(other)) // border * border
                cut = batch.cache.lengths[index] - usable
                if other.salt == row.salt and usable > saved and batch.cache.holds(index, cut):
                    source, saved, offset = Source(batch.cache, index, cut), usable, other.offset
        if source is None or saved < max(_WORTH_REUSING, row.media_end):
            return None
        row.offset = offset
        return source

    def soon_served(self, row: Row, source: Source | None, others: Sequence[Row]) -> Row | None:
        """One of `others`, computed before a row, that has most of what it lacks, so that waiting saves work."""
        if not self._shares(row):
            return None
        have = 0 if source is None else source.length
        enough = have + max(_WORTH_REUSING, (len(row.ids) - have) // 2)
        for other in others:
            begins_alike = other.salt == row.salt and other.ids[:_WORTH_REUSING] == row.ids[:_WORTH_REUSING]
            if begins_alike and common_prefix(other.ids, row.ids) >= enough:
                return other
        return None

    def keep(self, batch: Batch, index: int, room: int, logits: Tensor | None = None) -> None:
        """Put a copy of a row's cache into the store, unless it is too short to be worth it or cannot be copied.

        Args:
            room: bytes that the store may have at most, beside its own limit.
            logits: [vocab], of the row's next token; a copy of them is kept.
        """
        row, length = batch.rows[index], batch.cache.lengths[index]
        lacks_mark = bool(row.request.model_inputs) and row.media_end == 0
        if not self._store.limit or length < _WORTH_REUSING or lacks_mark or self._forward.is_encoder_decoder:
            return
        if self._row_bytes.of_row(length) > min(room, self._store.limit):
            return
        try:
            copy = batch.cache.copy_row(index)
            logits = None if logits is None else logits.clone()
        except Exception as error:
            # Nobody waits for a prefix.
            if not is_out_of_memory(error):
                logger.warning("The prefix of a finished request cannot be kept.", exc_info=True)
            self._store.clear()
            return
        prefilled = min(length, self._prefilled(row))
        ids = row.ids[:length]
        prefix = Prefix(ids=ids, cache=copy, offset=row.offset, salt=row.salt, logits=logits, prefilled=prefilled)
        self._store.add(prefix)
        self._store.shrink(min(self._store.limit, room))

    def _shares(self, row: Row) -> bool:
        """Whether a row's tokens tell what its cache holds, so that it may begin with another's."""
        whole = row.scorer is not None or self._forward.is_encoder_decoder
        return self._store.limit > 0 and not whole and (row.media_end > 0 or not row.request.model_inputs)

    def _prefilled(self, row: Row) -> int:
        """Tokens of a row that were computed as those of any prompt are; told in deterministic mode only."""
        scored = row.request.sampling.prompt_logprobs is not None
        return 0 if scored or self._border is None else row.prompt_length
