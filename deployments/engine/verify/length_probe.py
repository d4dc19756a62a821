"""What a model computes for two prompts together, in pieces and one after the other, against each by itself.

By itself means: on modules in the state after loading, one prompt in one forward, then token by token. What is tried
against that runs on modules as earlier forwards left them, as requests do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from deployments.engine.cache.cache import AnyCache, EncoderBatchCache, new_cache
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.verify.prompts import ordinary_ids
from deployments.engine.verify.proofs import close
from deployments.engine.verify.refused import Unfaithful

_PIECE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What holds for two prompts.

    Attributes:
        decodes: nothing of one is kept outside its cache when the other is computed.
        chunks: a prompt may be computed in several forwards.
        pads: both may be computed in one forward, and decode together.
        mixes: both may decode together.
    """

    decodes: bool
    chunks: bool
    pads: bool
    mixes: bool


class LengthProbe:
    """Prompts of two lengths, of arbitrary tokens.

    Args:
        forward: the model's forward passes.
        long, short: tokens of the prompts; the short one has at least four.
    """

    def __init__(self, forward: Forward, long: int, short: int) -> None:
        self.forward = forward
        ids = ordinary_ids(forward.model, long + short)
        self.long, self.short = ids[:long], ids[long:]

    def claims(self) -> Claims:
        """Everything, tried in turn."""
        chunks = _holds(self._chunks)
        pads = not self.forward.is_encoder_decoder and _holds(self._pads) and (not chunks or _holds(self._grows))
        return Claims(chunks=chunks, pads=pads, mixes=_holds(self._mixes), decodes=_holds(self._decodes))

    def decodes_like_a_prompt(self) -> bool:
        """Whether a forward with a cache gives what the one without gives."""
        return close(self._expected[0], self.wholes[0])

    def alone(self, ids: Sequence[int]) -> tuple[AnyCache, Tensor]:
        """The cache and the last logits [vocab] of one forward over a prompt."""
        cache = new_cache(self.forward.model)
        if isinstance(cache, EncoderBatchCache):
            if not self.forward.tried and self.forward.model.main_input_name != "input_ids":
                raise Unfaithful(f"it cannot be tried: its encoder takes {self.forward.model.main_input_name}")
            chunk = self.forward.encode(self.long, self.forward.tried, ids, cache)
        else:
            chunk = self.forward.prefill([ids], cache)
        return cache, chunk.logits[0, -1]

    @cached_property
    def wholes(self) -> list[Tensor]:
        """The logits after each prompt in one forward, on fresh modules."""
        found = []
        for ids in (self.long, self.short):
            self.forward.fresh.reset()
            found.append(self.alone(ids)[1])
        return found

    @cached_property
    def _expected(self) -> list[Tensor]:
        """The logits after each prompt whose last token is decoded, on fresh modules."""
        found = []
        for ids in (self.long, self.short):
            self.forward.fresh.reset()
            cache, _ = self.alone(ids[:-1])
            found.append(self._decoded(cache, [ids])[0])
        return found

    def _decodes(self) -> bool:
        cache, _ = self.alone(self.long[:-1])
        self.alone(self.short)
        logits = self._decoded(cache, [self.long])
        _, after = self.alone(self.short)
        return close(logits[0], self._expected[0]) and close(after, self.wholes[1])

    def _chunks(self) -> bool:
        cache, done = new_cache(self.forward.model), 0
        if self.forward.is_encoder_decoder:
            done = len(self.long) // 2
            cache, _ = self.alone(self.long[:done])
        logits = None
        whole = len(self.long)
        # The last piece begins as late as can be, so that a window has lost what it loses.
        for end in sorted({min(4, whole // 2), 2 * whole // 3, whole - _PIECE, whole}):
            if end > done:
                chunk = self.forward.prefill([self.long[done:end]], cache, wholes=[whole])
                logits, done = chunk.logits[0, -1], end
        return logits is not None and close(logits, self.wholes[0])

    def _pads(self) -> bool:
        cache = new_cache(self.forward.model)
        self.forward.prefill([self.long[:-1], self.short[:-1]], cache)
        return self._as_expected(cache)

    def _grows(self) -> bool:
        """Several tokens for each of two sequences of different lengths."""
        prompts = [ids[:-1] for ids in (self.long, self.short)]
        cache, _ = self.alone(prompts[0][:-_PIECE])
        cache.append(self.alone(prompts[1][:-_PIECE])[0], 0)
        wholes = [len(ids) for ids in prompts]
        self.forward.prefill([ids[-_PIECE:] for ids in prompts], cache, wholes=wholes)
        return self._as_expected(cache)

    def _mixes(self) -> bool:
        cache, _ = self.alone(self.long[:-1])
        # A sequence that has left: what is still in its place must not count.
        cache.append(cache.copy_sequence(0), 0)
        cache.drop(1)
        cache.append(self.alone(self.short[:-1])[0], 0)
        return self._as_expected(cache)

    def _as_expected(self, cache: AnyCache) -> bool:
        """Whether the last tokens of both prompts, decoded together, have the logits of each by itself."""
        logits = self._decoded(cache, [self.long, self.short])
        return all(close(found, alone) for found, alone in zip(logits, self._expected, strict=True))

    def _decoded(self, cache: AnyCache, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [rows, vocab] after the last tokens of prompts whose others are in the cache."""
        return self.forward.decode([ids[-1] for ids in prompts], [NO_OFFSET] * len(prompts), cache)


def _holds(claim: Any) -> bool:
    try:
        return bool(claim())
    except Exception:
        return False
