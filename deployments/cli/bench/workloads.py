"""What `troupe bench` asks: kinds of conversations, and their prompts."""

from __future__ import annotations

import random
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
    """

    about: str
    words: int
    tokens: int
    turns: int = 1
    later_words: int = 0
    long_words: int = 0
    reconnects: bool = False


WORKLOADS: dict[str, Workload] = {
    "short": Workload("short questions", words=20, tokens=64),
    "words300": Workload("prompts of 300 words", words=300, tokens=64),
    "words2000": Workload("prompts of 2,000 words", words=2000, tokens=64),
    "agent6": Workload("agents of 6 turns", words=200, tokens=32, turns=6, later_words=60),
    "agent20": Workload("agents of 20 turns", words=200, tokens=32, turns=20, later_words=40),
    "mixed": Workload("long prompts beside streams", words=20, tokens=128, long_words=2000),
    "churn": Workload("a new connection for each request", words=5, tokens=4, reconnects=True),
}


def messages(workload: Workload, seed: int) -> Iterator[str]:
    """The user's messages of one conversation, one for each turn. Another seed gives other words from the first on."""
    chance = random.Random(seed)
    for turn in range(workload.turns):
        count = workload.words if turn == 0 else workload.later_words
        yield " ".join(chance.choice(_WORDS) for _ in range(count))


def long_message(workload: Workload, seed: int) -> str:
    """The prompt of a request beside the conversations."""
    chance = random.Random(seed)
    return " ".join(chance.choice(_WORDS) for _ in range(workload.long_words))
