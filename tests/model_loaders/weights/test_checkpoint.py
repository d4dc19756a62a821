"""Checkpoints whose weights are not those of the class they are loaded with."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from deployments.core.errors import ModelLoadFailed
from model_loaders.contract import ModelInfo
from model_loaders.resolve import load_model_info
from model_loaders.weights.adapter_folder import Adapter, use_adapter
from tests.seeds.vision import save_fuyu, save_paligemma
from tests.tiny import byte_tokenizer, llama

Weights = dict[str, torch.Tensor]
BERT = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def save(folder: Path, model: Any, edit: Callable[[Weights], object] | None = None, **config: Any) -> str:
    """A checkpoint with its weights and its config changed."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if edit is not None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return str(folder)


def load(folder: str, **kwargs: Any) -> ModelInfo:
    return load_model_info("model_loaders.auto:load_model", {"model_name": folder, **kwargs}, "cpu")


def bert(kind: str = "BertModel", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.BertConfig(**BERT), **kwargs)


def rename(weights: Weights) -> None:
    for key in [key for key in weights if "layers.1.mlp" in key]:
        weights[key.replace("mlp", "ffn")] = weights.pop(key)


def shorten(weights: Weights) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"][:200].clone()


def without(key: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(key)


def add(key: str) -> Callable[[Weights], object]:
    return lambda weights: weights.update({key: torch.zeros(2)})


@pytest.mark.parametrize(
    ("edit", "config", "said"),
    [
        (
            without("lm_head.weight"),
            {},
            [r"Missing .* 1 weight \(lm_head.weight\)", r"allow_missing_keys: \[\.\.\.\]\}"],
        ),
        (rename, {}, ["Missing .* 3 weights .*model.layers.1.mlp", "not in the model: 3 weights .*model.layers.1.ffn"]),
        (shorten, {}, [r"Of another size.*lm_head.weight \(\[200, 48\] in the checkpoint, \[261, 48\] here\)"]),
        (None, {"num_hidden_layers": 3}, [r"9 weights, the first 5 are model.layers.2.input_layernorm.weight"]),
        (None, {"num_hidden_layers": 1}, [r"not in the model: 9 weights", r"\{allow_unexpected_keys: \[\.\.\.\]\}"]),
        (add("v_head.weight"), {}, [r"not in the model: 1 weight \(v_head.weight\)"]),
    ],
)
def test_other_weights_are_refused(
    tmp_path: Path, edit: Callable[[Weights], object] | None, config: dict[str, Any], said: list[str]
) -> None:
    folder = save(tmp_path, llama(), edit, **config)
    with pytest.raises(ModelLoadFailed) as error:
        load(folder)
    assert "not those of LlamaForCausalLM" in error.value.message
    for each in said:
        assert re.search(each, error.value.message), error.value.message


def test_partial_shards_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="60KB")
    byte_tokenizer().save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    lost = places["weight_map"]["model.norm.weight"]
    places["weight_map"] = {key: file for key, file in places["weight_map"].items() if file != lost}
    index.write_text(json.dumps(places))
    with pytest.raises(ModelLoadFailed, match="6 weights, the first 5 are model"):
        load(str(tmp_path))


def test_a_pickle_without_its_head_is_refused(tmp_path: Path) -> None:
    model = llama()
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    torch.save(
        {key: value for key, value in model.state_dict().items() if "lm_head" not in key},
        tmp_path / "pytorch_model.bin",
    )
    with pytest.raises(ModelLoadFailed, match=r"lm_head\.weight"):
        load(str(tmp_path))


def test_the_wrong_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"BertLMHeadModel.*cls\.predictions"):
        load(save(tmp_path, bert()), auto_class="AutoModelForCausalLM")


@pytest.mark.parametrize(("loader", "write"), [("fuyu", save_fuyu), ("paligemma", save_paligemma)])
def test_other_loaders_of_ours_refuse_too(tmp_path: Path, loader: str, write: Callable[[Path], Path]) -> None:
    folder = write(tmp_path)
    file = next(folder.rglob("model.safetensors"))
    weights = load_file(file)
    lost = min(key for key in weights if key.endswith("layers.0.input_layernorm.weight"))
    save_file({key: value for key, value in weights.items() if key != lost}, file, metadata={"format": "pt"})
    kwargs = {"model_name": str(file.parent)}
    with pytest.raises(ModelLoadFailed, match=r"Missing from the checkpoint.*layers\.0\.input_layernorm\.weight"):
        load_model_info(f"model_loaders.examples.{loader}:load_model", kwargs, "cpu")
    load_model_info(
        f"model_loaders.examples.{loader}:load_model", {**kwargs, "allow_missing_keys": "input_layernorm"}, "cpu"
    )


@pytest.mark.parametrize(
    ("edit", "allowed"),
    [
        (without("lm_head.weight"), {"allow_missing_keys": ["lm_head"]}),
        (shorten, {"allow_missing_keys": "^lm_head.weight$"}),
        (shorten, {"model_kwargs": {"ignore_mismatched_sizes": True}}),
        (add("v_head.weight"), {"allow_unexpected_keys": [r"^v_head\."]}),
    ],
)
def test_what_is_allowed_is_loaded_and_logged(
    tmp_path: Path, edit: Callable[[Weights], object], allowed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "troupe.loader"):
        assert type(load(save(tmp_path, llama(), edit), **allowed).model).__name__ == "LlamaForCausalLM"
    assert "as allowed: 1 weight" in caplog.text


@pytest.mark.parametrize("pattern", [["("], [3]])
def test_a_pattern_that_is_no_expression(tmp_path: Path, pattern: Any) -> None:
    with pytest.raises(ModelLoadFailed, match=r"allow_missing_keys: .* is not a regular expression"):
        load(str(tmp_path), allow_missing_keys=pattern)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.bias",
        "model.layers.2.mlp.up_proj.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.mtp_layers.0.norm.weight",
    ],
)
@pytest.mark.parametrize("count", ["num_nextn_predict_layers", "num_mtp_modules"])
def test_harmless_keys(tmp_path: Path, key: str, count: str) -> None:
    load(save(tmp_path, llama(), add(key), **{count: 1}))


@pytest.mark.parametrize("key", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mtp_gate.weight"])
def test_a_bias_or_weight_that_the_model_would_need(tmp_path: Path, key: str) -> None:
    with pytest.raises(ModelLoadFailed, match=re.escape(key)):
        load(save(tmp_path, llama(), add(key), num_nextn_predict_layers=1))


def gptj() -> Any:
    config = transformers.GPTJConfig(vocab_size=261, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=64)
    return transformers.GPTJForCausalLM(config)


@pytest.mark.parametrize("key", ["bias", "masked_bias", "causal_mask"])
def test_masks_that_old_versions_saved(tmp_path: Path, key: str) -> None:
    load(save(tmp_path, gptj(), add(f"transformer.h.0.attn.{key}")))


@pytest.mark.parametrize("declared", [["BertForMaskedLM"], ["BertForPreTraining"], ["BertModel"], None])
def test_an_encoder_that_was_saved_with_other_heads(tmp_path: Path, declared: list[str] | None) -> None:
    """As bert-base is: the heads and the pooler of its pretraining, under the name of one of them."""
    saved = bert("BertForPreTraining")
    model = load(save(tmp_path, saved, architectures=declared)).model
    assert not hasattr(model, "generate")
    assert all(torch.equal(value, saved.bert.state_dict()[key]) for key, value in model.base_model.state_dict().items())


def test_an_encoder_that_was_saved_without_the_head_of_its_pretraining(tmp_path: Path) -> None:
    model = load(save(tmp_path, bert(), architectures=["BertForMaskedLM"])).model
    assert type(model).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("saved", "edit", "kwargs"),
    [
        (bert(), None, {"auto_class": "BertForMaskedLM"}),
        (bert(), without("encoder.layer.0.output.dense.weight"), {}),
        (bert("BertForMaskedLM"), add("bert.encoder.layer.1.output.dense.weight"), {}),
    ],
)
def test_an_encoder_that_lacks_more_than_a_head(
    tmp_path: Path, saved: Any, edit: Callable[[Weights], object] | None, kwargs: dict[str, Any]
) -> None:
    with pytest.raises(ModelLoadFailed, match="not those of Bert"):
        load(save(tmp_path, saved, edit, architectures=["BertForMaskedLM"]), **kwargs)


def test_a_head_that_an_answer_would_need(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"classifier\.weight"):
        load(save(tmp_path, bert(), architectures=["BertForSequenceClassification"]))


def test_a_part_of_a_composite_model(tmp_path: Path) -> None:
    text = {**BERT, "vocab_size": 261, "max_position_embeddings": 64}
    vision = {**BERT, "image_size": 28, "patch_size": 14}
    del vision["vocab_size"]
    saved = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    model = load(save(tmp_path, saved), auto_class="CLIPTextModel").model
    found, expected = model.state_dict(), saved.text_model.state_dict()
    assert all(torch.equal(found[key.removeprefix("text_model.")], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("model", "config", "kwargs", "kind"),
    [
        (llama(tie_word_embeddings=True), {}, {}, "LlamaForCausalLM"),
        (llama(tie_word_embeddings=True).model, {}, {}, "LlamaForCausalLM"),
        (llama().model, {}, {}, "LlamaModel"),
        (llama(), {}, {"auto_class": "AutoModel"}, "LlamaModel"),
        (llama().model, {"architectures": None}, {}, "LlamaModel"),
        (bert(), {}, {}, "BertModel"),
        (bert(add_pooling_layer=False), {}, {}, "BertModel"),
        (bert(), {"architectures": None}, {}, "BertModel"),
        (bert("BertForMaskedLM"), {}, {}, "BertForMaskedLM"),
        (bert("BertForMaskedLM"), {}, {"auto_class": "AutoModel"}, "BertModel"),
        (bert("BertForSequenceClassification"), {}, {}, "BertForSequenceClassification"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else None,
)
def test_the_class_that_was_saved(
    tmp_path: Path, model: Any, config: dict[str, Any], kwargs: dict[str, Any], kind: str
) -> None:
    loaded = load(save(tmp_path, model, **config), **kwargs).model
    assert type(loaded).__name__ == kind
    weights, before = loaded.base_model.state_dict(), model.base_model.state_dict()
    for key in before.keys() & weights.keys():
        assert torch.equal(weights[key], before[key]), key


def own_loader(folder: str) -> dict[str, Any]:
    """As a user would write it."""
    return {"model": transformers.LlamaForCausalLM.from_pretrained(folder), "tokenizer": byte_tokenizer()}


def test_a_users_loader_says_what_is_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def edit(weights: Weights) -> None:
        rename(weights)
        weights.pop("lm_head.weight")

    folder = save(tmp_path, llama(), edit)
    with caplog.at_level(logging.WARNING, "troupe.loader"):
        load_model_info(f"{__name__}:own_loader", {"folder": folder}, "cpu")
    assert re.search(r"own_loader: weights missing from the checkpoint, so random: .*lm_head.weight", caplog.text)
    assert re.search(r"own_loader: weights in the checkpoint, but not in the model: model.layers.1.ffn", caplog.text)


def write_adapter(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")


def test_an_adapter_beside_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, llama())
    write_adapter(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"weights and a PEFT adapter .*\{adapter: use\} .*\{adapter: ignore\}"):
        load(folder)
    with pytest.raises(ModelLoadFailed, match="adapter is 'no'; write use or ignore"):
        load(folder, adapter="no")
    assert torch.equal(load(folder, adapter="ignore").model.lm_head.weight, llama().lm_head.weight)
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else found(name))
    with pytest.raises(ModelLoadFailed, match="needs the peft package"):
        load(folder, adapter="use")


def test_an_adapter_that_transformers_reads_in_part_can_be_served_over_its_base() -> None:
    """transformers names a DoRA adapter's magnitudes as missing, which it skips."""
    model = SimpleNamespace(load_adapter=lambda name: SimpleNamespace(missing_keys=["q.lora_magnitude_vector"]))
    with pytest.raises(ModelLoadFailed, match=r"such as DoRA.* adapter: ignore, and .* the keys base and adapter"):
        use_adapter(model, Adapter(name="folder", revision=None))


def test_an_adapter_alone_names_its_base(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    with pytest.raises(ModelLoadFailed, match=r"'org/base' \(base_model_name_or_path\)"):
        load(str(tmp_path))


def test_an_adapter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"has no adapter_config\.json"):
        load(save(tmp_path, llama()), adapter="use")


def test_a_users_loader_says_that_an_adapter_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path, llama())
    write_adapter(tmp_path)
    with caplog.at_level(logging.WARNING, "troupe.loader"):
        load_model_info(f"{__name__}:own_loader", {"folder": folder}, "cpu")
    assert "has a PEFT adapter (adapter_config.json): the model is served without it" in caplog.text
