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
from tests.tiny import byte_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = Path(__file__).parent / "remote_code"


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


def test_its_code_is_not_run_unasked(folder: Path) -> None:
    with pytest.raises((ValueError, ModelLoadFailed), match="trust_remote_code"):
        load_model(str(folder))
