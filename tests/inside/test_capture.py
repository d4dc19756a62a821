"""What is captured is what the stock model gives for each sequence alone, whatever else is computed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.core.errors import BadRequest
from deployments.engine.batching.engine import BatchingEngine
from tests import tiny
from tests.engine import architectures
from tests.engine.running import batching_engine, prompt
from tests.inside.asking import Seen, ask, capture, change, far, hooked, start, states_alone

LENGTHS = (1, 3, 33, 70, 12, 5, 17, 16)
CLOSE = 1e-5
ALL = capture("hidden_states", positions="all")
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny.llama,
    "gpt2": tiny.gpt2,
    **{
        kind: lambda kind=kind: architectures.decoder(kind)
        for kind in ("falcon", "gemma2", "qwen3_moe", "mamba2", "phi", "opt")
    },
}


def engine_of(model: Any, **options: Any) -> BatchingEngine:
    return batching_engine(model, inside=True, **{"prefill_chunk": 16, "max_batch_size": 16, **options})


def check(model: Any, ids: list[int], answer: Seen, *, close: float = CLOSE) -> None:
    """Every hidden state at every position but that of the last token, which is never an input."""
    text = [*ids, *answer.token_ids][:-1]
    assert answer.numbered == {"positions": list(range(len(text))), "token_ids": text}
    for layer, state in enumerate(states_alone(model, text)):
        assert far(answer.tensors[f"hidden_states.{layer}"], state) <= close, (layer, len(ids))


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_in_a_batch_are_those_alone(kind: str) -> None:
    model = MODELS[kind]()
    alone, engine = copy.deepcopy(model), engine_of(model)
    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    first = [start(engine, ids, 5, capture=ALL) for ids in prompts[:4]]
    first[0].wait()
    others = [start(engine, ids, 5, capture=ALL) for ids in prompts[4:]]
    left = start(engine, prompt(9, 40), 200, capture=ALL)
    engine.cancel(left.request_id)
    # Float32 sums of a scan depend on how it is cut into chunks.
    close = 1e-4 if kind == "mamba2" else CLOSE
    for ids, answer in zip(prompts, [*first, *others], strict=True):
        answer.wait()
        check(alone, ids, answer, close=close)
    engine.close()
    assert hooked(model) == []


def test_bfloat16() -> None:
    model = tiny.llama().to(torch.bfloat16)
    alone, engine = copy.deepcopy(model), engine_of(model)
    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    for ids, answer in [(ids, start(engine, ids, 4, capture=ALL)) for ids in prompts]:
        answer.wait()
        check(alone, ids, answer, close=3e-2)
    engine.close()


def test_an_encoder_decoder() -> None:
    model, alone = tiny.bart(), tiny.bart()
    engine = engine_of(model)
    wanted = capture("hidden_states", "model.encoder.layers.1", positions="all")
    answers = [(prompt(seed, 9 + seed), start(engine, prompt(seed, 9 + seed), 5, capture=wanted)) for seed in range(3)]
    for ids, answer in answers:
        answer.wait()
        fed = answer.numbered["token_ids"]
        states = states_alone(alone, ids, decoder_input_ids=torch.tensor([fed]))
        for layer, state in enumerate(states):
            assert far(answer.tensors[f"hidden_states.{layer}"], state) <= CLOSE
        # What runs once for a request has its own shape, with no axis of positions.
        assert answer.tensors["model.encoder.layers.1"].shape == (1, len(ids), 32)
    engine.close()


def test_a_model_that_sees_images() -> None:
    model = architectures.llava()
    engine = engine_of(model)
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    ids = [*prompt(1, 3), *[architectures.IMAGE_TOKEN] * 4, *prompt(2, 6)]
    inputs = {"pixel_values": pixels}
    answer = ask(engine, ids, 4, capture=ALL, inputs=inputs, content_key="image")
    text = [*ids, *answer.token_ids][:-1]
    for layer, state in enumerate(states_alone(model, text, pixel_values=pixels)):
        assert far(answer.tensors[f"hidden_states.{layer}"], state) <= CLOSE
    engine.close()


def test_prefixes_are_reused_up_to_the_first_captured_token() -> None:
    model = tiny.llama()
    engine = engine_of(model)
    ids = prompt(1, 40)
    kept = ask(engine, ids, 8)
    turn = [*ids, *kept.token_ids, *prompt(2, 10)]
    plain = ask(engine, turn, 4)
    assert plain.cached_tokens > 0
    whole = ask(engine, turn, 4, capture=ALL)
    assert (whole.cached_tokens, whole.token_ids) == (0, plain.token_ids)
    check(model, turn, whole)
    last = ask(engine, turn, 4, capture=capture("model.layers.1"))
    assert last.cached_tokens >= len(turn) - 1 - 16
    assert last.numbered["positions"] == [len(turn) - 1]
    generated = ask(engine, turn, 4, capture=capture("model.layers.1", positions="generated"))
    assert generated.cached_tokens >= len(turn) - 1
    engine.close()


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_chunk": 7},
        {"prefill_chunk": 512},
        {"prompt_lookup": 4},
        {"pack_linears": True},
        {"deterministic": True},
    ],
    ids=str,
)
def test_each_position_is_there_once_under_any_option(options: dict[str, Any]) -> None:
    model = tiny.llama()
    engine = engine_of(model, **options)
    repeated = prompt(1, 6) * 6
    prompts = [repeated, prompt(2, 33), prompt(3, 4)]
    for ids, answer in [(ids, start(engine, ids, 8, capture=ALL)) for ids in prompts]:
        answer.wait()
        check(tiny.llama(), ids, answer)
    engine.close()


@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), torch.OutOfMemoryError("none left")], ids=["error", "memory"]
)
@pytest.mark.parametrize("tokens", [6, 1], ids=["prefill", "decode"])
def test_a_forward_that_fails_leaves_no_trace(error: Exception, tokens: int) -> None:
    model = tiny.llama()
    engine = engine_of(model)
    failed: list[int] = []

    def fail_once(module: Any, args: Any, output: torch.Tensor) -> None:
        if not failed and output.shape[0] > 1 and output.shape[1] == tokens:
            failed.append(output.shape[0])
            raise error

    handle = model.model.norm.register_forward_hook(fail_once)
    prompts = [prompt(seed, 6) for seed in range(1, 7)]
    answers = [start(engine, ids, 8, capture=ALL) for ids in prompts]
    for answer in answers:
        answer.wait()
    assert failed
    handle.remove()
    for ids, answer in zip(prompts, answers, strict=True):
        check(tiny.llama(), ids, answer)
    engine.close()


def test_logits_of_a_text_that_is_computed_again() -> None:
    """A prefill computes those of its last token alone; without memory, generated tokens are computed by one."""
    model, failed = tiny.llama(), []
    engine = engine_of(model)

    def fail_late(module: Any, args: Any, output: torch.Tensor) -> None:
        failed.append(output.shape[0] > 1 and output.shape[1] == 1)
        if failed.count(True) == 4 and failed[-1]:
            raise torch.OutOfMemoryError("none left")

    handle = model.model.norm.register_forward_hook(fail_late)
    wanted = capture("lm_head", "model.norm", positions=tuple(range(5, 13)))
    answers = [start(engine, prompt(seed, 6), 8, capture=wanted) for seed in (1, 2)]
    for answer in answers:
        answer.wait()
        assert answer.numbered["positions"] == list(range(5, 13))
        assert far(answer.tensors["lm_head"], answer.tensors["model.norm"] @ model.lm_head.weight.T) <= CLOSE
    assert failed.count(True) >= 4
    handle.remove()
    engine.close()


def test_capturing_computes_nothing_twice() -> None:
    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    found = []
    for asked in ({}, {"capture": capture("hidden_states", positions="generated")}):
        engine = engine_of(tiny.llama())
        texts = [ask(engine, ids, 5, **asked).token_ids for ids in prompts]
        engine.close()
        stats = engine.stats()
        found.append((texts, stats.steps, stats.prompt_tokens, stats.generated_tokens))
    assert found[0] == found[1]


def test_bits_do_not_depend_on_others_in_deterministic_mode() -> None:
    model = tiny.llama()
    engine = engine_of(model, deterministic=True)
    ids = prompt(1, 33)
    alone = ask(engine, ids, 5, capture=ALL).tensors
    others = [start(engine, prompt(seed, 5 + seed), 9) for seed in range(2, 12)]
    beside = ask(engine, ids, 5, capture=ALL).tensors
    assert all(torch.equal(alone[name], beside[name]) for name in alone)
    for other in others:
        other.wait()
    engine.close()


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_attention_weights_are_those_of_an_eager_copy(kind: str) -> None:
    # Scores of moderate size, and a copy in float64: the rounding of scores of 40 is 1e-5 of a weight in float32.
    sizes = {"initializer_range": 0.25, **({"sliding_window": 16} if kind == "mistral" else {})}
    build = getattr(tiny, kind)
    eager = build(attn_implementation="eager", **sizes).double()
    engine = engine_of(build(**sizes))
    wanted = capture("model.layers.*.self_attn:attention", positions="all")
    prompts = [prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    answers = [start(engine, ids, 5, capture=wanted) for ids in prompts]
    for ids, answer in zip(prompts, answers, strict=True):
        answer.wait()
        text = [*ids, *answer.token_ids][:-1]
        with torch.inference_mode():
            expected = eager(torch.tensor([text]), output_attentions=True).attentions
        for layer, weights in enumerate(expected):
            found = answer.tensors[f"model.layers.{layer}.self_attn:attention"]
            assert far(found, weights[0].transpose(0, 1)) <= CLOSE
    engine.close()


def test_attention_weights_leave_the_models_own_bits() -> None:
    engine = engine_of(tiny.llama(), prefix_cache=False)
    wanted = capture("model.layers.*.self_attn:attention", positions="all")
    for ids in (prompt(seed, length) for seed, length in enumerate(LENGTHS[:4])):
        plain, captured = (ask(engine, ids, 5, logprobs=0, **asked) for asked in ({}, {"capture": wanted}))
        assert captured.logprobs == plain.logprobs
    engine.close()


def test_positions_and_taps_as_they_are_asked_for() -> None:
    model = tiny.llama()
    engine = engine_of(model)
    ids = prompt(1, 10)
    whole = ask(engine, ids, 5, capture=capture("model.layers.{0,1}", "model.layers.-1.mlp:input", positions="all"))
    assert list(whole.tensors) == ["model.layers.0", "model.layers.1", "model.layers.1.mlp:input"]
    for positions, expected in (
        ("last_prompt", [9]),
        ("prompt", list(range(10))),
        ("generated", [10, 11, 12, 13]),
        ((-1, 0, 12, 0), [0, 9, 12]),
    ):
        part = ask(engine, ids, 5, capture=capture("model.layers.0", positions=positions))
        assert part.numbered["positions"] == expected
        assert far(part.tensors["model.layers.0"], whole.tensors["model.layers.0"][expected]) <= CLOSE
    half = ask(engine, ids, 5, capture=capture("model.layers.0", positions="all", dtype="float16"))
    assert half.tensors["model.layers.0"].dtype is torch.float16
    engine.close()


def test_a_module_whose_calls_depend_on_the_tokens_is_refused() -> None:
    """An activation of experts has as many rows as tokens chose them."""
    engine = engine_of(architectures.decoder("qwen3_moe"))
    steps = engine.stats().steps
    name = "model.layers.0.mlp.experts.act_fn"
    asked: list[tuple[dict[str, Any], str]] = [
        ({"capture": capture(name)}, "module_not_capturable"),
        ({"interventions": (change(name, "zero"),)}, "module_not_steerable"),
    ]
    for one, code in asked:
        with pytest.raises(BadRequest, match="its shape depends on the tokens") as refused:
            start(engine, prompt(1, 9), 4, **one)
        assert refused.value.code == code
        assert name in refused.value.message
    assert engine.stats().steps == steps
    engine.close()
