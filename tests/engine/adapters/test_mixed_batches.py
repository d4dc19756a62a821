"""Adapters in one batch with each other and with the base: every answer is that of a dense merge by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.adapters.lora_file import read_lora
from deployments.adapters.refused import AdapterRefused
from deployments.config.engine import EngineOptions
from deployments.engine.adapters.table import AdapterTable
from deployments.engine.base.protocol import AdapterEngine
from deployments.engine.cache.cache import new_cache
from deployments.engine.model.forward import Forward
from deployments.engine.verify.row_probe import watch_modules
from tests.adapters.lora import merged, write_adapter
from tests.engine.architectures import decoder, llava
from tests.engine.running import (
    Alone,
    Answer,
    batching_engine,
    generate_alone,
    generate_engine,
    model_info,
    prompt,
    submit,
)
from tests.forms import some
from tests.tiny import gpt2, llama, mamba, t5

TOKENS = 12
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES: Mapping[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "llama": (llama, LINEARS),
    "qwen3": (lambda: decoder("qwen3"), LINEARS),
    "gemma3": (lambda: decoder("gemma3_text"), (*LINEARS, "embed_tokens")),
    "gpt2": (gpt2, ("c_attn", "c_proj", "c_fc")),
    "mixtral": (lambda: decoder("mixtral"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "t5": (t5, ("q", "k", "v", "o", "wi", "wo")),
    "mamba": (mamba, ("in_proj", "x_proj", "out_proj")),
    "llava": (llava, ("q_proj", "v_proj", "linear_1")),
}
QUICK = ("llama", "gemma3", "gpt2", "t5", "mamba")

pytestmark = pytest.mark.usefixtures("one_thread")


class Rig:
    """An engine with adapters, and the merged models that say what each answers.

    Args:
        model: the base.
        folders: the adapters.
        engine: over a model of its own.
    """

    def __init__(self, model: Any, folders: list[Path], engine: AdapterEngine) -> None:
        self.engine = engine
        self.references = {"": model}
        self._expected: dict[tuple[str, tuple[int, ...]], Alone] = {}
        for folder in folders:
            file = read_lora(folder)
            engine.add_adapter(folder.name, file)
            self.references[folder.name] = merged(model, folder, file.config.scale_of)

    def replace(self, key: str, model: Any) -> None:
        self.references[key] = model
        self._expected.clear()

    def ask(self, key: str, ids: list[int], **asked: Any) -> Answer:
        return submit(self.engine, ids, TOKENS, adapter=key, logprobs=0, **asked)

    def check(self, key: str, ids: list[int], answer: Answer, tolerance: float = 1e-3) -> None:
        asked = (key, tuple(ids))
        if asked not in self._expected:
            self._expected[asked] = generate_alone(self.references[key], ids, TOKENS)
        expected = self._expected[asked]
        assert answer.wait().token_ids == expected.token_ids, key
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=tolerance)


def adapters(model: Any, folder: Path, targets: tuple[str, ...], count: int = 3, **config: Any) -> list[Path]:
    """Adapters of several ranks, one of which changes a part of the modules alone."""
    return [
        write_adapter(
            model,
            folder / f"a{i}",
            targets if i else targets[: max(1, len(targets) - 1)],
            seed=i,
            rank=2 + 3 * i,
            **config,
        )
        for i in range(count)
    ]


def check_mixed(rig: Rig, vocab: int = 150, each: int = 4) -> None:
    """Some requests of each adapter and of the base at once, in two rounds: the second begins with kept prefixes."""
    for _ in range(2):
        asked = [(key, prompt(i % 4, 9 + 7 * (i % 4), vocab)) for i in range(each) for key in rig.references]
        for (key, ids), answer in [((key, ids), rig.ask(key, ids)) for key, ids in asked]:
            rig.check(key, ids, answer)


@some("family", FAMILIES, QUICK)
def test_families(family: str, tmp_path: Path) -> None:
    build, targets = FAMILIES[family]
    model = build()
    engine = batching_engine(build(), max_batch_size=8)
    rig = Rig(model, adapters(model, tmp_path, targets), engine)
    try:
        check_mixed(rig)
        if family != "mamba":
            assert engine.stats().cached_tokens > 0 or family == "t5"
    finally:
        engine.close()


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        {"trainable_token_indices": {"embed_tokens": [*range(9, 60)], "lm_head": [1, 99, 100]}},
        {"rank_pattern": {"v_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"alpha_pattern": {r"model\.layers\.1\.mlp\.up_proj": 30}},
    ],
    ids=["rslora", "bias", "dora", "saved", "tokens", "patterns", "pattern of a path"],
)
def test_configurations(config: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    engine = batching_engine(llama(), max_batch_size=8)
    try:
        check_mixed(Rig(model, adapters(model, tmp_path, LINEARS, **config), engine))
    finally:
        engine.close()


def test_layers(tmp_path: Path) -> None:
    def leave_out(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        for key in [key for key in tensors if ".layers.0." in key]:
            del tensors[key]

    model = llama()
    folder = write_adapter(model, tmp_path / "a", LINEARS, layers_to_transform=[1], change=leave_out)
    engine = batching_engine(llama())
    try:
        check_mixed(Rig(model, [folder], engine))
    finally:
        engine.close()


def test_many_sequences(tmp_path: Path) -> None:
    """More than have copies of their own."""
    model = llama()
    engine = batching_engine(llama(), max_batch_size=32)
    try:
        check_mixed(Rig(model, adapters(model, tmp_path, LINEARS, lora_bias=True), engine), each=8)
    finally:
        engine.close()


def test_a_head(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    engine = batching_engine(llama(tie_word_embeddings=True))
    try:
        check_mixed(Rig(model, adapters(model, tmp_path, ("q_proj", "lm_head")), engine))
    finally:
        engine.close()


def test_tokens_of_a_tied_embedding(tmp_path: Path) -> None:
    """The head has the new vectors too; the embedding scales them, as it does its own."""

    def build() -> Any:
        return decoder("gemma3_text", tie_word_embeddings=True)

    engine = batching_engine(build())
    try:
        check_mixed(Rig(build(), adapters(build(), tmp_path, LINEARS, trainable_token_indices=[*range(9, 60)]), engine))
    finally:
        engine.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_beside_adapters_has_the_bits_that_it_has_without_them(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    forward = Forward(model)
    forward.adapters = AdapterTable(model, watch=partial(watch_modules, forward, groups=True))
    for folder in adapters(llama(), tmp_path, LINEARS):
        forward.adapters.add(folder.name, forward.adapters.fit(read_lora(folder)))
    prompts = [prompt(i, 9) for i in range(4)]

    def step(keys: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        cache = new_cache(model)
        with torch.inference_mode(), forward.adapters.applied(keys):
            first = forward.prefill(prompts, cache).logits
            return first, forward.decode([5] * 4, [(0,)] * 4, cache)

    base, mixed = step(("", "", "", "")), step(("", "a0", "", "a2"))
    for without, beside in zip(base, mixed, strict=True):
        assert [torch.equal(without[i], beside[i]) for i in range(4)] == [True, False, True, False]


def test_the_model_is_as_it_was_between_forwards(tmp_path: Path) -> None:
    model = llama()
    engine = batching_engine(model, pack_linears=False)
    rig = Rig(llama(), adapters(model, tmp_path, LINEARS), engine)
    try:
        rig.ask("a1", prompt(0, 9)).wait()
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    finally:
        engine.close()


@pytest.mark.parametrize("counts", [(6, 15), pytest.param(range(16), marks=pytest.mark.long)], ids=["some", "all"])
def test_bits_do_not_depend_on_other_adapters(counts: Sequence[int], tmp_path: Path) -> None:
    """The deterministic mode, beside up to 15 sequences of other adapters and of the base."""
    model = llama().bfloat16()
    engine = batching_engine(llama().bfloat16(), max_batch_size=16, deterministic=True)
    rig = Rig(model, adapters(model, tmp_path, LINEARS), engine)
    ids = prompt(3, 40)
    try:
        alone = rig.ask("a1", ids).wait()
        for count in counts:
            others = [rig.ask(list(rig.references)[i % 4], prompt(i, 10 + i)) for i in range(count)]
            assert rig.ask("a1", ids).wait().logprobs == alone.logprobs
            for answer in others:
                answer.wait()
        same = [rig.ask("a1", ids) for _ in range(4)]
        assert all(answer.wait().logprobs == alone.logprobs for answer in same)
    finally:
        engine.close()


def experts() -> Any:
    """A model whose experts are linears that see the tokens that were routed to them."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp)
    return model


class Experts(torch.nn.Module):
    """Two experts: even and odd tokens of the flattened batch, by the sign of their first number."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList([mlp, copy.deepcopy(mlp)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        output = torch.zeros_like(flat)
        for chosen, expert in zip((flat[:, 0] > 0, flat[:, 0] <= 0), self.experts, strict=True):
            output[chosen] = expert(flat[chosen])
        return output.reshape(x.shape)


def test_an_adapter_on_experts_is_computed_by_itself(tmp_path: Path) -> None:
    model = experts()
    engine = batching_engine(experts(), max_batch_size=8)
    folders = [
        write_adapter(model, tmp_path / "one", ("up_proj", "down_proj"), seed=1),
        write_adapter(model, tmp_path / "two", ("up_proj", "down_proj"), seed=2),
        write_adapter(model, tmp_path / "rows", ("q_proj",), seed=3),
    ]
    rig = Rig(model, folders, engine)
    try:
        assert [engine.adapters.group(key) for key in ("one", "two", "rows", "")] == ["one", "two", "", ""]
        check_mixed(rig)
    finally:
        engine.close()


class Fused(torch.nn.Module):
    """Reads the weight of its last linear itself, as a fused kernel does."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(self.up_proj(x).tanh(), self.down_proj.weight)


def test_an_adapter_on_a_module_that_is_never_called_is_refused(tmp_path: Path) -> None:
    def fused() -> Any:
        model = llama()
        for layer in model.model.layers:
            layer.mlp = Fused(layer.mlp)
        return model

    model = fused()
    engine = batching_engine(fused())
    try:
        rig = Rig(model, [write_adapter(model, tmp_path / "good", ("up_proj", "q_proj"))], engine)
        bad = write_adapter(model, tmp_path / "bad", ("down_proj", "q_proj"))
        with pytest.raises(
            AdapterRefused, match=r"reads the weight of model\.layers\.0\.mlp\.down_proj without calling"
        ):
            engine.add_adapter("bad", read_lora(bad))
        check_mixed(rig)
    finally:
        engine.close()


def test_beams(tmp_path: Path) -> None:
    model = llama()
    engine = batching_engine(llama())
    rig = Rig(model, adapters(model, tmp_path, LINEARS), engine)
    ids = prompt(1, 12)
    try:
        for key, reference in rig.references.items():
            answer = submit(engine, ids, TOKENS, adapter=key, num_beams=3).wait()
            output = reference.generate(
                torch.tensor([ids]),
                max_new_tokens=TOKENS,
                num_beams=3,
                do_sample=False,
                eos_token_id=1 << 20,
                pad_token_id=0,
            )
            assert answer.token_ids == output[0, len(ids) :].tolist(), key
    finally:
        engine.close()


def test_the_generate_engine(tmp_path: Path) -> None:
    model = llama()
    engine = generate_engine(model_info(llama()), EngineOptions(max_batch_size=4))
    try:
        check_mixed(Rig(model, adapters(model, tmp_path, LINEARS), engine))
    finally:
        engine.close()


def test_an_adapter_that_is_dropped_and_another_under_the_same_key(tmp_path: Path) -> None:
    model = llama()
    engine = batching_engine(llama())
    first, second = adapters(model, tmp_path, LINEARS, count=2)
    rig = Rig(model, [first], engine)
    ids = prompt(0, 40)
    try:
        rig.check("a0", ids, rig.ask("a0", ids))
        engine.remove_adapter("a0")
        file = read_lora(second)
        engine.add_adapter("a0", file)
        rig.replace("a0", merged(model, second, file.config.scale_of))
        answer = rig.ask("a0", ids)
        rig.check("a0", ids, answer)
        assert answer.cached_tokens == 0
    finally:
        engine.close()
