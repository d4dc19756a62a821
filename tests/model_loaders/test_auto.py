"""Any checkpoint through the Auto classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

from deployments.core.errors import ModelLoadFailed
from model_loaders.resolve import load_model_info
from tests.tiny import byte_tokenizer, llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def load(folder: Path, **kwargs: Any) -> Any:
    given = {"model_name": str(folder / "model"), "tokenizer_name": str(folder / "tokenizer"), **kwargs}
    return load_model_info("model_loaders.auto:load_model", given, "cpu")


def test_names_and_arguments(folder: Path) -> None:
    info = load(folder, model_kwargs={"attn_implementation": "eager"}, max_model_len=64)
    assert info.model.config._attn_implementation == "eager"
    assert info.max_model_len == 64
    assert info.tokenizer.decode(info.tokenizer.encode("Grüße")) == "Grüße"
    assert not info.model.training


def test_model_kwargs_can_be_fields_of_the_config(folder: Path) -> None:
    """As in `from_pretrained` without a config."""
    info = load(folder, model_kwargs={"rms_norm_eps": 0.5, "num_hidden_layers": 1}, allow_unexpected_keys="layers.1")
    assert (info.model.model.norm.variance_epsilon, len(info.model.model.layers)) == (0.5, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "bfloat16"}, r"dtype: 'bfloat16', which the loader sets itself; write dtype in the loader's kwargs"),
        ({"torch_dtype": "bfloat16"}, "torch_dtype: 'bfloat16', which the loader sets itself; write dtype in"),
        ({"config": "x"}, "config: 'x', which the loader sets itself; leave it out"),
    ],
)
def test_model_kwargs_that_the_loader_sets_are_refused(folder: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadFailed, match=said):
        load(folder, model_kwargs=given)


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16"])
def test_a_dtype(folder: Path, dtype: str) -> None:
    assert load(folder, dtype=dtype).model.dtype == getattr(torch, dtype.removeprefix("torch."))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "AutoModelForCausalLM", "transformers.AutoModelForCausalLM"])
def test_a_class_by_name(folder: Path, name: str) -> None:
    assert type(load(folder, auto_class=name).model).__name__ == "LlamaForCausalLM"


def test_a_class_of_another_model_type_is_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama's class runs on Granite's config, and leaves out its multipliers."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 261, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1}
    saved = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=4, embedding_multiplier=3.0)).eval()
    saved.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["LlamaForCausalLM"]}))
    model = load_model_info("model_loaders.auto:load_model", {"model_name": str(tmp_path)}, "cpu").model
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(ids).logits, saved(ids).logits)
    assert "architectures name LlamaForCausalLM, not a class of its model_type granite" in caplog.text


def test_a_chat_template_or_its_file(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = folder / "template.jinja"
    file.write_text(template)
    assert load(folder, chat_template=template).chat_template == template
    assert load(folder, chat_template=str(file)).chat_template == template
    file.write_text("é", encoding="latin-1")
    with pytest.raises(ModelLoadFailed, match=r"template\.jinja is not a text in UTF-8"):
        load(folder, chat_template=str(file))


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"dtype": "float12"}, "dtype 'float12' is unknown"),
        ({"auto_class": "NoModel"}, "not a class of transformers"),
        ({"auto_class": "nowhere.NoModel"}, "ModuleNotFoundError"),
        ({"auto_class": "transformers.NoModel"}, "not a class of transformers"),
        ({"chat_template": "missing.jinja"}, "missing.jinja does not exist"),
        ({"quantization_config": {"quant_method": "magic"}}, "magic"),
        ({"model_name": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_loaded_is_named(folder: Path, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelLoadFailed, match=said):
        load(folder, **kwargs)


def test_a_folder_that_lacks_a_part_says_which(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"is not a checkpoint of transformers: it has no config\.json"):
        load(folder, model_name=str(tmp_path))
    with pytest.raises(ModelLoadFailed, match=r"model has no tokenizer\. Save it there with"):
        load(folder, tokenizer_name=None)
    torn = tmp_path / "torn"
    shutil.copytree(folder / "model", torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelLoadFailed, match=f"{weights} is damaged or not written to its end"):
        load(folder, model_name=str(torn))


def test_code_of_the_text_side_that_is_not_run_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(folder / "tokenizer", tmp_path / "own")
    file = tmp_path / "own" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    load(folder, tokenizer_name=str(tmp_path / "own"))
    assert "own has code of its own for its tokenizer, which is not run: set trust_remote_code" in caplog.text
    shutil.copytree(folder / "tokenizer", tmp_path / "both")
    processor = {"processor_class": "Own", "auto_map": {"AutoProcessor": "own.Own"}}
    (tmp_path / "both" / "processor_config.json").write_text(json.dumps(processor))
    info = load(folder, tokenizer_name=str(tmp_path / "both"))
    assert (info.processor, info.tokenizer.decode([65])) == (None, info.tokenizer.decode(65))
    assert "both is served with its tokenizer, without its processor: ValueError: The repository" in caplog.text
