"""Small generated worlds that an agent walks by text: observation in, `Action: command(argument)` out.

Every world hides a code made of random characters. What to do next, and the code itself, stand only in the
observations of that one episode, so an answer that belongs to another conversation scores 0.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Literal

Message = dict[str, str]
Split = Literal["train", "heldout"]

ROOMS = (
    "attic",
    "cellar",
    "garden",
    "kitchen",
    "library",
    "office",
    "porch",
    "shed",
    "stable",
    "study",
    "tower",
    "yard",
)
CONTAINERS = (
    "bag",
    "basket",
    "bowl",
    "box",
    "bucket",
    "case",
    "chest",
    "crate",
    "drawer",
    "jar",
    "pot",
    "tin",
    "trunk",
)
JUNK = ("a coin", "a rope", "a spoon", "dust", "old socks", "a candle")
COMMANDS = ("read", "go", "open", "take", "use", "finish")

_INSTRUCTIONS = (
    "You are an agent in a house. Answer each turn with one line, Action: command(argument). "
    "Commands: read, go, open, take, use, finish. Find the code, then end with Action: finish(code).",
    "Find the secret code. Reply with exactly one action per turn, as in Action: go(room). "
    "You can use read, go, open, take, use and finish. When you know the code, reply Action: finish(code).",
    "Task: find the code hidden in this house. Available actions: read(x), go(x), open(x), take(x), use(x), "
    "finish(code). Every reply is one line that starts with Action:",
)
_SEEN = ("You see: {}.", "Here: {}.", "There is: {}.")
_EMPTY = ("The {} is empty.", "Nothing in the {}.", "The {} holds {}.")
_ACTION = re.compile(r"Action:\s*([A-Za-z_]+)\s*\(([^()\n]*)\)")


def nonce(rng: random.Random, length: int, alphabet: str = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789") -> str:
    """A string of `length` characters drawn from `alphabet`."""
    return "".join(rng.choice(alphabet) for _ in range(length))


def in_split(key: str, split: Split) -> bool:
    """Whether a payload belongs to `split`: one in eight, by its CRC-32, is held out from training."""
    return (zlib.crc32(key.encode()) % 8 == 0) == (split == "heldout")


@dataclass(frozen=True)
class Step:
    """What the world answers to one action: the next message (None once done), and the score at the end."""

    observation: Message | None
    done: bool
    score: float


@dataclass
class World:
    """One episode. `reset()` gives the opening messages, `step(text)` takes the agent's answer.

    kind: "search" (one hidden code), "vault" (a key, then a vault) or "parts" (a code in two halves).
    The episode ends with finish(...), score 1.0 for the right code and 0.0 otherwise, or after `max_steps`
    answers with score 0.0. An action that cannot be parsed or done is answered by an error and counts.
    """

    kind: str
    code: str
    targets: tuple[str, ...]
    layout: dict[str, dict[str, str]]
    style: int
    key: str = ""
    max_steps: int = 20
    room: str = field(default="hall", init=False)
    steps: int = field(default=0, init=False)
    errors: int = field(default=0, init=False)
    _seen: list[str] = field(default_factory=list, init=False)

    def reset(self) -> list[Message]:
        """Start over; returns the opening messages of the chat, the last of them from the user."""
        self.room, self.steps, self.errors, self._seen = "hall", 0, 0, []
        instruction = _INSTRUCTIONS[self.style % 3]
        first = self._look()
        form = self.style // 3 % 3
        if form == 0:
            return [{"role": "user", "content": f"{instruction}\n\n{first}"}]
        if form == 1:
            return [{"role": "system", "content": instruction}, {"role": "user", "content": first}]
        return [
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": "OK."},
            {"role": "user", "content": first},
        ]

    def step(self, text: str) -> Step:
        """Take the agent's answer; its first `Action: command(argument)` counts."""
        self.steps += 1
        found = _ACTION.search(text)
        if found and found[1] == "finish":
            return Step(None, True, float(found[2].strip() == self.code))
        if self.steps >= self.max_steps:
            return Step(None, True, 0.0)
        if not found:
            reply = self._error("answer with Action: command(argument)")
        else:
            reply = self._act(found[1], found[2].strip())
        return Step({"role": "user", "content": reply}, False, 0.0)

    def policy(self) -> str:
        """The best next answer: follow the note, open containers in the order listed, finish with the code."""
        return f"Action: {self._next()}"

    def _next(self) -> str:
        if "note" not in self._seen:
            return "read(note)"
        for target in self.targets:
            if target in self._seen:
                if self.kind == "vault" and self.key not in self._seen:
                    return f"take({self.key})"
                continue
            where, what = target.split("/")
            if self.room != where:
                return f"go({where})"
            if what == "vault":
                return f"use({self.key})"
            tried = (name for name in self.layout[where] if f"{where}/{name}" not in self._seen)
            return f"open({next(tried)})"
        return f"finish({self.code})"

    def _look(self) -> str:
        if self.room == "hall":
            return f"You are in the hall. {self._listing(['note'])} Exits: {', '.join(self.layout)}."
        return f"You are in the {self.room}. {self._listing(list(self.layout[self.room]))}"

    def _listing(self, names: list[str]) -> str:
        return _SEEN[self.style % len(_SEEN)].format(", ".join(names))

    def _error(self, reason: str) -> str:
        self.errors += 1
        return f"Error: {reason}."

    def _act(self, command: str, argument: str) -> str:
        if command == "read":
            return self._read(argument)
        if command == "go":
            return self._go(argument)
        if command == "open":
            return self._open(argument)
        if command == "take":
            return self._take(argument)
        if command == "use":
            return self._use(argument)
        return self._error(f"unknown command {command}")

    def _read(self, name: str) -> str:
        if self.room != "hall" or name != "note":
            return self._error(f"no {name} to read here")
        self._seen.append("note")
        first = self.targets[0].split("/")[0]
        if self.kind == "search":
            return f"The note says: the code is in the {first}."
        if self.kind == "vault":
            return f"The note says: the key is in the {first}."
        second = self.targets[1].split("/")[0]
        return f"The note says: part one is in the {first}, part two is in the {second}."

    def _go(self, name: str) -> str:
        if name not in self.layout and name != "hall":
            return self._error(f"no room {name}")
        self.room = name
        return self._look()

    def _open(self, name: str) -> str:
        content = self.layout.get(self.room, {}).get(name)
        if content is None or name == "vault":
            return self._error(f"cannot open {name} here")
        self._seen.append(f"{self.room}/{name}")
        if content in ("", *JUNK):
            empty = _EMPTY[2 if content else self.style % 2]
            return empty.format(name, content)
        return f"In the {name}: {content}."

    def _take(self, name: str) -> str:
        if self.kind != "vault" or name != self.key or self.targets[0] not in self._seen:
            return self._error(f"cannot take {name} here")
        self._seen.append(name)
        return f"You have {name}. Its tag says: {self.targets[1].split('/')[0]}."

    def _use(self, name: str) -> str:
        if self.kind != "vault" or name != self.key or name not in self._seen:
            return self._error(f"you do not have {name}")
        if "vault" not in self.layout.get(self.room, {}):
            return self._error("nothing to use it on here")
        self._seen.append(f"{self.room}/vault")
        return f"The vault opens. Inside: code {self.code}."


def make_world(rng: random.Random, split: Split = "heldout", kind: str | None = None) -> World:
    """A fresh world of the given kind (any, when None) whose code belongs to `split`; 5 to 10 answers long."""
    kind = kind or rng.choice(("search", "vault", "parts"))
    code = nonce(rng, 6)
    while not in_split(code, split):
        code = nonce(rng, 6)
    rooms = rng.sample(ROOMS, rng.randint(2, 4))
    layout: dict[str, dict[str, str]] = {}
    for room in rooms:
        names = rng.sample(CONTAINERS, rng.randint(2, 3))
        layout[room] = {name: rng.choice(JUNK) if rng.random() < 0.3 else "" for name in names}
    first, second = rng.sample(rooms, 2)
    style = rng.randrange(9)
    if kind == "search":
        name = rng.choice(list(layout[first])[1:])
        layout[first][name] = f"code {code}"
        return World(kind, code, (f"{first}/{name}",), layout, style)
    name = rng.choice(list(layout[first]))
    if kind == "vault":
        key = nonce(rng, 4, "abcdefghjkmnpqrstuvwxyz23456789")
        layout[first][name] = f"key {key}"
        place = rng.randrange(len(layout[second]) + 1)
        items = list(layout[second].items())
        layout[second] = dict([*items[:place], ("vault", "locked"), *items[place:]])
        return World(kind, code, (f"{first}/{name}", f"{second}/vault"), layout, style, key)
    other = rng.choice(list(layout[second]))
    layout[first][name] = f"part one {code[:3]}, part two is in the {second}"
    layout[second][other] = f"part two {code[3:]}"
    return World(kind, f"{code[:3]}-{code[3:]}", (f"{first}/{name}", f"{second}/{other}"), layout, style)
