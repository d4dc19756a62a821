"""Computing prompts: in chunks, several short ones together, from kept prefixes where there are any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from deployments.engine.batching.sequence import Row
from deployments.engine.cache.cache import AnyRowsCache, EncoderRowsCache, new_cache
from deployments.engine.cache.layers import column_room
from deployments.engine.model.forward import Chunk, Forward

LOGITS_BYTES = 256 << 20
_GROUP_CHUNKS = 2


@dataclass(frozen=True, slots=True)
class Source:
    """A cache row that begins like a prompt, which needs its last `cut` tokens cut off.

    Attributes:
        logits: [vocab], where the whole prompt is there and nothing has to be computed.
    """

    cache: AnyRowsCache
    index: int
    cut: int
    logits: Tensor | None = None

    @property
    def length(self) -> int:
        return self.cache.lengths[self.index] - self.cut


@dataclass(slots=True, eq=False)
class Prefill:
    """Prompts being computed together.

    Several rows are computed by one forward: they are padded on the left where the cache is empty, and have equally
    many tokens to go where it is not.
    """

    rows: list[Row]
    cache: AnyRowsCache
    logits: Tensor | None = None

    @property
    def remaining(self) -> int:
        """Tokens still to be computed, padding included."""
        if self.logits is not None:
            return 0
        done = self.cache.lengths or [0] * len(self.rows)
        return len(self.rows) * max(len(row.ids) - n for row, n in zip(self.rows, done, strict=True))

    def drop(self, row: Row, *, blank: bool = False) -> None:
        """Let a row leave; what is computed for the others stays. See `Batch.drop`."""
        if not self.cache.lengths:
            self.rows.remove(row)
            return
        index = self.rows.index(row)
        self.cache.drop(index, blank=blank)
        last = self.rows.pop()
        if last is not row:
            self.rows[index] = last


class Prefiller:
    """Runs prefill forwards.

    Args:
        forward: the model's forward passes.
        chunk: tokens of one prompt per forward at most, media prompts excepted; whole prompts together may be twice
            as many, which reads the weights half as often.
        vocab_size: width of the logits.
        chunks: a prompt may be computed in several forwards.
        pads: prompts of different lengths may be padded together.
    """

    def __init__(
        self, forward: Forward, *, chunk: int, vocab_size: int, chunks: bool = True, pads: bool = True
    ) -> None:
        self.forward = forward
        self.chunk = max(1, chunk)
        self.group = _GROUP_CHUNKS * self.chunk
        self.chunks = chunks
        self.pads = pads
        self._scored_chunk = max(1, min(self.chunk, LOGITS_BYTES // (4 * vocab_size)))

    def begin(self, rows: Sequence[Row], sources: Sequence[Source | None]) -> Prefill:
        """A prefill of rows that `together` has found, each with the source of its beginning, if there is one."""
        longest = max(len(row.ids) for row in rows)
        cache = new_cache(self.forward.model, capacity=column_room(longest))
        logits = None
        for row, source in zip(rows, sources, strict=True):
            if source is not None:
                cache.append(source.cache, source.index, source.cut)
                row.output.cached_tokens = min(source.length, row.prompt_length)
                logits = None if source.logits is None else source.logits[None]
        return Prefill(list(rows), cache, logits)

    def together(self, rows: Sequence[Row], sources: Sequence[Source | None]) -> list[Source | None]:
        """Sources for the longest run of the first rows that one forward can compute.

        Rows with sources are cut to have equally many tokens to go, which costs no more than padding them.
        """
        first, source = rows[0], sources[0]
        if len(rows) == 1 or not self._groupable(first) or (source is not None and source.logits is not None):
            return [source]
        limit = self.group if first.scorer is None else self._scored_chunk
        taken: list[Source | None] = [source]
        longest = self._to_go(first, source)
        for row, other in zip(rows[1:], sources[1:], strict=False):
            to_go = self._to_go(row, other)
            longest_now = max(longest, to_go)
            if not (
                self._groupable(row)
                and (row.scorer is None) == (first.scorer is None)
                and (other is None) == (source is None)
                and (other is None or other.logits is None)
                and (len(taken) + 1) * longest_now <= limit
                and 2 * min(to_go, longest) >= longest_now
            ):
                break
            aligned = self._aligned([*taken, other], rows[: len(taken) + 1], longest_now)
            if aligned is None:
                break
            taken, longest = aligned, longest_now
        return taken

    def completes(self, prefill: Prefill) -> bool:
        """Whether the next forward is the last one of these prompts."""
        return len(prefill.rows) > 1 or prefill.remaining <= self._limit(prefill.rows[0])

    def advance(self, prefill: Prefill) -> Tensor | None:
        """Run one forward.

        Returns:
            Logits [rows, vocab] of the next token once the prompts are computed, None before.
        """
        if prefill.logits is not None:
            return prefill.logits
        if len(prefill.rows) > 1:
            return self._advance_group(prefill)
        row, cache = prefill.rows[0], prefill.cache
        scored = row.scorer is not None
        if not cache.lengths and isinstance(cache, EncoderRowsCache):
            request = row.request
            prompt = row.ids[: row.prompt_length]
            chunk = self.forward.encode(request.input_ids, request.model_inputs, prompt, cache, all_logits=scored)
        elif not cache.lengths and row.request.model_inputs:
            prompt = row.ids[: row.prompt_length]
            whole = self._whole(row)
            chunk = self.forward.prefill_media(prompt, row.request.model_inputs, cache, all_logits=scored, whole=whole)
        else:
            done = cache.width
            ids = row.ids[done : done + self._limit(row)]
            whole = self._whole(row)
            chunk = self.forward.prefill([ids], cache, offset=row.offset, all_logits=scored, wholes=[whole])
        row.offset = chunk.offset
        if row.scorer is not None:
            row.scorer.feed(chunk.logits[0], cache.width - chunk.logits.shape[1])
        return chunk.logits[:, -1] if cache.width == len(row.ids) else None

    def _advance_group(self, prefill: Prefill) -> Tensor:
        done = prefill.cache.lengths or [0] * len(prefill.rows)
        ids = [row.ids[n:] for row, n in zip(prefill.rows, done, strict=True)]
        scored = prefill.rows[0].scorer is not None
        wholes = [self._whole(row) for row in prefill.rows]
        chunk: Chunk = self.forward.prefill(ids, prefill.cache, all_logits=scored, wholes=wholes)
        for row, new, logits in zip(prefill.rows, ids, chunk.logits, strict=True):
            if row.scorer is not None:
                row.scorer.feed(logits[-len(new) :], 0)
        return chunk.logits[:, -1]

    def _whole(self, row: Row) -> int:
        """Tokens that count as a row's prompt: its text too, if `generate` would compute it anew as well."""
        return len(row.ids) if self.forward.recomputes else row.prompt_length

    def _limit(self, row: Row) -> int:
        """Tokens per forward."""
        if not self.chunks:
            return len(row.ids)
        return self.chunk if row.scorer is None else self._scored_chunk

    def _groupable(self, row: Row) -> bool:
        plain = not (row.request.model_inputs or row.alone or self.forward.is_encoder_decoder)
        return plain and row.offset == (0,) and self.pads

    @staticmethod
    def _to_go(row: Row, source: Source | None) -> int:
        return len(row.ids) - (0 if source is None else source.length)

    def _aligned(
        self, sources: Sequence[Source | None], rows: Sequence[Row], longest: int
    ) -> list[Source | None] | None:
        """Sources cut so that every row has `longest` tokens to go; None where that cannot be."""
        aligned: list[Source | None] = []
        for row, source in zip(rows, sources, strict=True):
            if source is not None:
                cut = source.cut + longest - self._to_go(row, source)
                if cut >= source.cache.lengths[source.index] or not source.cache.holds(source.index, cut):
                    return None
                source = Source(source.cache, source.index, cut)
            aligned.append(source)
        return aligned
