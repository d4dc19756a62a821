from __future__ import annotations

import random
import subprocess
import sys

import pytest

from model_loaders.demo import tasks, worlds


@pytest.mark.parametrize("kind", tasks.TASKS)
def test_the_same_seed_gives_the_same_tasks(kind: str) -> None:
    make = tasks.TASKS[kind]
    first = [make(random.Random(seed)) for seed in range(20)]
    assert first == [make(random.Random(seed)) for seed in range(20)]
    assert len({str(task.messages) for task in first}) > 15
    assert all(task.kind == kind and task.messages[-1]["role"] == "user" for task in first)


def test_answers_follow_from_the_prompts() -> None:
    for task in tasks.make_tasks(400, seed=3, kinds=tuple(tasks.TASKS)):
        prompt = task.messages[-1]["content"]
        if task.kind in ("repeat", "unicode"):
            assert prompt.endswith(task.answer)
        elif task.kind == "reverse":
            assert task.answer[::-1] in prompt
        elif task.kind == "add":
            a, b = (int(word) for word in prompt.replace("?", "").replace(".", "").split() if word.isdigit())
            assert int(task.answer) == a + b
        elif task.kind == "lookup":
            listed, _, question = prompt.rpartition("\n")
            key, _, value = task.answer.partition("=")
            assert f" {key}" in question
            assert value in listed
            assert listed.count(task.answer) == 1
        assert task.correct(f" {task.answer}\n")
        assert not task.correct(task.answer + "x")


def test_training_and_held_out_payloads_are_disjoint() -> None:
    rng = random.Random(0)
    for make in tasks.TASKS.values():
        trained = {make(rng, "train").messages[-1]["content"] for _ in range(1500)}
        assert not trained & {make(rng).messages[-1]["content"] for _ in range(300)}
    codes = {worlds.make_world(rng, "train").code for _ in range(500)}
    assert not codes & {worlds.make_world(rng).code for _ in range(500)}
    assert worlds.in_split("a", "train") != worlds.in_split("a", "heldout")


@pytest.mark.parametrize("kind", ["search", "vault", "parts"])
def test_the_policy_solves_every_world(kind: str) -> None:
    rng = random.Random(5)
    for _ in range(100):
        world = worlds.make_world(rng, kind=kind)
        assert world.reset()[-1]["role"] == "user"
        step = worlds.Step(None, False, 0.0)
        while not step.done:
            step = world.step(world.policy())
        assert step.score == 1.0
        assert world.errors == 0
        assert 5 <= world.steps <= 10


def test_a_wrong_code_scores_nothing() -> None:
    world = worlds.make_world(random.Random(1))
    world.reset()
    assert world.step("Action: finish(NOPE)") == worlds.Step(None, True, 0.0)


def test_bad_actions_are_answered_by_an_error_and_count() -> None:
    world = worlds.make_world(random.Random(2), kind="vault")
    world.reset()
    bad = ["I do not know", "Action: fly(moon)", "Action: go(moon)", "Action: open(vault)", "Action: take(sun)"]
    bad += ["Action: use(key)", "Action: read(book)", ""]
    for count, text in enumerate(bad, start=1):
        step = world.step(text)
        assert step.observation is not None
        assert step.observation["content"].startswith("Error: ")
        assert (world.errors, world.steps) == (count, count)
    while not (step := world.step(world.policy())).done:
        pass
    assert step.score == 1.0


def test_an_endless_episode_is_ended() -> None:
    world = worlds.make_world(random.Random(3))
    world.reset()
    steps = [world.step("Action: go(hall)") for _ in range(world.max_steps)]
    assert [step.done for step in steps] == [False] * (world.max_steps - 1) + [True]
    assert steps[-1].score == 0.0


def test_reset_starts_over() -> None:
    world = worlds.make_world(random.Random(4))
    first = world.reset()
    world.step(world.policy())
    assert world.reset() == first
    assert world.policy() == "Action: read(note)"


def test_generators_need_no_torch() -> None:
    code = "import sys; from model_loaders.demo import tasks; tasks.make_tasks(8, 0); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
