"""Token ids: sequences of them, and which of them a model has."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

from deployments.core.errors import BadRequest

_PART = 1 << 14


class TokenIds(Sequence[int]):
    """Token ids as C ints. They are pickled as one block of memory, and equal a list or a tuple of the same ids."""

    __slots__ = ("_ids",)

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids = array("i")
        # In parts, so that other threads run in between.
        rest = iter(ids)
        while part := list(islice(rest, _PART)):
            self._ids.extend(part)

    @classmethod
    def from_bytes(cls, data: bytes) -> TokenIds:
        """The ids that `bytes` has written on this machine, or one like it."""
        made = cls()
        made._ids.frombytes(data)
        return made

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        if isinstance(index, int):
            return self._ids[index]
        made = TokenIds()
        made._ids = self._ids[index]
        return made

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def __bytes__(self) -> bytes:
        return self._ids.tobytes()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self._ids == other._ids
        if isinstance(other, list | tuple):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    def __hash__(self) -> int:
        return hash(bytes(self))

    def __repr__(self) -> str:
        return f"TokenIds({list(self[:20])}{' …' if len(self) > 20 else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds.from_bytes, (bytes(self),)


def vocab_size(model: Any) -> int | None:
    """How many token ids the model's input embedding has; None if it cannot be told."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return int(weight.shape[0]) if weight.dim() == 2 else None


def id_range(vocab: int | None) -> str:
    """The ids of a vocabulary in words."""
    return "ids of 0 and more" if vocab is None else f"the model's ids 0 to {vocab - 1}"


def known_ids(model: object, tokenizer: object) -> int | None:
    """How many token ids a model and its tokenizer have; None if neither says."""
    return max(vocab_size(model) or 0, getattr(tokenizer, "__len__", int)()) or None


def check_known(token_ids: Sequence[int], model: object, tokenizer: object) -> None:
    """Refuse ids that neither a model nor its tokenizer has; if neither says how many it has, any will do.

    Raises:
        BadRequest: it names the largest.
    """
    known = known_ids(model, tokenizer)
    if known and (largest := max(token_ids, default=0)) >= known:
        raise BadRequest(f"Token id {largest} does not exist; this model has ids 0 to {known - 1}.", param="tokens")
