"""Decode steps of a fixed shape. In place of a CUDA graph stands a recording of the operators: like a graph, a replay
runs no Python and knows only the tensors it was captured with."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelError, Unavailable
from deployments.engine.batching import engine as batching
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.cache.layers import KeyValueLayer
from deployments.engine.model.forward import Forward
from deployments.engine.speedups.fixed_decode import Capture, FixedDecode, Run, fixed_decode, uncaptured
from tests.engine.architectures import VISION, decoder
from tests.engine.running import Answer, batching_engine, generate_alone, prompt, submit
from tests.engine.test_parity import LONG, staggered

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = LONG.prompts


class Recording(TorchDispatchMode):
    """The operators of a step with the very tensors they ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


class Graphs:
    """Captures steps, and counts how often they are replayed."""

    def __init__(self) -> None:
        self.replayed: list[int] = []

    def __call__(self, run: Run) -> Run:
        run()
        recording = Recording()
        with recording:
            output = run()
        number = len(self.replayed)
        self.replayed.append(0)

        def replay() -> torch.Tensor:
            self.replayed[number] += 1
            new: dict[int, torch.Tensor] = {}
            for func, args, kwargs, old in recording.calls:
                args, kwargs = tree_map(lambda x: new.get(id(x), x), (args, kwargs))
                again = func(*args, **kwargs)
                new.update(zip(map(id, tree_flatten(old)[0]), tree_flatten(again)[0], strict=True))
            return output.copy_(new[id(output)])

        return replay


@contextmanager
def running(
    model: Any, capture: Capture, *, settled: int = 0, least_columns: int = 512, **options: Any
) -> Iterator[tuple[BatchingEngine, FixedDecode]]:
    """An engine that decodes in fixed steps."""
    made: list[FixedDecode] = []

    def make(forward: Forward, options: EngineOptions) -> FixedDecode:
        made.append(FixedDecode(forward, capture, settled=settled, least_columns=least_columns))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batching, "fixed_decode", make)
        engine = batching_engine(model, **{"max_batch_size": 6, "prefill_chunk": 32, **options})
    try:
        yield engine, made[-1]
    finally:
        engine.close(5)


def assert_alone(model: Any, answers: Sequence[Answer], prompts: Sequence[list[int]], **inputs: Any) -> None:
    for i, answer in enumerate(answers):
        alone = generate_alone(model, prompts[i], LONG.tokens[i], **inputs)
        count = len(answer.token_ids)
        assert count >= LONG.dropped.get(i, LONG.tokens[i])
        assert answer.token_ids == alone.token_ids[:count], f"request {i}"
        assert answer.logprobs == pytest.approx(alone.logprobs[:count], abs=1e-4), f"request {i}"


@pytest.mark.parametrize(("kind", "columns"), [("llama", 32), ("llama", 512), ("gpt_neox", 32), ("qwen3_moe", 512)])
def test_replays_give_what_generate_gives(kind: str, columns: int) -> None:
    """While sequences join, leave and grow out of their buffers."""
    model, graphs = decoder(kind), Graphs()
    with running(model, graphs, least_columns=columns) as (engine, fixed):
        answers = staggered(engine, LONG, PROMPTS)
    assert fixed.reason is None
    assert len(graphs.replayed) == fixed.captured >= 3
    assert sum(graphs.replayed) > 30
    assert_alone(model, answers, PROMPTS)


def test_positions_of_several_dimensions() -> None:
    build, image, media = VISION["qwen2_vl"]
    model, graphs = build(), Graphs()
    ids = [*prompt(1, 5), *image, *prompt(2, 9)]
    with running(model, graphs) as (engine, fixed):
        seen = submit(engine, ids, 30, inputs=media(ids, 1), content_key="1")
        read = submit(engine, PROMPTS[0], 30)
        assert seen.wait().token_ids == generate_alone(model, ids, 30, **media(ids, 1)).token_ids
        assert read.wait().token_ids == generate_alone(model, PROMPTS[0], 30).token_ids
    assert fixed.reason is None
    assert len(graphs.replayed) >= 2


def test_a_capture_waits_until_its_shape_was_wanted_several_times() -> None:
    model, graphs = decoder("llama"), Graphs()
    with running(model, graphs, settled=4) as (engine, _):
        submit(engine, PROMPTS[1], 4).wait()
        assert graphs.replayed == []
        submit(engine, PROMPTS[1], 30).wait()
        assert graphs.replayed == [28]


def test_a_batch_moves_into_the_step_that_an_earlier_one_has_left() -> None:
    model, graphs = decoder("llama"), Graphs()
    with running(model, graphs, prefix_cache=False) as (engine, fixed):
        for ids in PROMPTS[:4]:
            assert submit(engine, ids, 20).wait().token_ids == generate_alone(model, ids, 20).token_ids
    assert fixed.captured == 1
    assert graphs.replayed == [76]


@pytest.mark.parametrize(("steps", "captured"), [(0.5, 0), (2, 4), (4, 2)])
def test_buffers_of_steps_have_a_limit(steps: float, captured: int) -> None:
    """Steps of 64 and 96 columns in turns: with room for neither, for one at a time, and for both."""
    model, graphs = decoder("llama"), Graphs()
    config = model.config
    columns = 64 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    with running(model, graphs, least_columns=64, prefix_cache=False) as (engine, fixed):
        fixed.memory = int(steps * columns)
        for _ in range(2):
            for length in (40, 70):
                ids = prompt(length, length)
                assert submit(engine, ids, 6).wait().token_ids == generate_alone(model, ids, 6).token_ids
    assert fixed.captured == captured
    assert fixed.reason is None


def test_the_window_of_a_batch_moves_back_within_its_buffers() -> None:
    """Short sequences that follow each other walk to the right end of the buffers, while none becomes long."""
    model, graphs = decoder("llama"), Graphs()
    with running(model, graphs, least_columns=64, prefix_cache=False) as (engine, fixed):
        long, asked = submit(engine, prompt(0, 3), 50), []
        for i in range(1, 7):
            asked.append(submit(engine, prompt(i, 4), 30))
            if i > 2:
                asked[i - 3].wait()
        answers = [answer.wait().token_ids for answer in (long, *asked)]
    assert answers[0] == generate_alone(model, prompt(0, 3), 50).token_ids
    for i in range(1, 7):
        assert answers[i] == generate_alone(model, prompt(i, 4), 30).token_ids
    assert fixed.captured <= 3


def test_a_capture_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    tried = []

    def broken(run: Run) -> Run:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    model = decoder("llama")
    with caplog.at_level(logging.WARNING), running(model, broken) as (engine, fixed):
        answers = staggered(engine, LONG, PROMPTS)
    assert len(tried) == len(caplog.records) == 1
    assert "not permitted" in str(fixed.reason)
    assert_alone(model, answers, PROMPTS)


@cache
def long_text() -> list[int]:
    return generate_alone(decoder("llama"), PROMPTS[0], 280).token_ids


@pytest.mark.parametrize("where", ["capture", "buffers", "a capture's end"])
def test_memory_that_runs_out_ends_captures_for_a_while_only(
    where: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the end of a broken capture hides why it was broken."""
    graphs, failed = Graphs(), []

    def memory() -> None:
        if len(failed) < 1:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def capture(run: Run) -> Run:
        if where == "buffers":
            return graphs(run)
        try:
            memory()
        except torch.OutOfMemoryError as error:
            if where == "capture":
                raise
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture") from error
        return graphs(run)

    if where == "buffers":
        move = KeyValueLayer.move

        def no_room(this: KeyValueLayer, buffers: Sequence[torch.Tensor]) -> None:
            memory()
            move(this, buffers)

        monkeypatch.setattr(KeyValueLayer, "move", no_room)
    model = decoder("llama")
    with caplog.at_level(logging.WARNING), running(model, capture) as (engine, fixed):
        answers = staggered(engine, LONG, PROMPTS)
        assert_alone(model, answers, PROMPTS)
        assert failed
        assert graphs.replayed == []
        long = submit(engine, PROMPTS[0], 280).wait()
    assert fixed.reason is None
    assert sum(graphs.replayed) > 30
    assert long.token_ids == long_text()
    assert ["memory ran out" in record.getMessage() for record in caplog.records] == [True]


def test_a_gpu_that_computes_nothing_more_in_a_captured_step_ends_the_engine() -> None:
    def lost() -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with running(decoder("llama"), lambda run: lost) as (engine, _):
        with pytest.raises(Unavailable, match="illegal memory access"):
            submit(engine, PROMPTS[0], 20).wait()
        with pytest.raises(ModelError, match="GPU computes nothing more"):
            engine.check()


def test_the_place_of_a_sequence_that_has_left_has_position_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary embeddings that follow the largest position of a forward must not see one that is gone."""
    seen: list[torch.Tensor] = []
    model = decoder("llama")

    def note(module: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["position_ids"]
        if ids.shape == (4, 1):
            seen.append(ids.clone())

    with running(model, uncaptured) as (engine, fixed):
        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        long = submit(engine, prompt(8, 90), 12)
        others = [submit(engine, prompt(i, 5), 40) for i in range(3)]
        for answer in (long, *others):
            answer.wait()
        handle.remove()
    assert fixed.reason is None
    four = [step for step in seen if int((step > 0).sum()) == 4]
    three = [step for step in seen if int((step > 0).sum()) == 3]
    assert max(int(step.max()) for step in four) >= 90
    assert three
    assert max(int(step.max()) for step in three) < 60


def test_every_shape_is_compared_in_two_steps(caplog: pytest.LogCaptureFixture) -> None:
    """A graph that has kept the column of its capture as a number gives the right logits once."""
    graphs = Graphs()

    def frozen(run: Run) -> Run:
        replay = graphs(run)
        if len(graphs.replayed) < 3:
            return replay
        kept = replay().clone()
        return lambda: kept

    model = decoder("llama")
    with caplog.at_level(logging.WARNING), running(model, frozen) as (engine, fixed):
        answers = staggered(engine, LONG, PROMPTS)
    assert "not those of an ordinary step" in str(fixed.reason)
    assert_alone(model, answers, PROMPTS)


def test_graphs_are_captured_only_if_asked_for() -> None:
    assert not EngineOptions().cuda_graphs


def test_a_replay_with_other_logits_is_found(caplog: pytest.LogCaptureFixture) -> None:
    def stale(run: Run) -> Run:
        output = run().clone()
        return lambda: output.roll(1, -1)

    model = decoder("llama")
    with caplog.at_level(logging.WARNING), running(model, stale) as (engine, fixed):
        answers = staggered(engine, LONG, PROMPTS)
    assert "not those of an ordinary step" in str(fixed.reason)
    assert_alone(model, answers, PROMPTS)


def test_a_request_that_a_forward_refuses_fails_alone() -> None:
    model = decoder("llama")
    prompts = [prompt(i, length) for i, length in enumerate((5, 9, 12))]
    expected = [generate_alone(model, ids, 12).token_ids for ids in prompts]
    others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    guilty, poison = next(
        (i, token)
        for i in others
        for token in expected[i][3:9]
        if not any(token in [*prompts[j], *expected[j]] for j in others[i]) and token not in prompts[i]
    )

    def check(module: Any, args: Any, kwargs: Any) -> None:
        if bool((kwargs["input_ids"] == poison).any()):
            raise RuntimeError("a kernel does not like this token")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    with running(model, uncaptured) as (engine, fixed):
        answers = [submit(engine, ids, 12) for ids in prompts]
        with pytest.raises(ModelError, match="does not like"):
            answers[guilty].wait()
        for i in others[guilty]:
            assert answers[i].wait().token_ids == expected[i]
    handle.remove()
    assert fixed.reason is None


class Counts:
    """Python that must run at every forward, and how often it has."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls += 1

    def patch(self, module: Any) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return own(*args, **kwargs)

        module.forward = forward

    def parametrize(self, linear: Any) -> None:
        outer = self

        class Same(torch.nn.Module):
            def forward(self, weight: torch.Tensor) -> torch.Tensor:
                outer.calls += 1
                return weight

        torch.nn.utils.parametrize.register_parametrization(linear, "weight", Same(), unsafe=True)


ATTACHED: dict[str, tuple[Any, str]] = {
    "hook": (lambda model, heard: model.model.layers[1].register_forward_hook(heard), "module model.layers.1 has a"),
    "pre-hook": (
        lambda model, heard: model.model.layers[0].mlp.up_proj.register_forward_pre_hook(heard),
        "module model.layers.0.mlp.up_proj has a forward hook",
    ),
    "root": (lambda model, heard: model.register_forward_hook(heard), "module LlamaForCausalLM has a"),
    "patched": (lambda model, heard: heard.patch(model.model.norm), "module model.norm has a forward that"),
    "parametrized": (lambda model, heard: heard.parametrize(model.lm_head), "module lm_head has a parametrization"),
    "all": (lambda model, heard: torch.nn.modules.module.register_module_forward_hook(heard), "for all modules"),
}


@pytest.mark.parametrize("kind", ATTACHED)
def test_what_a_loader_has_attached_to_a_module_runs_at_every_step(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    attach, said = ATTACHED[kind]
    model, graphs, heard = decoder("llama"), Graphs(), Counts()
    handle = attach(model, heard)
    try:
        with caplog.at_level(logging.WARNING), running(model, graphs) as (engine, fixed):
            before = heard.calls
            submit(engine, PROMPTS[1], 12).wait()
        assert heard.calls >= before + 12
    finally:
        if handle is not None:
            handle.remove()
    assert said in str(fixed.reason)
    assert [record for record in caplog.records if said in record.getMessage()] == caplog.records[-1:]
    assert graphs.replayed == []


def test_a_hook_that_comes_later_is_heard_as_well(caplog: pytest.LogCaptureFixture) -> None:
    model, graphs, heard = decoder("llama"), Graphs(), Counts()
    with caplog.at_level(logging.WARNING), running(model, graphs) as (engine, fixed):
        submit(engine, PROMPTS[1], 12).wait()
        assert sum(graphs.replayed) > 5
        model.model.layers[0].register_forward_hook(heard)
        answer = submit(engine, PROMPTS[2], 12).wait()
    assert heard.calls == 12
    assert "module model.layers.0 has a forward hook" in str(fixed.reason)
    assert answer.token_ids == generate_alone(model, PROMPTS[2], 12).token_ids


def test_hooks_of_transformers_are_no_reason() -> None:
    model, graphs = decoder("llama"), Graphs()
    with running(model, graphs) as (engine, fixed):
        submit(engine, PROMPTS[1], 12).wait()
        model(torch.tensor([PROMPTS[1]]), output_hidden_states=True)
        submit(engine, PROMPTS[2], 12).wait()
    assert fixed.reason is None
    assert sum(graphs.replayed) > 15


def test_a_hooked_model_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = decoder("llama")
    model.model.norm.register_forward_hook(Counts())
    with caplog.at_level(logging.WARNING):
        batching_engine(model, torch_compile="default").close(5)
    assert "torch_compile='default' has no effect on this model: module model.norm has a forward hook" in caplog.text


@pytest.mark.parametrize(
    ("kind", "reason"), [("mistral", "full attention"), ("mamba", "full attention"), ("bloom", "sdpa|positions")]
)
def test_models_that_have_no_fixed_steps(kind: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = decoder(kind)
    with caplog.at_level(logging.WARNING):
        engine = batching_engine(model, torch_compile="default")
    assert [r.levelname for r in caplog.records if r.name.startswith("deployments")] == ["WARNING"]
    assert "torch_compile='default' has no effect" in caplog.text
    assert fixed_decode(Forward(model), EngineOptions(torch_compile="default")) is None
    assert submit(engine, PROMPTS[0], 5).wait().token_ids == generate_alone(model, PROMPTS[0], 5).token_ids
    engine.close(5)
    with running(model, uncaptured) as (_, fixed):
        assert fixed.reason is not None
        assert any(word in fixed.reason for word in reason.split("|"))


def test_deterministic_mode_is_not_compiled(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batching_engine(decoder("llama"), torch_compile="default", deterministic=True).close(5)
    assert "deterministic mode has its own steps" in caplog.text


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_steps_give_what_generate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama", num_hidden_layers=1)
    made: list[FixedDecode | None] = []

    def make(forward: Forward, options: EngineOptions) -> FixedDecode | None:
        made.append(fixed_decode(forward, options))
        return made[-1]

    monkeypatch.setattr(batching, "fixed_decode", make)
    engine = batching_engine(model, torch_compile="default", max_batch_size=6, prefill_chunk=32)
    answers = [submit(engine, ids, count, logprobs=0) for ids, count in zip(PROMPTS, LONG.tokens, strict=True)]
    for answer in answers:
        answer.wait(600)
    engine.close(5)
    (fixed,) = made
    assert fixed is not None
    assert fixed.reason is None
    assert fixed.captured >= 3
    assert_alone(model, answers, PROMPTS)
