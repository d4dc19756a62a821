"""How much of its weights a model has loaded."""

from __future__ import annotations

import threading
from pathlib import Path

from transformers import AutoModelForCausalLM

from model_loaders.weights.progress import counted_weights, loaded_parts
from tests.tiny import llama


def test_the_weights_of_a_loader_are_counted_while_it_runs(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    seen: list[dict[str, float]] = []

    def load() -> None:
        with counted_weights("m"):
            AutoModelForCausalLM.from_pretrained(tmp_path)
            seen.append(loaded_parts())

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    AutoModelForCausalLM.from_pretrained(tmp_path)  # nobody asked for these
    assert (seen, loaded_parts()) == ([{"m": 1.0}], {})
