"""The demo model with two adapters that were trained (tests/adapters/train.py): each answers in a way of its own."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from model_loaders.demo.tasks import Task, make_tasks
from tests.adapters.train import ANSWERS, HERE
from tests.openai.conftest import Serve

BASE = {"id": "base", "loader": "model_loaders.demo:load_model", "engine": {"threads": 1, "max_batch_size": 24}}
KINDS = {"base": ("add", "repeat"), "capitals": ("repeat", "lookup"), "one_more": ("add", "repeat")}


def test_every_answer_is_of_the_adapter_that_was_asked(serve: Serve) -> None:
    """Requests of both adapters and of the base at once; a mixed-up one would give another's answer."""
    adapters = [{"id": name, "base": "base", "adapter": str(HERE / name)} for name in ANSWERS]
    client = serve([BASE, *adapters]).client()
    asked = [(name, task) for name, kinds in KINDS.items() for task in make_tasks(12, 7, kinds)]
    random.Random(0).shuffle(asked)

    def answer(given: tuple[str, Task]) -> str:
        name, task = given
        messages: Any = list(task.messages)
        found = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=24)
        return (found.choices[0].message.content or "").strip()

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(answer, asked))
    right: Counter[str] = Counter()
    for (name, task), text in zip(asked, texts, strict=True):
        answers = {other: ANSWERS[other](task) for other in ANSWERS} | {"base": task.answer}
        right[name] += text == answers[name]
        others = {found for other, found in answers.items() if other != name and found != answers[name]}
        assert text not in others, (name, task, text)
    assert min(right[name] for name in KINDS) >= 9, right
