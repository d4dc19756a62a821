"""Penalties and biases of a sequence, as sparse edits of its logits.

Kept on the host as numpy arrays that grow with the sequence, so that the edits of all sequences of a step are
concatenated and applied by a handful of tensor operations, whatever the number of sequences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class TokenCounts:
    """How often each token id has occurred; the distinct ids in order of first occurrence."""

    def __init__(self, ids: Iterable[int] = (), *, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        counted = {token_id: count for token_id, count in Counter(ids).items() if 0 <= token_id < vocab_size}
        self._slots = {token_id: slot for slot, token_id in enumerate(counted)}
        room = max(64, len(counted))
        self._ids = np.zeros(room, dtype=np.int64)
        self._counts = np.zeros(room, dtype=np.float32)
        self._ids[: len(counted)] = list(counted.keys())
        self._counts[: len(counted)] = list(counted.values())

    def add(self, token_id: int) -> None:
        """Count one occurrence. Ids outside the vocabulary (placeholders of images) have no logit and are left out."""
        if not 0 <= token_id < self._vocab_size:
            return
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> Ids:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> Floats:
        return self._counts[: len(self._slots)]


class Penalties:
    """The repetition, presence and frequency penalties and the biases of one sequence.

    Args:
        prompt_ids: the tokens the model was given; only the repetition penalty counts them.
        repetition: divides positive and multiplies negative logits of seen tokens (CTRL, arXiv:1909.05858).
        presence, frequency: logit[t] -= presence * (count[t] > 0) + frequency * count[t], over generated tokens
            (https://platform.openai.com/docs/api-reference, "frequency_penalty").
        bias: added to the logits of these ids.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        repetition: float = 1.0,
        presence: float = 0.0,
        frequency: float = 0.0,
        bias: Mapping[int, float] | None = None,
    ) -> None:
        self.repetition = repetition
        self._presence = presence
        self._frequency = frequency
        self._seen = TokenCounts(prompt_ids, vocab_size=vocab_size) if repetition != 1.0 else None
        self._generated = TokenCounts(vocab_size=vocab_size) if presence or frequency else None
        kept = {t: b for t, b in (bias or {}).items() if 0 <= t < vocab_size}
        self._bias_ids = np.fromiter(kept.keys(), dtype=np.int64, count=len(kept))
        self._bias = np.fromiter(kept.values(), dtype=np.float32, count=len(kept))
        self.any = bool(self._seen or self._generated or kept)

    def add(self, token_id: int) -> None:
        """Add a generated token."""
        if self._seen is not None:
            self._seen.add(token_id)
        if self._generated is not None:
            self._generated.add(token_id)

    def seen(self) -> Ids | None:
        """Ids under the repetition penalty."""
        return self._seen.ids if self._seen is not None else None

    def shifts(self) -> Iterable[tuple[Ids, Floats]]:
        """Ids and the numbers added to their logits."""
        if self._generated is not None:
            counts = self._generated.counts
            yield self._generated.ids, -(self._presence * (counts > 0) + self._frequency * counts).astype(np.float32)
        if len(self._bias_ids):
            yield self._bias_ids, self._bias


@dataclass(slots=True)
class Edits:
    """The edits of all sequences of one step, gathered sequence by sequence and applied at once."""

    vocab_size: int
    _repeated: list[Ids] = field(default_factory=list)
    _factors: list[Floats] = field(default_factory=list)
    _shifted: list[Ids] = field(default_factory=list)
    _shifts: list[Floats] = field(default_factory=list)
    _banned: list[Ids] = field(default_factory=list)

    def repeat(self, row: int, ids: Ids, factor: float) -> None:
        self._repeated.append(ids + row * self.vocab_size)
        self._factors.append(np.full(len(ids), factor, dtype=np.float32))

    def shift(self, row: int, ids: Ids, shifts: Floats) -> None:
        self._shifted.append(ids + row * self.vocab_size)
        self._shifts.append(shifts)

    def ban(self, row: int, ids: Ids) -> None:
        self._banned.append(ids[ids < self.vocab_size] + row * self.vocab_size)

    def weigh(self, scores: torch.Tensor) -> None:
        """Apply penalties, then biases, in place.

        Args:
            scores: float32 [rows, vocab], contiguous.
        """
        flat = scores.view(-1)
        if self._repeated:
            index, factor = _joined(self._repeated, flat.device), _joined(self._factors, flat.device)
            values = flat[index]
            flat[index] = torch.where(values < 0, values * factor, values / factor)
        if self._shifted:
            index, shift = _joined(self._shifted, flat.device), _joined(self._shifts, flat.device)
            flat.index_add_(0, index, shift)

    def forbid(self, scores: torch.Tensor) -> None:
        """Set banned tokens to -inf, in place."""
        if self._banned:
            scores.view(-1)[_joined(self._banned, scores.device)] = float("-inf")


def _joined(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(device, non_blocking=True)
