"""lm-evaluation-harness through our API against its own Hugging Face backend on the same weights."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.clients.conftest import WEIGHTS, client_python, run_script

REQUIREMENTS = ("lm_eval[api]==0.4.13",)
TASKS = ("choices", "generated", "rolling")
WORDS = ["apple", "river", "table", "green", "stone", "cloud", "house", "music", "paper", "light", "bread", "horse"]

Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def python() -> Path:
    return client_python("lm_eval", *REQUIREMENTS)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three tasks over local JSON data: multiple choice, generation, rolling likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)
    sums = [(rng.randint(10, 99), rng.randint(10, 99)) for _ in range(16)]
    data: dict[str, list[dict[str, Any]]] = {
        "choices": [
            {"q": f"What is {a} + {b}?", "choices": [str(a + b), str(a + b + 1), "seven", ""][:3]} for a, b in sums
        ],
        "generated": [{"q": f"Reverse the word {rng.choice(WORDS)}."} for _ in range(12)],
        "rolling": [{"text": " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))} for _ in range(6)],
    }
    chat = "<|im_start|>user\n{{q}}<|im_end|>\n<|im_start|>assistant\n"
    kinds: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": chat,
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "generated": {
            "output_type": "generate_until",
            "doc_to_text": chat,
            "doc_to_target": "",
            "generation_kwargs": {
                "until": ["\n", "<|im_end|>"],
                "max_gen_toks": 24,
                "temperature": 0,
                "do_sample": False,
            },
            "metric_list": [{"metric": "exact_match"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
            "test_split": "test",
            **kinds[name],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return str(folder)


@pytest.fixture(scope="module")
def reference(python: Path, tasks: str) -> Samples:
    """What lm_eval's own backend gives."""
    return evaluate(python, tasks, "hf", f"pretrained={WEIGHTS},dtype=float32,max_length=1024")


def evaluate(python: Path, tasks: str, model: str, model_args: str, batch_size: int = 1) -> Samples:
    arguments = {
        "model": model,
        "model_args": model_args,
        "tasks": list(TASKS),
        "include_path": tasks,
        "batch_size": batch_size,
    }
    samples: Samples = run_script(python, "lm_eval_run.py", arguments)
    return samples


def through_api(url: str, **more: Any) -> str:
    options = {
        "model": "folder",
        "base_url": f"{url}/models/folder/v1/completions",
        "num_concurrent": 8,
        "max_length": 1024,
        "max_retries": 1,
        "tokenizer": str(WEIGHTS),
        "tokenizer_backend": "huggingface",
        **more,
    }
    return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)


def largest_gap(ours: Samples, theirs: Samples) -> float:
    """The largest difference of a log-likelihood; greedy flags and generated texts must be equal."""
    gap = 0.0
    for task in TASKS:
        assert len(ours[task]) == len(theirs[task]) > 0
        for mine, other in zip(ours[task], theirs[task], strict=True):
            if task == "generated":
                assert mine["raw"] == other["raw"]
                continue
            for a, b in zip(flat(mine["responses"]), flat(other["responses"]), strict=True):
                if isinstance(a, float):
                    gap = max(gap, abs(a - b))
                else:
                    assert a == b, "greedy flags differ"
    return gap


def flat(values: Any) -> list[Any]:
    return [leaf for value in values for leaf in flat(value)] if isinstance(values, list) else [values]


@pytest.mark.parametrize(
    ("batch_size", "more"),
    [
        (1, {}),
        (4, {}),
        (1, {"tokenized_requests": False}),
        (1, {"tokenizer": None, "tokenizer_backend": "remote"}),
    ],
    ids=["ids", "batches of ids", "strings", "remote tokenizer"],
)
def test_parity(
    folder_model: str, python: Path, tasks: str, reference: Samples, batch_size: int, more: dict[str, Any]
) -> None:
    ours = evaluate(python, tasks, "local-completions", through_api(folder_model, **more), batch_size)
    gap = largest_gap(ours, reference)
    print(f"largest difference of a log-likelihood: {gap:.2e}")
    assert gap < 1e-4


def test_parity_at_32_concurrent_beside_other_load(
    folder_model: str, python: Path, tasks: str, reference: Samples
) -> None:
    stop = threading.Event()

    def load() -> None:
        body = {"model": "folder", "max_tokens": 64, "ignore_eos": True, "prompt": "Noise " * 20}
        while not stop.is_set():
            assert requests.post(f"{folder_model}/v1/completions", json=body, timeout=120).status_code == 200

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        ours = evaluate(python, tasks, "local-completions", through_api(folder_model, num_concurrent=32))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert largest_gap(ours, reference) < 1e-4
