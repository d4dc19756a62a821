"""The captures of all replicas, of which each has its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast


class AllCaptures:
    """A `CaptureClient` over the stores of all replicas: the one that has a capture answers.

    Args:
        ask: calls a method of every store.
    """

    def __init__(self, ask: Callable[..., Awaitable[list[Any]]]) -> None:
        self._ask = ask

    async def handles(self, owner: str) -> list[dict[str, Any]]:
        """The handles of a key's captures."""
        return [handle for handles in await self._ask("handles", owner) for handle in handles]

    async def info(self, capture_id: str, owner: str) -> dict[str, Any] | None:
        """The handle of a capture whose file is complete; None if there is none."""
        return cast(dict[str, Any] | None, _first(await self._ask("info", capture_id, owner)))

    async def piece(self, capture_id: str, owner: str, offset: int, size: int) -> bytes | None:
        """Bytes of a capture's file; None if there is none."""
        return cast(bytes | None, _first(await self._ask("piece", capture_id, owner, offset, size)))

    async def delete(self, capture_id: str, owner: str) -> bool:
        """Drop a capture; False if there is none."""
        return any(await self._ask("delete", capture_id, owner))

    async def put_vector(self, data: bytes) -> str:
        """Keep a vector on every replica; its id."""
        return str(_first(await self._ask("put_vector", data)))


def _first(answers: Sequence[Any]) -> Any:
    return next((answer for answer in answers if answer is not None), None)
