"""Vectors as a sentence-transformers folder says they are made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from deployments.core.errors import ModelLoadFailed
from model_loaders.resolve import load_model_info
from tests import sentence_models
from tests.openai.conftest import Serve
from tests.openai.embedding_calls import DENSE, TEXTS, refusal, serve_folder, states, vectors
from tests.sentence_models import SIZE, old_pooling, pooling, tokenizer, write


def weighted(found: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(found) + 1)
    return (weights @ found) / weights.sum()


EXPECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda found: found[0],
    "max": lambda found: found.max(0).values,
    "mean": lambda found: found.mean(0),
    "mean_sqrt_len_tokens": lambda found: found.sum(0) / len(found) ** 0.5,
    "weightedmean": weighted,
    "lasttoken": lambda found: found[-1],
}


@pytest.mark.parametrize("mode", EXPECTED)
def test_each_pooling_of_a_folder(tmp_path: Path, serve: Serve, mode: str) -> None:
    found = vectors(serve_folder(serve, write(tmp_path, pooling(mode))), TEXTS)
    assert torch.allclose(found, torch.stack([EXPECTED[mode](states(text)) for text in TEXTS]), atol=1e-5)


def test_poolings_are_joined_in_the_order_of_the_library(tmp_path: Path, serve: Serve) -> None:
    server = serve_folder(serve, write(tmp_path, old_pooling("mean_tokens", "cls_token"), ("Normalize", {})))
    joined = torch.cat([states("abc")[0], states("abc").mean(0)])
    assert torch.allclose(vectors(server, "abc")[0], normalize(joined, dim=0), atol=1e-5)


def test_the_modules_after_the_pooling(tmp_path: Path, serve: Serve) -> None:
    gelu = {**DENSE[1], "activation_function": "torch.nn.modules.activation.GELU"}
    modules = [("LayerNorm", {"dimension": SIZE}), ("Dropout", {"dropout": 0.5}), ("Dense", gelu), ("Normalize", {})]
    server = serve_folder(serve, write(tmp_path, pooling("mean"), *modules))
    weights = sentence_models.dense(SIZE, 8)
    pooled = layer_norm(states("abc").mean(0), (SIZE,)) * 2 + 1
    made = torch.nn.functional.gelu(weights["linear.weight"] @ pooled + weights["linear.bias"])
    assert torch.allclose(vectors(server, "abc")[0], normalize(made, dim=0), atol=1e-5)
    assert torch.allclose(vectors(server, "abc", normalize=False)[0], made, atol=1e-5)
    assert torch.allclose(vectors(server, "abc", use_activation=False)[0], made, atol=1e-5)
    assert torch.allclose(vectors(server, "abc", dimensions=3)[0], normalize(made[:3], dim=0), atol=1e-5)
    assert torch.allclose(vectors(server, "abc", dimensions=3, normalize=False)[0], made[:3], atol=1e-5)


def test_vectors_that_the_folder_shortens(tmp_path: Path, serve: Serve) -> None:
    server = serve_folder(serve, write(tmp_path, pooling("mean"), ("Normalize", {}), prompts={"truncate_dim": 8}))
    expected = torch.nn.functional.normalize(states("abc").mean(0), dim=0)[:8]
    assert torch.allclose(vectors(server, "abc")[0], expected, atol=1e-5)
    assert torch.allclose(
        vectors(server, "abc", normalize=True)[0], torch.nn.functional.normalize(expected, dim=0), atol=1e-5
    )
    assert refusal(server, input="abc", dimensions=9)["param"] == "dimensions"


@pytest.mark.parametrize("declared", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_a_folder_that_names_a_head_it_does_not_have(tmp_path: Path, serve: Serve, declared: str) -> None:
    """As all-mpnet-base-v2 does."""
    folder = write(tmp_path, pooling("cls"))
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": [declared]}))
    assert torch.allclose(vectors(serve_folder(serve, folder), "abc")[0], states("abc")[0], atol=1e-5)


def test_a_dense_without_activation_is_tanh(tmp_path: Path, serve: Serve) -> None:
    weights = sentence_models.dense(SIZE, 8)
    server = serve_folder(serve, write(tmp_path, pooling("cls"), DENSE))
    made = torch.tanh(weights["linear.weight"] @ states("abc")[0] + weights["linear.bias"])
    assert torch.allclose(vectors(server, "abc")[0], made, atol=1e-5)
    assert torch.allclose(vectors(server, "abc", normalize=True)[0], normalize(made, dim=0), atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "said"),
    [
        ([], "has no Pooling module"),
        ([pooling("attention")], "the pooling 'attention'"),
        ([("Pooling", {"pooling_mode_first_and_last": True})], "the pooling 'pooling_mode_first_and_last'"),
        ([("WeightedLayerPooling", {}), pooling("mean")], r"WeightedLayerPooling' after the transformer"),
        ([pooling("mean"), ("CNN", {})], r"models\.CNN' after"),
        ([pooling("mean"), ("Dense", {**DENSE[1], "use_residual": True})], "use_residual=True"),
        ([pooling("mean"), ("Dense", {**DENSE[1], "activation_function": "os.system"})], "activation 'os.system'"),
        ([pooling("mean"), ("Dense", {**DENSE[1], "module_input_name": "tokens"})], "module_input_name='tokens'"),
    ],
)
def test_a_module_that_cannot_be_honored_is_named(tmp_path: Path, modules: Any, said: str) -> None:
    folder = write(tmp_path, *modules)
    with pytest.raises(ModelLoadFailed, match=said):
        load_model_info("model_loaders.auto:load_model", {"model_name": folder}, "cpu")


def test_a_dense_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, pooling("mean"), ("Dense", {**DENSE[1], "in_features": 16}))
    torch.save({"linear.weight": torch.zeros(8, 16)}, tmp_path / "2_Dense" / "pytorch_model.bin")
    (tmp_path / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadFailed, match=r"2_Dense: .*linear\.bias|2_Dense: .*\"bias\""):
        load_model_info("model_loaders.auto:load_model", {"model_name": folder}, "cpu")


def test_the_configured_pooling_replaces_the_folders(tmp_path: Path, serve: Serve) -> None:
    server = serve_folder(serve, write(tmp_path, pooling("mean")), pooling="weighted_mean")
    assert torch.allclose(vectors(server, "abc")[0], weighted(states("abc")), atol=1e-5)


def of_folder(folder: str) -> dict[str, Any]:
    """As a user would write it."""
    return {"model": transformers.AutoModel.from_pretrained(folder), "tokenizer": tokenizer()}


def test_a_users_loader_of_such_a_folder(tmp_path: Path, serve: Serve) -> None:
    folder = write(tmp_path, pooling("cls"))
    entry = {"id": "a", "loader": f"{__name__}:of_folder", "kwargs": {"folder": folder}}
    assert torch.allclose(vectors(serve([entry]), "abc")[0], states("abc")[0], atol=1e-5)
