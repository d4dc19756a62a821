"""Interventions change one sequence as torch hooks on the stock model would, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from deployments.core.calls import Intervention, SamplingParams, Vector, Window
from deployments.core.errors import BadRequest, ModelError
from deployments.engine.base.protocol import EngineRequest
from tests import tiny
from tests.engine import architectures
from tests.engine.running import built_engine, model_info, prompt
from tests.engine.stepped import Stepped
from tests.inside.asking import Seen, ask, capture, change, hooked, start
from tests.inside.test_capture import engine_of

WIDTH = 48
DIRECTION = torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))
UNIT = DIRECTION / DIRECTION.norm()

CHANGES: dict[str, tuple[Intervention, Callable[[Tensor], Tensor]]] = {
    "add": (change("model.layers.0", "add", DIRECTION, scale=3.0), lambda h: h + 3 * DIRECTION),
    "norm_match": (
        change("model.layers.0", "add", DIRECTION, norm_match=True),
        lambda h: h + UNIT * h.norm(dim=-1, keepdim=True),
    ),
    "scale": (change("model.layers.0", "scale", scale=0.5), lambda h: h * 0.5),
    "zero": (
        change("model.layers.0", "zero", features=((0, 16),)),
        lambda h: torch.cat([h[..., :16] * 0, h[..., 16:]], -1),
    ),
    "set": (change("model.layers.0", "set", DIRECTION), lambda h: DIRECTION.expand_as(h)),
    "clamp": (
        change("model.layers.0", "clamp", DIRECTION, value=0.0),
        lambda h: h - (h @ UNIT)[..., None] * UNIT,
    ),
    "clamp_columns": (
        change("model.layers.0", "clamp", features=((0, WIDTH),), min=-1.0, max=1.0),
        lambda h: h.clamp(-1, 1),
    ),
}
POSITIONS: dict[str, Any] = {
    "all": ("all", lambda position, prompt: True),
    "prompt": ("prompt", lambda position, prompt: position < prompt),
    "generated": ("generated", lambda position, prompt: position >= prompt),
    "last_prompt": ("last_prompt", lambda position, prompt: position == prompt - 1),
    "some": ((0, -2, 12), lambda position, prompt: position in (0, prompt - 2, 12)),
    "window": (Window(start=1, end=4), lambda position, prompt: 1 <= position < 4),
}


def steered_alone(
    model: Any, ids: list[int], count: int, function: Callable[[Tensor], Tensor], chosen: Callable[[int, int], bool]
) -> tuple[list[int], list[float]]:
    """A greedy loop of the stock model with a torch hook: tokens and log-probabilities."""
    text = list(ids)
    scores = []
    for _ in range(count):
        mask = torch.tensor([chosen(position, len(ids)) for position in range(len(text))])

        def hook(module: Any, args: Any, output: Tensor, mask: Tensor = mask) -> Tensor:
            return torch.where(mask[None, :, None], function(output), output)

        with ExitStack() as stack, torch.inference_mode():
            stack.enter_context(model.model.layers[0].register_forward_hook(hook))
            logprobs = model(torch.tensor([text]), use_cache=False).logits[0, -1].log_softmax(-1)
        text.append(int(logprobs.argmax()))
        scores.append(logprobs.max().item())
    return text[len(ids) :], scores


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny.llama()


@pytest.fixture(scope="module")
def engine(llama: Any) -> Any:
    made = engine_of(tiny.llama())
    yield made
    made.close()


@pytest.mark.parametrize("op", CHANGES)
@pytest.mark.parametrize("where", ["all", "generated"])
def test_every_operation_is_that_of_a_torch_hook(engine: Any, llama: Any, op: str, where: str) -> None:
    intervention, function = CHANGES[op]
    positions, chosen = POSITIONS[where]
    asked = _at(intervention, positions)
    ids = prompt(1, 20)
    expected = steered_alone(llama, ids, 5, function, chosen)
    answers = [start(engine, ids, 5, interventions=(asked,), logprobs=0), start(engine, prompt(2, 7), 9)]
    found = answers[0].wait()
    answers[1].wait()
    assert found.token_ids == expected[0]
    assert found.logprobs == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.parametrize("where", POSITIONS)
def test_every_kind_of_position(engine: Any, llama: Any, where: str) -> None:
    intervention, function = CHANGES["add"]
    positions, chosen = POSITIONS[where]
    ids = prompt(3, 10)
    expected = steered_alone(llama, ids, 5, function, chosen)
    found = ask(engine, ids, 5, interventions=(_at(intervention, positions),), logprobs=0)
    assert found.token_ids == expected[0]
    assert found.logprobs == pytest.approx(expected[1], abs=1e-4)


def _at(intervention: Intervention, positions: Any) -> Intervention:
    return dataclasses.replace(intervention, positions=positions)


def test_the_prompts_log_probabilities_are_steered(engine: Any, llama: Any) -> None:
    """As lm_eval asks: echo of a prompt, and nothing generated."""
    ids = prompt(4, 30)
    found = ask(engine, ids, 0, interventions=(CHANGES["add"][0],), prompt_logprobs=0)
    with llama.model.layers[0].register_forward_hook(lambda *call: CHANGES["add"][1](call[2])), torch.inference_mode():
        logprobs = llama(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    assert found.scores is not None
    given = [score.logprob for score in found.scores.scores[1:] if score is not None]
    expected = [logprobs[position, token].item() for position, token in enumerate(ids[1:])]
    assert given == pytest.approx(expected, abs=1e-4)


def test_patched_states_give_the_patched_prompts_answer(engine: Any) -> None:
    first, second = prompt(5, 12), prompt(6, 12)
    donor = ask(engine, first, 4, capture=capture("model.layers.1", positions="prompt"), logprobs=0)
    assert ask(engine, second, 4, logprobs=0).logprobs[0] != pytest.approx(donor.logprobs[0], abs=1e-3)
    patch = change("model.layers.1", "set", donor.tensors["model.layers.1"], positions=tuple(range(12)))
    patched = ask(engine, second, 1, interventions=(patch,), logprobs=0)
    assert patched.token_ids[0] == donor.token_ids[0]
    assert patched.logprobs[0] == pytest.approx(donor.logprobs[0], abs=1e-5)


def test_zero_at_the_last_norm_makes_every_token_as_likely(engine: Any) -> None:
    answer = ask(engine, prompt(7, 9), 5, interventions=(change("model.norm", "zero"),), logprobs=0)
    assert answer.logprobs == pytest.approx([-math.log(261)] * 5, abs=1e-6)


def test_a_logit_that_is_raised_is_always_chosen(engine: Any) -> None:
    raised = change("lm_head", "add", torch.tensor([1e4]), features=((77, 78),))
    assert ask(engine, prompt(8, 9), 6, interventions=(raised,)).token_ids == [77] * 6


def test_captured_states_are_those_that_the_answer_follows_from(engine: Any, llama: Any) -> None:
    answer = ask(
        engine,
        prompt(9, 9),
        8,
        temperature=1.0,
        seed=3,
        logprobs=0,
        interventions=(CHANGES["add"][0],),
        capture=capture("model.norm", positions=tuple(range(8, 16))),
    )
    logprobs = (answer.tensors["model.norm"] @ llama.lm_head.weight.T).log_softmax(-1)
    expected = [logprobs[place, token].item() for place, token in enumerate(answer.token_ids)]
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_neighbors_keep_their_bits(kind: str) -> None:
    prompts = [prompt(seed, 4 + 3 * seed) for seed in range(16)]
    last = (len(prompts[0]) + 4,)
    asked: list[dict[str, Any]] = [
        {},
        {"capture": capture("hidden_states", positions="all")},
        {"interventions": (change("model.layers.1", "scale", scale=1e6),)},
        {"interventions": (change("model.layers.1", "hook", name="broken", positions=last),)},
    ]
    found = []
    for one in asked:
        stepped = Stepped(tiny.llama().to(getattr(torch, kind)), max_batch_size=16)
        stepped.hooks["broken"] = lambda states, **_: states * float("nan")
        answers = [Seen(f"{kind}-{place}") for place in range(len(prompts))]
        for place, (ids, answer) in enumerate(zip(prompts, answers, strict=True)):
            sampling = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=2)
            changed = dataclasses.replace(sampling, **one) if place == 0 else sampling
            request = EngineRequest(request_id=answer.request_id, input_ids=ids, sampling=changed)
            stepped.queue(request, answer.emit)
        stepped.run()
        error = answers[0].error
        assert (error is not None and error.code == "intervention_not_finite") == (one is asked[3])
        found.append([(answer.wait().token_ids, answer.logprobs) for answer in answers[1:]])
    assert all(each == found[0] for each in found)


def test_neighbors_in_a_mixture_of_experts_keep_their_bits_in_deterministic_mode() -> None:
    model = architectures.decoder("qwen3_moe")
    engine = engine_of(model, deterministic=True)
    ids = prompt(1, 20)
    alone = ask(engine, ids, 6, logprobs=2)
    steered = start(engine, prompt(2, 9), 30, interventions=(change("model.layers.1", "scale", scale=1e6),))
    assert ask(engine, ids, 6, logprobs=2).logprobs == alone.logprobs
    steered.wait()
    engine.close()


def test_prefixes_follow_the_interventions() -> None:
    """Every order of steered and plain turns answers as without a store, and repeats reuse."""
    kinds = [(), (CHANGES["add"][0],), (change("model.layers.0", "add", DIRECTION, scale=9.0),)]
    kinds.append((_at(CHANGES["add"][0], "generated"),))
    kinds.append((_at(CHANGES["add"][0], "last_prompt"),))
    ids = prompt(10, 40)
    with_store, without = engine_of(tiny.llama()), engine_of(tiny.llama(), prefix_cache=False)
    expected = [ask(without, ids, 6, interventions=kind).token_ids for kind in kinds]
    assert len({tuple(tokens) for tokens in expected}) > 2
    for order in itertools.permutations(range(4), 2):
        for index in order:
            assert ask(with_store, ids, 6, interventions=kinds[index]).token_ids == expected[index]
    for index in range(len(kinds)):
        again = ask(with_store, ids, 6, interventions=kinds[index])
        assert again.token_ids == expected[index]
        assert (again.cached_tokens > 0) == (index != 4)
        turn = [*ids, *again.token_ids, *prompt(11, 9)]
        second = [ask(engine, turn, 5, interventions=kinds[index]).token_ids for engine in (with_store, without)]
        assert second[0] == second[1]
    with_store.close()
    without.close()


def test_a_hook_of_the_loader() -> None:
    calls: list[dict[str, Any]] = []

    def double(states: Tensor, *, module: str, positions: list[int], args: dict[str, float], **_: Any) -> Tensor:
        calls.append({"module": module, "positions": positions, "shape": tuple(states.shape)})
        return states * args["factor"]

    def broken(states: Tensor, **_: Any) -> Tensor:
        raise ValueError("no such feature")

    vectors = {"up": DIRECTION}
    engine = built_engine(model_info(tiny.llama(), hooks={"double": double, "broken": broken}, vectors=vectors))
    ids = prompt(12, 8)
    hooked_answer = ask(
        engine, ids, 4, interventions=(change("model.layers.0", "hook", name="double", args='{"factor": 2}'),)
    )
    assert (
        hooked_answer.token_ids
        == ask(engine, ids, 4, interventions=(change("model.layers.0", "scale", scale=2.0),)).token_ids
    )
    assert [call["positions"] for call in calls] == [list(range(8)), [8], [9], [10]]
    assert calls[0] == {"module": "model.layers.0", "positions": list(range(8)), "shape": (8, WIDTH)}
    other = start(engine, prompt(13, 8), 4)
    failed = start(engine, ids, 4, interventions=(change("model.layers.0", "hook", name="broken"),))
    failed.end()
    assert isinstance(failed.error, ModelError)
    assert "'broken'" in failed.error.message
    assert "no such feature" in failed.error.message
    other.wait()
    by_name = Intervention(module="model.layers.0", op="add", vector=Vector(name="up"))
    given = change("model.layers.0", "add", DIRECTION)
    texts = [ask(engine, ids, 4, interventions=(each,)).token_ids for each in (by_name, given)]
    assert texts[0] == texts[1]
    engine.close()


def test_no_hook_is_left_after_many_requests() -> None:
    model = tiny.llama()
    engine = engine_of(model)
    kinds = [
        {"capture": capture("hidden_states", positions="all")},
        {"interventions": (CHANGES["add"][0],)},
        {"interventions": (change("model.layers.*.mlp:input", "zero"),), "capture": capture("model.norm")},
        {},
    ]
    answers = [start(engine, prompt(seed, 3 + seed % 30), 12, **kinds[seed % 4]) for seed in range(60)]
    for answer in answers[::2]:
        engine.cancel(answer.request_id)
    for answer in answers[1::2]:
        answer.wait()
    ask(engine, prompt(1, 3), 2)
    assert hooked(model) == []
    engine.close()


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"interventions": (change("model.layers.9", "zero"),)}, "unknown_module"),
        ({"interventions": (change("model.layers", "zero"),)}, "module_not_steerable"),
        ({"interventions": (change("model.layers.0.self_attn:attention", "zero"),)}, "module_not_steerable"),
        ({"interventions": (change("model.embed_tokens:input", "zero"),)}, "module_not_steerable"),
        ({"interventions": (change("model.layers.0", "add", torch.ones(3)),)}, "vector_shape"),
        ({"interventions": (change("model.layers.0", "add", torch.full((WIDTH,), math.inf)),)}, "vector_shape"),
        ({"interventions": (change("model.layers.0", "clamp", torch.zeros(WIDTH), value=0.0),)}, "vector_shape"),
        ({"interventions": (change("model.layers.0", "hook", name="sae"),)}, "unknown_hook"),
        ({"interventions": (change("model.layers.0", "zero", positions=(99,)),)}, "positions_out_of_range"),
        ({"interventions": (change("model.layers.0", "zero", positions=Window(end=99)),)}, "positions_out_of_range"),
        ({"capture": capture("lm_head", positions="all")}, "module_not_capturable"),
        ({"capture": capture("model.layers.0:output.3")}, "module_not_capturable"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(
    engine: Any, asked: dict[str, Any], code: str
) -> None:
    steps = engine.stats().steps
    with pytest.raises(BadRequest) as refused:
        start(engine, prompt(1, 9), 4, **asked)
    assert refused.value.code == code
    assert engine.stats().steps == steps
