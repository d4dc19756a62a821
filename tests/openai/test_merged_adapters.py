"""Adapters that batches cannot hold: each is served as a merged copy of its base, whose answers are those of PEFT."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.adapters.lora import write_adapter
from tests.engine.architectures import decoder
from tests.engine.running import greedy
from tests.openai.added import ADMIN, CLIENT, Start, complete, model, starting, states, until
from tests.openai.tiny_models import with_convolutions as convolved
from tests.openai.tiny_models import with_images
from tests.seeds.vision import data_uri, picture
from tests.tiny import byte_tokenizer, llama

peft = pytest.importorskip("peft", reason="PEFT is an optional package")

PROMPT = "One prompt of some forty tokens, as it is."
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of PEFT
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def dense() -> Any:
    return llama(attention_bias=True)


def experts() -> Any:
    return decoder("mixtral", vocab_size=300)


def convolutions() -> Any:
    return decoder("lfm2", vocab_size=300, layer_types=["conv", "full_attention"] * 2)


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "dora": (dense, lambda: peft.LoraConfig(use_dora=True, target_modules=["embed_tokens"], init_lora_weights=False)),
    "bias": (dense, lambda: peft.LoraConfig(bias="all", target_modules=["q_proj"], init_lora_weights=False)),
    "adalora": (
        dense,
        lambda: peft.AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], init_lora_weights=False
        ),
    ),
    "experts": (
        experts,
        lambda: peft.LoraConfig(
            target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False, lora_dropout=0
        ),
    ),
}
"""The base and the adapter."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("place")
    for name, build in (("plain", llama), ("dense", dense), ("experts", experts), ("convolutions", convolutions)):
        build().save_pretrained(top / name)
        byte_tokenizer().save_pretrained(top / name)
    for folder in ("run", "allowed"):
        (top / folder).mkdir()
    return top


@pytest.fixture
def start(place: Path) -> Iterator[Start]:
    with starting(place) as begin:
        yield begin


def trained(name: str, folder: Path) -> str:
    """Write an adapter; what its base answers with it."""
    build, config = CASES[name]
    torch.manual_seed(7)
    adapted = peft.get_peft_model(build(), config())
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in key:
                parameter += 0.5 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    whole = adapted.eval().base_model.model
    return byte_tokenizer().decode(greedy(whole, byte_tokenizer().encode(PROMPT), 8))


def text(server: Any, name: str) -> str:
    answer = complete(server, name, prompt=PROMPT, max_tokens=8)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return str(answer.json()["choices"][0]["text"])


@pytest.mark.parametrize("name", CASES)
def test_answers_are_those_of_peft(name: str, place: Path, start: Start) -> None:
    folder = place / "allowed" / name
    expected = trained(name, folder)
    base = place / CASES[name][0].__name__
    alone = byte_tokenizer().decode(greedy(CASES[name][0](), byte_tokenizer().encode(PROMPT), 8))
    assert expected != alone
    server = start(
        [model(base), {"id": name, "base": "base", "adapter": str(folder)}], host_memory_gib=1, max_models_per_replica=1
    )
    for asked, found in (("base", alone), (name, expected), ("base", alone), (name, expected)):
        assert text(server, asked) == found, asked
    row = states(server)[name]
    assert (row["state"], row["kind"], row["parent"]) == ("ready", "adapter", "base")
    (held,), (base_held,) = row["replicas"], states(server)["base"]["replicas"]
    assert (held["tier"], base_held["tier"]) == ("device", "host")
    assert held["fingerprint"] != base_held["fingerprint"]


def write_peft(model: Any, folder: Path, **config: Any) -> Any:
    """Write a random adapter; the model with it, not merged."""
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**{"init_lora_weights": False, **config})).eval()
    adapted.save_pretrained(folder)
    return adapted.base_model.model


@pytest.mark.parametrize("dora", [False, True])
def test_a_convolution(dora: bool, place: Path, start: Start) -> None:
    adapted = write_peft(convolved()["model"], place / "allowed" / "mine", target_modules=["conv"], use_dora=dora)
    expected = byte_tokenizer().decode(greedy(adapted, byte_tokenizer().encode(PROMPT), 8))
    base = {"id": "base", "loader": f"{__name__}:convolved", "engine": {"threads": 1}}
    server = start([base, {"id": "mine", "base": "base", "adapter": str(place / "allowed" / "mine")}])
    assert text(server, "mine") == expected != text(server, "base")


@pytest.mark.parametrize("build", ["convolutions", "convolved"])
def test_a_convolution_of_groups_is_refused_by_name(build: str, place: Path, start: Start) -> None:
    """PEFT merges it into other weights than it computes with, or not at all."""
    folder = place / "allowed" / "convolution"
    if build == "convolutions":
        base = model(place / "convolutions")
        write_peft(convolutions(), folder, r=64, target_modules=r".*conv\.(conv|in_proj)")
    else:
        base = {"id": "base", "loader": f"{__name__}:convolved", "kwargs": {"groups": 2}}
        write_peft(convolved(groups=2)["model"], folder, target_modules=["conv"])
    server = start([base, {"id": "mine", "base": "base", "adapter": str(folder)}])
    answer = complete(server, "mine")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), answer.text
    reason = "PEFT cannot merge it: NotImplementedError: Merging is not supported for _ConvNd layers with groups > 1."
    assert reason in answer.json()["error"]["message"]


def merged_by_peft(folder: str) -> dict[str, Any]:
    loaded = with_images()
    return {**loaded, "model": peft.PeftModel.from_pretrained(loaded["model"], folder).merge_and_unload().eval()}


@pytest.mark.parametrize(
    ("targets", "is_merged"),
    [
        (["patch_embedding"], True),
        (r".*vision_tower.*q_proj", False),
        (r".*multi_modal_projector\.linear_2", False),
        (r".*(patch_embedding|linear_2)", True),
    ],
)
def test_an_encoder_of_images(targets: Any, is_merged: bool, place: Path, start: Start) -> None:
    """Texts are the base's, and images are seen as PEFT's merged model sees them."""
    folder = place / "allowed" / "mine"
    write_peft(with_images()["model"], folder, target_modules=targets)
    names = {"base": ("with_images", {}), "reference": ("merged_by_peft", {"folder": str(folder)})}
    models = [
        {"id": name, "loader": f"{__name__}:{loader}", "kwargs": kwargs, "engine": {"threads": 1}}
        for name, (loader, kwargs) in names.items()
    ]
    adapter = {"id": "mine", "base": "base", "adapter": str(folder)}
    server = start([*models, adapter], max_models_per_replica=3)
    image = {"type": "image_url", "image_url": {"url": data_uri(picture())}}
    found = {}
    for name in (*names, "mine"):
        body = {"model": name, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": True}
        for content in (PROMPT, [image, {"type": "text", "text": PROMPT}]):
            messages = [{"role": "user", "content": content}]
            answer = requests.post(
                f"{server.url}/v1/chat/completions", json={**body, "messages": messages}, headers=CLIENT, timeout=60
            )
            assert answer.status_code == 200, answer.text
            logprobs = answer.json()["choices"][0]["logprobs"]["content"]
            found[name, content is PROMPT] = [each["logprob"] for each in logprobs]
    assert found["mine", False] == pytest.approx(found["reference", False], abs=1e-4)
    assert found["mine", False] != pytest.approx(found["base", False], abs=1e-2)
    assert found["mine", True] == pytest.approx(found["base", True], abs=1e-4)
    held = {each["id"] for each in replica(server)["models"]}
    assert ("mine" in held) == is_merged


def test_a_module_that_only_images_need_and_that_cannot_be_tried(place: Path, start: Start) -> None:
    folder = place / "allowed" / "mine"
    write_peft(with_images()["model"], folder, target_modules=["position_embedding"], use_dora=True)
    base = {"id": "base", "loader": f"{__name__}:with_images", "engine": {"threads": 1}}
    server = start([base, {"id": "mine", "base": "base", "adapter": str(folder)}])
    answer = complete(server, "mine")
    assert answer.status_code == 404, answer.text
    message = answer.json()["error"]["message"]
    assert "a text does not need model.vision_tower" in message
    assert "position_embedding, and only linears and convolutions can be tried by themselves" in message


def replica(server: Any) -> dict[str, Any]:
    answer = requests.get(f"{server.url}/admin/replicas", headers=ADMIN, timeout=30).json()
    return dict(answer["data"][0])


def test_a_rewritten_one_is_merged_anew(place: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.registry.watch.LOOK_EVERY_S", 0.05)
    first = trained("bias", place / "allowed" / "mine")
    server = start(
        [model(place / "dense"), {"id": "mine", "base": "base", "adapter": str(place / "allowed" / "mine")}], settle_s=0
    )
    assert text(server, "mine") == first
    second = trained("dora", place / "allowed" / "next")
    shutil.copytree(place / "allowed" / "next", place / "allowed" / "mine", dirs_exist_ok=True)
    until(lambda: text(server, "mine") == second)
    assert second != first


def test_one_without_effect_is_refused(place: Path, start: Start) -> None:
    def still(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for key in tensors:
            if "lora_B" in key:
                tensors[key].zero_()

    folder = write_adapter(llama(), place / "allowed" / "zero", ["q_proj"], bias="lora_only", change=still)

    def more(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors["x"] = torch.ones(1)

    extra = write_adapter(llama(), place / "allowed" / "extra", ["q_proj"], bias="lora_only", change=more)
    adapters = [{"id": each.name, "base": "base", "adapter": str(each)} for each in (folder, extra)]
    server = start([model(place / "plain"), *adapters])
    for name, reason in (("zero", "it changes nothing"), ("extra", "has x, which has no effect in its base")):
        answer = complete(server, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), answer.text
        assert reason in answer.json()["error"]["message"]
        assert states(server)[name]["state"] == "refused"
