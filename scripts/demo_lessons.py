"""What the demo model is trained on: rows of tokens, and which of them it has to say, in the order it learns them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from model_loaders.demo import tasks, worlds

EARLY = {"repeat": 0.22, "reverse": 0.2, "add": 0.16, "lookup": 0.35, "unicode": 0.07}
LATER = {"repeat": 0.14, "reverse": 0.18, "add": 0.42, "lookup": 0.14, "unicode": 0.12}
LAST = {"repeat": 0.12, "reverse": 0.1, "add": 0.5, "lookup": 0.05, "unicode": 0.23}
FILLER = "the house had a small red door and nobody knew who lived there since the winter came to the old town"
Row = tuple[list[int], list[int]]  # token ids, labels


def render(messages: list[worlds.Message], supervised: set[int]) -> Row:
    """Token ids of a chat, and labels that are -100 outside of the supervised messages."""
    ids: list[int] = []
    labels: list[int] = []
    for index, message in enumerate(messages):
        head = [257, *f"{message['role']}\n".encode()]
        body = [*message["content"].encode(), 258]
        ids += [*head, *body, 10]
        labels += [-100] * len(head) + (body if index in supervised else [-100] * len(body)) + [-100]
    return ids, labels


def short_chat(rng: random.Random, mix: dict[str, float]) -> tuple[list[worlds.Message], set[int]]:
    """One to four tasks asked one after the other in one chat."""
    messages: list[worlds.Message] = []
    supervised = set()
    for turn in range(rng.choice((1, 1, 2, 4))):
        kind = rng.choices(list(mix), list(mix.values()))[0]
        task = tasks.TASKS[kind](rng, "train")
        asked = list(task.messages) if turn == 0 else [task.messages[-1]]
        if turn == 0 and rng.random() < 0.08:
            asked.insert(0, {"role": "system", "content": " ".join(rng.choices(FILLER.split(), k=rng.randint(5, 60)))})
        messages += [*asked, {"role": "assistant", "content": task.answer}]
        supervised.add(len(messages) - 1)
    return messages, supervised


def episode(rng: random.Random) -> tuple[list[worlds.Message], set[int]]:
    """A world walked by its policy, now and then with a mistake that the world refuses and that is not learned."""
    world = worlds.make_world(rng, "train", rng.choice(("search", "vault", "parts", "parts")))
    messages = world.reset()
    supervised = set()
    clumsy = rng.random() < 0.2
    while True:
        wrong = clumsy and rng.random() < 0.2
        if wrong:
            thing = rng.choice((*worlds.CONTAINERS, *worlds.ROOMS))
            text = rng.choice(
                (f"Action: open({thing})", f"Action: go({thing})", f"Action: take({thing})", "Hm, let me think.")
            )
        else:
            text = world.policy()
        messages.append({"role": "assistant", "content": text})
        if not wrong:
            supervised.add(len(messages) - 1)
        step = world.step(text)
        if step.observation is None:
            return messages, supervised
        messages.append(step.observation)


def periodic(rng: random.Random, length: int) -> Row:
    """A random string again and again; all but its first time is learned."""
    alphabet = rng.choice((tasks.ALNUM, tasks.ALNUM, tasks.LETTERS, tasks.LETTERS + "0123456789"))
    unit = worlds.nonce(rng, rng.randint(2, length * 3 // 8), alphabet).encode()
    ids = [*(unit * (length // len(unit) + 1))[:length]]
    return ids, [-100] * len(unit) + ids[len(unit) :]


def pairs(rng: random.Random, length: int) -> Row:
    """Keys and values, listed again and again in another order; all but the first values are learned."""
    keys = rng.sample(tasks.LETTERS.upper(), rng.randint(2, max(2, min(5, length // 18))))
    characters = "".join(rng.sample(tasks.LETTERS + "0123456789", 3 * len(keys)))
    values = {key: characters[3 * i : 3 * i + 3] for i, key in enumerate(keys)}
    between = rng.choice(tasks.SEPARATORS)
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < length:
        known = bool(ids)
        for key in rng.sample(keys, len(keys)):
            head, value = f"{key}=".encode(), values[key].encode()
            ids += [*head, *value, *between.encode()]
            labels += [-100] * len(head) + (list(value) if known else [-100] * 3) + [-100] * len(between)
    return ids, labels


def chats(rng: random.Random, length: int, mix: dict[str, float], share: float = 0.0) -> Row:
    """Chats one after the other in about `length` tokens; with a chance of `share` one of them is an episode."""
    parts = []
    room = length
    if rng.random() < share:
        parts.append(render(*episode(rng)))
        room -= len(parts[0][0])
    while room > 60:
        parts.append(render(*short_chat(rng, mix)))
        room -= len(parts[-1][0])
    if room < 0 and len(parts) > 1:
        parts.pop()
    rng.shuffle(parts)
    return [token for part in parts for token in part[0]], [label for part in parts for label in part[1]]


def stack(rows: list[Row], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows cut or padded to `length`: ids and labels, both int64 [rows, length]."""
    ids = [(row[0] + [256] * length)[:length] for row in rows]
    labels = [(row[1] + [-100] * length)[:length] for row in rows]
    return torch.tensor(ids), torch.tensor(labels)


def second_cycle(steps: int) -> int:
    """How many steps follow the first `steps`."""
    return steps // 3


def batches(seed: int, steps: int, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a run, ids and labels, int64 [rows, length]: `tokens` in each, twice as many in the longest rows.

    There are `steps` of them, then a third as many larger ones for what is learned last: sums, symbols of many bytes.

    Finding what followed an earlier token is learned within some hundred steps on rows of 16 and 32 tokens, and not
    within thousands on rows of 128: so strings and lists first, then chats, then rows of 1024 with an episode each.
    """
    rng = random.Random(seed)
    for step in range(steps):
        done = step / steps
        if done < 0.075:
            length, made = ((16, periodic), (32, periodic), (48, pairs), (48, pairs))[int(done / 0.075 * 4)]
            yield stack([made(rng, length) for _ in range(tokens // length)], length)
        elif done < 0.36:
            listed = 0.5 if done < 0.13 else 0.0
            some = [pairs(rng, 128) if rng.random() < listed else chats(rng, 128, EARLY) for _ in range(tokens // 128)]
            yield stack(some, 128)
        elif step % (3 if done < 0.7 else 2):
            yield stack([chats(rng, 128, LATER) for _ in range(tokens // 128)], 128)
        else:
            yield stack([chats(rng, 1024, LATER, 0.9) for _ in range(tokens // 512)], 1024)
    for step in range(second_cycle(steps)):
        length, share = (128, 0.0) if step % 3 else (1024, 0.9)
        yield stack([chats(rng, length, LAST, share) for _ in range(2 * tokens // length)], length)
