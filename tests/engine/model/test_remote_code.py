"""A checkpoint with code of its own, in a local folder, through the Auto loader: batches give what `generate` gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from deployments.core.errors import ModelLoadFailed
from deployments.engine.batching.engine import BatchingEngine
from model_loaders.auto import load_model
from tests.engine.architectures import randomised
from tests.engine.running import built_engine, generate_alone, submit
from tests.engine.test_parity import SHORT, assert_equal_alone
from tests.tiny import byte_tokenizer, llama

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = Path(__file__).parent / "remote_code"
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint as one finds them: config, weights, tokenizer and two modules."""
    folder = tmp_path_factory.mktemp("remote") / "abacus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(folder.parent / "modules"))
        shutil.copytree(CODE, folder, ignore=shutil.ignore_patterns("__pycache__"))
        kind = get_class_from_dynamic_module("modeling_abacus.AbacusForCausalLM", str(folder))
        randomised(lambda: kind(kind.config_class())).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        names = {
            "AutoConfig": "configuration_abacus.AbacusConfig",
            "AutoModelForCausalLM": "modeling_abacus.AbacusForCausalLM",
        }
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
        yield folder


def test_sequences_hold_it(folder: Path) -> None:
    model = load_model(str(folder), trust_remote_code=True).model
    assert type(model).__module__.startswith("transformers_modules.")
    assert_equal_alone(model, SHORT)


def test_the_probe_at_load_takes_sequences(folder: Path) -> None:
    info = load_model(str(folder), trust_remote_code=True)
    engine = built_engine(info, memory_gib=0.1)
    assert isinstance(engine, BatchingEngine)
    ids = info.tokenizer("What is 12 x 12?")["input_ids"]
    assert submit(engine, ids, 12).wait().token_ids == generate_alone(info.model, ids, 12).token_ids
    engine.close(5)


def test_its_code_counts_before_a_class_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A changed copy of a model of transformers keeps its name and type."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    code = "from transformers.models.llama import modeling_llama as stock\n"
    for name in ("LlamaForCausalLM", "LlamaModel"):
        code += f"\n\nclass {name}(stock.{name}): ...\n"
    (tmp_path / "modeling_llama.py").write_text(code)
    config = json.loads((tmp_path / "config.json").read_text())
    names = {"AutoModel": "modeling_llama.LlamaModel", "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    own = type(load_model(str(tmp_path), trust_remote_code=True).model)
    assert (own.__name__, own.__module__.split(".")[0]) == ("LlamaForCausalLM", "transformers_modules")
    assert not caplog.records
    assert type(load_model(str(tmp_path)).model) is transformers.LlamaForCausalLM
    assert "code of its own for LlamaForCausalLM, which is not run: set trust_remote_code" in caplog.text
    (tmp_path / "config_sentence_transformers.json").write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps(MODULES))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_lasttoken": True}))
    own = type(load_model(str(tmp_path), trust_remote_code=True).model)
    assert (own.__name__, own.__module__.split(".")[0]) == ("LlamaModel", "transformers_modules")


def test_its_code_is_not_run_unasked(folder: Path) -> None:
    with pytest.raises((ValueError, ModelLoadFailed), match="trust_remote_code"):
        load_model(str(folder))
