"""What the demo model can do: generators of chats whose right answer is known.

Standard library only. Every generator takes a seeded `random.Random` and a split; training draws from "train",
everything else from "heldout", and no payload (nonce, word, pair of numbers, key and value, code) is in both.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from model_loaders.demo.worlds import Message, Split, in_split, nonce

LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALNUM = LETTERS + LETTERS.upper() + "0123456789"
SEPARATORS = ("\n", ", ")
_SYMBOLS = "éüñßøžλΩжшдя中文字日本語한국어🦊🐙🌍🚀😀😎🎉🍕👍🏽€→✓"
_WORDS = [
    "apple",
    "river",
    "table",
    "green",
    "stone",
    "cloud",
    "house",
    "music",
    "paper",
    "light",
    "bread",
    "horse",
    "winter",
    "summer",
    "garden",
    "window",
    "yellow",
    "silver",
    "orange",
    "bottle",
    "letter",
    "number",
    "simple",
    "travel",
    "market",
    "planet",
    "forest",
    "castle",
]
_SYSTEMS = ("You are a helpful assistant.", "Answer with the result only.", "You are a careful assistant.", "Be brief.")


@dataclass(frozen=True)
class Task:
    """A chat and the one right answer to its last message.

    Attributes:
        kind: name of the skill, a key of `TASKS`.
        messages: the chat in the OpenAI shape, ending with a user message.
        answer: the exact text the model is expected to give.
    """

    kind: str
    messages: tuple[Message, ...]
    answer: str

    def correct(self, text: str) -> bool:
        """Whether `text`, surrounding white space aside, is the right answer."""
        return text.strip() == self.answer


def _task(rng: random.Random, kind: str, prompt: str, answer: str) -> Task:
    user = {"role": "user", "content": prompt}
    if rng.random() < 0.6:
        return Task(kind, (user,), answer)
    return Task(kind, ({"role": "system", "content": rng.choice(_SYSTEMS)}, user), answer)


def _draw(rng: random.Random, split: Split, make: Callable[[random.Random], str]) -> str:
    while True:
        payload = make(rng)
        if in_split(payload, split):
            return payload


def _repeated(rng: random.Random) -> str:
    return nonce(rng, rng.randint(6, 16), rng.choice((ALNUM, ALNUM, LETTERS + "0123456789", ALNUM + "-_")))


def _symbols(rng: random.Random) -> str:
    return "".join(rng.choice(_SYMBOLS if rng.random() < 0.6 else ALNUM) for _ in range(rng.randint(4, 10)))


_REPEATS = (
    "Repeat exactly: {}",
    "Repeat this string and nothing else: {}",
    "Echo {}",
    "Please repeat after me: {}",
    "Say {}",
)


def repeat_task(rng: random.Random, split: Split = "heldout") -> Task:
    """Repeat a nonce of 6 to 16 letters and digits (a quarter of them may hold - and _)."""
    text = _draw(rng, split, _repeated)
    return _task(rng, "repeat", rng.choice(_REPEATS).format(text), text)


def unicode_task(rng: random.Random, split: Split = "heldout") -> Task:
    """Repeat 4 to 10 characters, many of them of two to four bytes (accents, CJK, emoji)."""
    text = _draw(rng, split, _symbols)
    return _task(rng, "unicode", rng.choice(_REPEATS).format(text), text)


def _word(rng: random.Random) -> str:
    length = rng.randint(3, 8)
    choice = rng.random()
    if choice < 0.1:
        return rng.choice(_WORDS)
    if choice < 0.5:
        return nonce(rng, length, LETTERS)
    start = rng.randrange(2)
    return "".join(rng.choice("aeiou" if (i + start) % 2 else "bcdfghjklmnprstvwz") for i in range(length))


def reverse_task(rng: random.Random, split: Split = "heldout") -> Task:
    """Reverse a word of 3 to 8 lower-case letters."""
    word = _draw(rng, split, _word)
    template = rng.choice(
        ("Reverse the word {}", "Reverse: {}", "Write {} backwards.", "Spell the word {} in reverse.")
    )
    return _task(rng, "reverse", template.format(word), word[::-1])


def add_task(rng: random.Random, split: Split = "heldout") -> Task:
    """Add two numbers from 10 to 99."""
    a, b = _draw(rng, split, lambda r: f"{r.randint(10, 99)}+{r.randint(10, 99)}").split("+")
    template = rng.choice(("What is {} + {}?", "Add {} and {}."))
    return _task(rng, "add", template.format(a, b), str(int(a) + int(b)))


def lookup_task(rng: random.Random, split: Split = "heldout") -> Task:
    """Say the value of one key of three to five pairs listed in the prompt, as the pair that it stands in: K=x7q.

    Keys are capital letters; values are three small letters or digits, none of them twice in a prompt.
    """
    keys = rng.sample(LETTERS.upper(), rng.randint(3, 5))
    chosen = rng.randrange(len(keys))

    def draw(rng: random.Random) -> str:
        characters = "".join(rng.sample(LETTERS + "0123456789", 3 * len(keys)))
        own = characters[3 * chosen : 3 * chosen + 3]
        return f"{keys[chosen]}={own}={characters}"

    characters = _draw(rng, split, draw).rpartition("=")[2]
    values = [characters[i : i + 3] for i in range(0, len(characters), 3)]
    pairs = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
    question = rng.choice(("What is the value of {}?", "Give the value of {}."))
    prompt = f"{rng.choice(SEPARATORS).join(pairs)}\n{question.format(keys[chosen])}"
    return _task(rng, "lookup", prompt, pairs[chosen])


TASKS: dict[str, Callable[..., Task]] = {
    "repeat": repeat_task,
    "reverse": reverse_task,
    "add": add_task,
    "lookup": lookup_task,
    "unicode": unicode_task,
}


def make_tasks(count: int, seed: int, kinds: tuple[str, ...] = ("repeat", "reverse", "add", "lookup")) -> list[Task]:
    """`count` held-out tasks, the kinds taking turns; the same seed gives the same list."""
    rng = random.Random(seed)
    return [TASKS[kinds[i % len(kinds)]](rng) for i in range(count)]
