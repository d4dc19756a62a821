"""What an ingress tells the router of a request beside its model: its conversation, and how its prompt begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.core.token_ids import TokenIds

BLOCK = 1024
"""Characters of a block of a prompt's text."""
_BLOCK_IDS = 256
_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class RoutingHint:
    """A hint for the router, as a text that fits into the session id of a request of Ray Serve.

    Attributes:
        session: the key of the conversation; empty if it is not known.
        blocks: digests of the prompt's beginning, of one block, of two blocks and so on. See `text_blocks`.
    """

    session: str = ""
    blocks: tuple[str, ...] = ()

    @classmethod
    def from_text(cls, text: str) -> RoutingHint:
        before, _, session = text.partition("|")
        return cls(session, tuple(before.split(",")) if before else ())

    def __str__(self) -> str:
        return f"{','.join(self.blocks)}|{self.session}"


def text_blocks(model: str, prompt: object) -> tuple[str, ...]:
    """Digests of the beginning of a prompt's texts: of the first 1,024 characters, of 2,048 and so on, up to 32,768.

    Two prompts that begin alike have their first digests in common. Nothing is said of a prompt of fewer characters.

    Args:
        model: its id, as prompts of two models share nothing.
        prompt: the texts, in lists and objects of JSON in the order in which the prompt has them.
    """
    digest = hashlib.blake2b(model.encode(), digest_size=8)
    blocks: list[str] = []
    room = BLOCK
    for text in _texts(prompt):
        digest.update(b"\0")
        start = 0
        while start < len(text):
            piece = text[start : start + room]
            digest.update(piece.encode("utf-8", "surrogatepass"))
            start += len(piece)
            room -= len(piece)
            if not room:
                blocks.append(digest.hexdigest())
                room = BLOCK
                if len(blocks) == _BLOCKS:
                    return tuple(blocks)
    return tuple(blocks)


def token_blocks(model: str, token_ids: Sequence[int]) -> tuple[str, ...]:
    """The same of token ids, for blocks of 256."""
    digest = hashlib.blake2b(f"{model}\0ids".encode(), digest_size=8)
    blocks: list[str] = []
    for start in range(0, min(len(token_ids) // _BLOCK_IDS, _BLOCKS) * _BLOCK_IDS, _BLOCK_IDS):
        digest.update(bytes(TokenIds(token_ids[start : start + _BLOCK_IDS])))
        blocks.append(digest.hexdigest())
    return tuple(blocks)


def _texts(value: object) -> Iterator[str]:
    """The texts of JSON values, in their order."""
    waiting: list[Any] = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting.extend([part for item in value.items() for part in item][::-1])
        elif isinstance(value, list | tuple):
            waiting.extend(value[::-1])
