"""What `troupe bench` asks: kinds of conversations, and their prompts."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_WORDS = (
    *("river", "stone", "window", "garden", "letter", "winter", "summer", "market", "bridge", "forest", "paper"),
    *("silver", "morning", "evening", "station", "doctor", "village", "teacher", "music", "kitchen", "engine"),
    *("island", "harbor", "mountain", "number", "answer", "question", "travel", "history", "science", "animal"),
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A kind of conversation. Numbers of words are those of the user's messages; a word is one or two tokens.

    Attributes:
        about: what it stands for.
        words: of the first message.
        tokens: of each answer, at most.
        turns: messages of a conversation; each prompt has the ones before, and their answers.
        later_words: of the second message and those after it.
        long_words: of prompts that are sent one after the other while the conversations run; 0 for none.
        reconnects: every request has a connection of its own.
        scored: prompts of a request for log-probabilities, as lm_eval sends them; 0 for a chat.
        image: pixels of each side of a picture in the first message; 0 for none.
    """

    about: str
    words: int
    tokens: int
    turns: int = 1
    later_words: int = 0
    long_words: int = 0
    reconnects: bool = False
    scored: int = 0
    image: int = 0


WORKLOADS: dict[str, Workload] = {
    "short": Workload("short questions", words=20, tokens=64),
    "words200": Workload("prompts of 200 words", words=200, tokens=64),
    "words300": Workload("prompts of 300 words", words=300, tokens=64),
    "words2000": Workload("prompts of 2,000 words", words=2000, tokens=64),
    "agent6": Workload("agents of 6 turns", words=200, tokens=32, turns=6, later_words=60),
    "agent20": Workload("agents of 20 turns", words=200, tokens=32, turns=20, later_words=40),
    "score": Workload("log-probabilities of texts, as lm_eval asks for them", words=100, tokens=1, scored=16),
    "mixed": Workload("long prompts beside streams", words=20, tokens=128, long_words=2000),
    "churn": Workload("a new connection for each request", words=5, tokens=4, reconnects=True),
    "image": Workload("questions about a picture", words=10, tokens=32, image=224),
}


def positions(name: str) -> int:
    """Tokens of the longest conversation of a workload, at most: two for each word, and some for the template."""
    workload = WORKLOADS[name]
    words = max(workload.words + (workload.turns - 1) * workload.later_words, workload.long_words)
    return 2 * words + workload.turns * (workload.tokens + 32)


def messages(workload: Workload, seed: int) -> Iterator[str]:
    """The user's messages of one conversation, one for each turn. Another seed gives other words from the first on."""
    chance = random.Random(seed)
    for turn in range(workload.turns):
        yield _text(chance, workload.words if turn == 0 else workload.later_words)


def long_message(workload: Workload, seed: int) -> str:
    """The prompt of a request beside the conversations."""
    return _text(random.Random(seed), workload.long_words)


def texts(workload: Workload, seed: int) -> list[str]:
    """The texts of a request for log-probabilities."""
    chance = random.Random(seed)
    return [_text(chance, workload.words) for _ in range(workload.scored)]


def picture(side: int, seed: int) -> str:
    """A PNG of colored squares, as a data URL."""
    chance = random.Random(seed)
    colors = [[chance.randbytes(3) for _ in range(8)] for _ in range(8)]
    rows = (b"\0" + b"".join(colors[8 * y // side][8 * x // side] for x in range(side)) for y in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", head), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")
    data = b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _text(chance: random.Random, count: int) -> str:
    return " ".join(chance.choice(_WORDS) for _ in range(count))
