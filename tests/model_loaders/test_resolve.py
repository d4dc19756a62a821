"""From a loader's name to a model, and what goes wrong on the way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deployments.core.errors import ConfigError, ModelLoadFailed
from model_loaders.resolve import load_model_info

LOADER = """
def model(**inputs): ...

class Tokenizer:
    def decode(self, ids):
        return ""

def load_model(device, size: int = 1):
    return {"model": model, "tokenizer": Tokenizer(), "model_name": f"{device}-{size}"}

def needs(path):
    return {}

def breaks():
    raise RuntimeError("first line\\nthe weights are torn")

def returns_a_list():
    return [1]

def wrong_key():
    return {"modle": model}

def no_tokenizer():
    return {"model": model}

def hook_is_text():
    return {"model": model, "tokenizer": Tokenizer(), "encode": "yes"}

def tokenizer_is_text():
    return {"model": model, "tokenizer": "gpt2"}

def stop_is_text():
    return {"model": model, "tokenizer": Tokenizer(), "stop_token_ids": "</s>"}

def processors_are_a_name():
    return {"model": model, "tokenizer": Tokenizer(), "logits_processors": "greedy"}

def template_is_a_number():
    return {"model": model, "tokenizer": Tokenizer(), "chat_template": 5}

def interrupted():
    raise KeyboardInterrupt

def quits():
    raise SystemExit(3)

model_info = {"model": model, "tokenizer": Tokenizer(), "model_name": "ready made"}
"""


@pytest.fixture
def loader(tmp_path: Path) -> str:
    file = tmp_path / "my_loader.py"
    file.write_text(LOADER)
    return str(file)


def test_a_function_of_a_file_gets_its_kwargs_and_the_device(loader: str) -> None:
    assert load_model_info(f"{loader}:load_model", {"size": 3}, "cuda:1").model_name == "cuda:1-3"
    assert load_model_info(f"{loader}:load_model", {"device": "cpu"}, "cuda:1").model_name == "cpu-1"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("model_loaders.ctranslate2:load_model", "model_loaders.backends.ctranslate2:load_model"),
        ("model_loaders/fuyu.py:load_model", "model_loaders.examples.fuyu:load_model"),
        ("model_loaders.simulated:load_model", "model_loaders.examples.simulated:load_model"),
    ],
)
def test_a_loader_that_has_moved_is_named_by_its_new_place(old: str, new: str) -> None:
    with pytest.raises(ConfigError, match=f"is now {new}"):
        load_model_info(old, {}, "cpu")


def test_a_file_may_hold_a_model_info_of_its_own(loader: str) -> None:
    assert load_model_info(loader, {}, "cpu").model_name == "ready made"


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("nothing", {}, "has no 'nothing'"),
        ("load_model", {"sizes": 3}, "takes no 'sizes'; its arguments: device, size"),
        ("needs", {}, "needs 'path'; give it under kwargs"),
        ("breaks", {}, "RuntimeError: the weights are torn (my_loader.py, line 15)"),
        ("returns_a_list", {}, "returned list ([1]); expected a ModelInfo or a dict"),
        ("wrong_key", {}, "unknown key 'modle' (did you mean 'model'?)."),
        ("no_tokenizer", {}, "neither tokenizer nor processor"),
        ("hook_is_text", {}, "encode=str ('yes'); expected a function"),
        (
            "tokenizer_is_text",
            {},
            "tokenizer=str ('gpt2'); expected a tokenizer, such as AutoTokenizer.from",
        ),
        ("stop_is_text", {}, "stop_token_ids=str ('</s>'); expected a list of token ids"),
        ("processors_are_a_name", {}, "logits_processors=str ('greedy'); expected a list of LogitsProcessors"),
        ("template_is_a_number", {}, "chat_template=int (5); expected a Jinja template"),
        ("quits", {}, "SystemExit: 3"),
    ],
)
def test_what_is_wrong_is_named(loader: str, name: str, kwargs: dict[str, object], said: str) -> None:
    with pytest.raises(ModelLoadFailed) as caught:
        load_model_info(f"{loader}:{name}", kwargs, "cpu")
    assert said in str(caught.value)
    assert f"{loader}:{name}" in str(caught.value) or "has no" in said


def test_an_interrupt_is_the_users_in_the_main_thread_alone(loader: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_model_info(f"{loader}:interrupted", {}, "cpu")
    with ThreadPoolExecutor() as pool, pytest.raises(ModelLoadFailed, match="KeyboardInterrupt"):
        pool.submit(load_model_info, f"{loader}:interrupted", {}, "cpu").result()


def test_modules_and_files_that_are_not_there() -> None:
    with pytest.raises(ModelLoadFailed, match="my-checkpoint: write module:function, or"):
        load_model_info("my-checkpoint", {}, "cpu")
    with pytest.raises(ModelLoadFailed, match="no module named 'no_such_module'"):
        load_model_info("no_such_module:load", {}, "cpu")
    with pytest.raises(ModelLoadFailed, match=r"nowhere/loader\.py does not exist"):
        load_model_info("nowhere/loader.py:load", {}, "cpu")


def test_a_file_that_does_not_parse(tmp_path: Path) -> None:
    file = tmp_path / "torn.py"
    file.write_text("def load_model(:")
    with pytest.raises(ModelLoadFailed, match="SyntaxError"):
        load_model_info(f"{file}:load_model", {}, "cpu")
