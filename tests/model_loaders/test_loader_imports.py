"""Modules that loaders import from their own folders, in one process."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from deployments.core.errors import ModelLoadFailed
from deployments.local import make_app
from model_loaders.contract import ModelInfo
from model_loaders.resolve import load_model_info

LOADER = """
import helper
import package.part as part
from helper import Tokenizer
from package import WHERE, relative
from spread.inner import WHERE as SPREAD

def load_model(device):
    def generate(**_):
        from late import WHERE as late
        import late as again
        found = [helper.WHERE, part.WHERE, WHERE, relative(), SPREAD, late, again.WHERE, helper.later()]
        return [[1, *(ord(each) for each in found)]]
    return {"model": lambda **_: None, "tokenizer": Tokenizer(), "generate": generate,
            "encode": lambda text, **_: {"input_ids": [[1]]}, "plain_chat": True}
"""

HELPER = """
from dataclasses import dataclass
import second

WHERE = second.WHERE

@dataclass
class Tokenizer:
    eos_token_id: int = 0

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def encode(self, text, **_):
        return [1]

def later():
    import late
    return late.WHERE
"""


@pytest.fixture(autouse=True)
def path() -> Iterator[None]:
    """Python's path and modules are as before."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - modules:
        if not name.startswith(("torch", "transformers")):
            del sys.modules[name]


def write(folder: Path, where: str) -> str:
    """A loader with helpers of its own, as a name of a configuration."""
    (folder / "package").mkdir(parents=True)
    (folder / "spread").mkdir()
    value = f"WHERE = {where!r}\n"
    files = {
        "my_loader.py": LOADER,
        "helper.py": HELPER,
        "second.py": value,
        "late.py": value,
        "package/__init__.py": "from second import WHERE\ndef relative():\n from . import part\n return part.WHERE\n",
        "package/part.py": "import helper\nfrom late import WHERE\n",
        "spread/inner.py": value,
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return f"{folder / 'my_loader.py'}:load_model"


def test_two_models_run_their_own_code(tmp_path: Path) -> None:
    models = [{"id": each, "loader": write(tmp_path / each, each)} for each in "ab"]
    with TestClient(make_app({"models": models, "max_models_per_replica": 2})) as client:
        for each in "abab":
            body = {"model": each, "prompt": "hi", "max_tokens": 20}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == 8 * each


def load(loader: str) -> ModelInfo:
    return load_model_info(loader, {}, "cpu")


def answer(info: ModelInfo) -> str:
    assert info.generate is not None
    return "".join(map(chr, info.generate()[0][1:]))


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_whichever_is_first_and_when_one_is_loaded_again(tmp_path: Path, order: str) -> None:
    names = {each: write(tmp_path / each, each) for each in "ab"}
    infos = {each: load(names[each]) for each in order}
    assert {each: answer(info) for each, info in infos.items()} == {"a": 8 * "a", "b": 8 * "b"}
    assert [answer(load(names[each])) for each in order] == [8 * each for each in order]
    assert vars(sys.modules["helper"])["WHERE"] == order[0]  # pickles of this folder's classes are read as ever


def test_their_objects_are_pickled_and_their_modules_reloaded(tmp_path: Path) -> None:
    for each in "ab":
        tokenizer = load(write(tmp_path / each, each)).tokenizer
        assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer == copy.deepcopy(tokenizer)
        module = sys.modules[type(tokenizer).__module__]
        (tmp_path / each / "second.py").write_text("WHERE = 'changed'\n")
        importlib.reload(sys.modules[module.second.__name__])
        assert importlib.reload(module).WHERE == "changed"
        assert Path(str(module.__file__)).parent == tmp_path / each


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_a_module_of_the_configurations_folder_is_not_the_loaders(
    tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    loaders = {"outer": write(tmp_path, "o"), "inner": write(tmp_path / "more", "i")}
    infos = {each: load(loaders[each]) for each in sorted(loaders, key=first.__ne__)}
    assert {each: answer(info) for each, info in infos.items()} == {"outer": 8 * "o", "inner": 8 * "i"}
    assert importlib.import_module("helper").WHERE == "o"


def own(folder: Path, text: str, **files: str) -> Any:
    """What a loader of this text returns as its model's name."""
    folder.mkdir(exist_ok=True)
    loader = "def load(): return {'model': print, 'encode': print, 'decode': print, 'model_name': str(NAME)}\n"
    for name, content in files.items():
        (folder / f"{name}.py").write_text(content)
    (folder / "loading.py").write_text(text + "\n" + loader)
    return load(f"{folder / 'loading.py'}:load").model_name


def test_installed_packages_python_and_troupe_come_before_files_of_their_names(tmp_path: Path) -> None:
    text = "import json, yaml, model_loaders.contract as c; NAME = json.__name__ + yaml.__name__ + c.__name__"
    named = dict.fromkeys(("json", "yaml", "model_loaders"), "raise SystemExit")
    assert own(tmp_path, text, **named) == "jsonyamlmodel_loaders.contract"


def test_a_loader_with_the_name_of_a_module_that_it_imports_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "loading.py").write_text("NAME = 'elsewhere'")
    sys.path.append(str(tmp_path / "elsewhere"))
    assert own(tmp_path / "a", "from loading import NAME") == "elsewhere"


def test_a_module_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="ModuleNotFoundError: No module named 'no_such_part'"):
        own(tmp_path, "import no_such_part")


def test_a_package_does_not_get_another_folders_module(tmp_path: Path) -> None:
    for each in "ab":
        (tmp_path / each).mkdir()
    (tmp_path / "b" / "__init__.py").touch()
    assert own(tmp_path / "a", "from helper import NAME", helper="NAME = 'a'") == "a"
    with pytest.raises(ModelLoadFailed, match=r"b is a package, and .*helper.py is another loader's"):
        own(tmp_path / "b", "from helper import NAME", helper="NAME = 'b'")
