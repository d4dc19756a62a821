"""What the demo model is trained on."""

from __future__ import annotations

import random

import torch

from model_loaders.demo import tasks, worlds
from scripts.demo_lessons import Row, batches, chats, pairs, periodic, render

STEPS, TOKENS = 200, 1024


def learned(row: Row) -> list[bytes]:
    """The runs of tokens that a row teaches, as bytes up to the end of the answer."""
    runs: list[bytes] = [b""]
    for token, label in zip(*row, strict=True):
        assert label in (-100, token)
        if label == -100 and runs[-1]:
            runs.append(b"")
        elif label not in (-100, 258):
            runs[-1] += bytes([label])
    return [run for run in runs if run]


def test_a_seed_makes_the_same_batches() -> None:
    first, again, other = (list(batches(seed, STEPS, TOKENS)) for seed in (1, 1, 2))
    assert len(first) == STEPS + STEPS // 3
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][0], other[0][0])
    assert [ids.shape[1] for ids, _ in first[:15]] == [16] * 4 + [32] * 4 + [48] * 7
    assert {tuple(ids.shape) for ids, _ in first[15:STEPS]} == {(8, 128), (2, 1024)}
    assert {tuple(ids.shape) for ids, _ in first[STEPS:]} == {(16, 128), (2, 1024)}
    for ids, labels in first:
        assert ids.shape == labels.shape
        assert bool(((labels == ids) | (labels == -100)).all())
        assert bool((labels != -100).any())


def test_answers_alone_are_learned_in_chats() -> None:
    chat = [{"role": "user", "content": "Say é"}, {"role": "assistant", "content": "é"}]
    row = render(chat, {1})
    assert learned(row) == ["é".encode()]
    assert row[0][-2:] == [258, 10], "the end of the answer is learned, the line break after it is not"
    assert row[1][-2:] == [258, -100]
    assert not learned(render(chat, set()))


def test_what_is_learned_stands_in_the_row_already() -> None:
    rng = random.Random(3)
    for _ in range(50):
        ids, labels = periodic(rng, 32)
        told = labels.count(-100)
        assert ids[told:] == ids[: len(ids) - told]
        row = pairs(rng, 48)
        values = learned(row)
        assert values
        assert all(bytes(row[0]).count(value) > values.count(value) for value in values)


def test_no_held_out_payload_is_learned() -> None:
    rng = random.Random(4)
    mix = dict.fromkeys(tasks.TASKS, 1.0)
    said = [text.decode() for _ in range(300) for text in learned(chats(rng, 400, mix, 0.5))]
    codes = {text[15:-1] for text in said if text.startswith("Action: finish(")}
    assert len(codes) > 50
    assert all(worlds.in_split(code.replace("-", ""), "train") for code in codes)
    words = {text for text in said if text.isalpha() and text.islower() and 3 <= len(text) <= 8}
    held_out = {tasks.reverse_task(rng).answer for _ in range(500)}
    assert len(words) > 100
    assert not words & held_out
