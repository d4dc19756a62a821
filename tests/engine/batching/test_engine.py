"""The batching engine under requests that come and go, and under requests that break things."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deployments.core.errors import BadRequest, ContextOverflow, ModelError, OutOfMemory, TroupeError, Unavailable
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.batching.step_loop import StepLoop
from tests.engine.architectures import decoder
from tests.engine.running import Answer, batching_engine, generate_alone, prompt, running, submit
from tests.engine.stepped import Stepped
from tests.forms import some

PROMPTS = [prompt(i, length) for i, length in enumerate((5, 30, 12, 60, 3, 20))]
TOKENS = 12


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("llama")


@contextmanager
def before_forward(model: Any, check: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Call `check(input_ids)` before every forward."""
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: check(kwargs["input_ids"]), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def settled(engine: BatchingEngine, what: Callable[[], bool], timeout: float = 5.0) -> bool:
    """Whether something becomes true soon."""
    deadline = time.monotonic() + timeout
    while not what() and time.monotonic() < deadline:
        time.sleep(0.002)
    return what()


def assert_alone(model: Any, answers: list[Answer], prompts: list[list[int]] = PROMPTS) -> None:
    for answer, ids in zip(answers, prompts, strict=True):
        assert answer.wait().token_ids == generate_alone(model, ids, TOKENS).token_ids


def test_bad_requests_are_refused_at_once(llama: Any) -> None:
    with running(llama, memory_gib=0.001, max_model_len=4096) as engine:
        with pytest.raises(BadRequest, match="Token id 160 does not exist"):
            submit(engine, [3, 160], 4)
        with pytest.raises(BadRequest, match="empty"):
            submit(engine, [], 4)
        with pytest.raises(ContextOverflow):
            submit(engine, prompt(0, 4000), 100)
        with pytest.raises(BadRequest, match=r"may need .* GiB of cache"):
            submit(engine, prompt(0, 3000), 4)
        first = submit(engine, prompt(0, 4), 100, name="same")
        with pytest.raises(BadRequest, match="already running"):
            submit(engine, prompt(0, 4), 4, name="same")
        first.wait()
        submit(engine, prompt(0, 4), 4, name="same").wait()


def test_a_context_that_the_budget_does_not_hold_is_cut(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A request without max_tokens may use all of `max_model_len`, so that must fit."""
    with running(llama, memory_gib=0.001, max_model_len=4096) as engine:
        held = engine.max_model_len
        assert 500 < held < 4096
        assert f"0.001 GiB for caches hold {held} tokens" in caplog.text
        submit(engine, prompt(0, held - 5), 5).wait()
        with pytest.raises(BadRequest, match="may need"):
            submit(engine, prompt(0, held - 5), 300)
    with running(llama, max_model_len=4096) as engine:
        assert engine.max_model_len == 4096


@some("kind", ("llama", "mamba2", "falcon_h1"), ("llama", "mamba2"))
@pytest.mark.parametrize("place", ["prompt", "text"])
def test_a_forward_that_raises_fails_the_guilty_request_alone(kind: str, place: str) -> None:
    model = decoder(kind)
    expected = [generate_alone(model, ids, TOKENS).token_ids for ids in PROMPTS]
    if place == "prompt":
        guilty = 2
        poison = next(token for token in range(150, 160) if not any(token in tokens for tokens in expected))
        prompts = [*PROMPTS[:2], [*PROMPTS[2], poison], *PROMPTS[3:]]
    else:
        prompts = PROMPTS
        guilty, poison = next(
            (i, token)
            for i, tokens in enumerate(expected)
            for token in tokens[2:6]
            if not any(
                token in [*ids, *others]
                for j, (ids, others) in enumerate(zip(PROMPTS, expected, strict=True))
                if j != i
            )
            and token not in PROMPTS[i]
        )

    def check(ids: torch.Tensor) -> None:
        if bool((ids == poison).any()):
            raise RuntimeError("a kernel does not like this token")

    with running(model) as engine, before_forward(model, check):
        answers = [submit(engine, ids, TOKENS) for ids in prompts]
        for i, answer in enumerate(answers):
            if i == guilty:
                with pytest.raises(ModelError, match="does not like this token"):
                    answer.wait()
                assert answer.token_ids == expected[i][: len(answer.token_ids)]
            else:
                assert answer.wait().token_ids == expected[i]
        other = guilty - 1
        assert submit(engine, PROMPTS[other], TOKENS).wait().token_ids == expected[other]


def test_logits_that_are_not_finite_fail_their_sequence_alone(llama: Any) -> None:
    poison = 157

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == poison)[..., None], torch.nan, output)

    with running(llama) as engine:
        handle = llama.get_input_embeddings().register_forward_hook(spoil)
        try:
            answers = [submit(engine, ids, TOKENS) for ids in PROMPTS]
            spoiled = submit(engine, [*prompt(9, 4), poison], TOKENS)
            with pytest.raises(ModelError, match="not finite"):
                spoiled.wait()
            assert_alone(llama, answers)
            assert_alone(llama, [submit(engine, ids, TOKENS) for ids in PROMPTS])
        finally:
            handle.remove()


@pytest.mark.parametrize("kind", ["llama", "mamba2"])
def test_out_of_memory_shrinks_the_batch_and_goes_on(kind: str) -> None:
    model = decoder(kind)

    def check(ids: torch.Tensor) -> None:
        if ids.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with running(model) as engine, before_forward(model, check):
        assert_alone(model, [submit(engine, ids, TOKENS) for ids in PROMPTS])
    stepped = Stepped(model)
    with before_forward(model, check):
        for i, ids in enumerate(PROMPTS):
            stepped.add(str(i), ids, TOKENS)
        stepped.run()
        # Fewer sequences for a while, then all again.
        assert stepped.loop.scheduler.max_batch_size <= 4
        stepped.add("long", PROMPTS[0], 200)
        stepped.run()
        assert 4 < stepped.loop.scheduler.max_batch_size <= 16


def test_out_of_memory_of_one_that_cannot_run_even_alone(llama: Any) -> None:
    def check(ids: torch.Tensor) -> None:
        if bool((ids == 157).any()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with running(llama) as engine, before_forward(llama, check):
        answers = [submit(engine, ids, TOKENS) for ids in PROMPTS]
        greedy = submit(engine, [157, *prompt(9, 40)], TOKENS)
        with pytest.raises(OutOfMemory, match="even alone"):
            greedy.wait()
        assert_alone(llama, answers)


def test_a_client_that_raises_disturbs_nobody(llama: Any) -> None:
    def refuse(answer: Answer) -> None:
        raise RuntimeError("the client has gone")

    with running(llama) as engine:
        submit(engine, PROMPTS[0], TOKENS, on_delta=refuse)
        assert_alone(llama, [submit(engine, ids, TOKENS) for ids in PROMPTS])
        engine.check()


def test_cancel_frees_the_sequence(llama: Any) -> None:
    with running(llama, prefix_cache=False) as engine:
        answers = [submit(engine, ids, 400, name=str(i)) for i, ids in enumerate(PROMPTS)]
        assert settled(engine, lambda: engine.stats().sequences == len(PROMPTS))
        for answer in answers:
            engine.cancel(answer.request_id)
        engine.cancel("unknown")
        assert settled(engine, lambda: engine.stats().sequences == 0)
        assert engine.stats().cache_bytes == 0
        seen = [len(answer.deltas) for answer in answers]
        assert_alone(llama, [submit(engine, PROMPTS[0], TOKENS, name="0")], PROMPTS[:1])
        assert seen == [len(answer.deltas) for answer in answers]


def test_cancel_waits_for_one_step_at_most(llama: Any) -> None:
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)

    def check(ids: torch.Tensor) -> None:
        begun.release()
        assert go_on.acquire(timeout=20)

    with running(llama) as engine, before_forward(llama, check):
        dropped = submit(engine, PROMPTS[0], 400, name="dropped")
        kept = submit(engine, PROMPTS[1], 400, name="kept")
        while engine.stats().sequences < 2 or not (dropped.deltas and kept.deltas):
            go_on.release()
            assert begun.acquire(timeout=20)
        engine.cancel("dropped")
        steps, seen = engine.stats().steps, len(dropped.deltas)
        while engine.stats().sequences == 2:
            go_on.release()
            assert begun.acquire(timeout=20)
        assert engine.stats().steps <= steps + 2, "the step that ran, and the first without the row"
        assert len(dropped.deltas) <= seen + 1
        go_on.release(1000)
        engine.cancel("kept")


def test_cancel_of_a_waiting_request_and_of_one_being_prefilled(llama: Any) -> None:
    with running(llama, max_batch_size=1, prefill_chunk=4) as engine:
        long = submit(engine, prompt(1, 400), TOKENS, name="long")
        waiting = submit(engine, prompt(2, 10), TOKENS, name="waiting")
        assert settled(engine, lambda: engine.stats().sequences == 1)
        engine.cancel("waiting")
        engine.cancel("long")
        assert settled(engine, lambda: engine.stats().sequences == engine.stats().waiting == 0)
        assert long.deltas == waiting.deltas == []


def test_running_sequences_go_on_while_a_long_prompt_is_prefilled(llama: Any) -> None:
    with running(llama, prefill_chunk=16) as engine:
        runner = submit(engine, PROMPTS[0], 300)
        assert settled(engine, lambda: len(runner.deltas) > 2)
        before = len(runner.deltas)
        during: list[int] = []
        long = submit(engine, prompt(1, 320), 1, on_delta=lambda answer: during.append(len(runner.deltas) - before))
        long.wait()
        assert during[0] >= 320 // 16 - 2


def test_short_prompts_pass_a_long_one(llama: Any) -> None:
    order: list[str] = []
    with running(llama, prefill_chunk=8, prefix_cache=False) as engine:
        answers = [submit(engine, prompt(1, 400), 1, name="long", on_delta=lambda a: order.append("long"))]
        answers += [
            submit(engine, ids, 1, on_delta=lambda a: order.append("short")) for ids in (PROMPTS[0], PROMPTS[4])
        ]
        for answer in answers:
            answer.wait()
    assert order == ["short", "short", "long"]


def test_memory_is_bounded_and_requests_wait_for_it(llama: Any) -> None:
    prompts = [prompt(i, 30 + 7 * i) for i in range(12)]
    with running(llama, max_batch_size=12, memory_gib=0.0006) as engine:
        peak = 0
        budget = engine.stats().budget_bytes

        def watch(answer: Answer) -> None:
            nonlocal peak
            stats = engine.stats()
            peak = max(peak, stats.cache_bytes + stats.prefix_bytes)

        answers = [submit(engine, ids, TOKENS, on_delta=watch) for ids in prompts]
        assert_alone(llama, answers, prompts)
        assert 0 < peak <= budget
        assert engine.stats().prefix_bytes <= budget // 2


def test_close_lets_running_requests_end_and_fails_the_rest(llama: Any) -> None:
    others = set(threading.enumerate())
    engine = batching_engine(llama, max_batch_size=2)
    answers = [submit(engine, ids, 100) for ids in PROMPTS]
    assert settled(engine, lambda: engine.stats().sequences == 2)
    engine.close(20)
    ended = [answer for answer in answers if answer.error is None]
    assert len(ended) == 2
    assert all(answer.done.is_set() and len(answer.token_ids) == 100 for answer in ended)
    assert all(isinstance(answer.error, Unavailable) for answer in answers if answer not in ended)
    with pytest.raises(Unavailable):
        submit(engine, PROMPTS[0], 4)
    assert not any(t.name == "batching-engine" and t.is_alive() for t in set(threading.enumerate()) - others)
    engine.close()


def test_close_does_not_wait_for_ever(llama: Any) -> None:
    def slow(ids: torch.Tensor) -> None:
        time.sleep(0.05)

    engine = batching_engine(llama)
    with before_forward(llama, slow):
        answer = submit(engine, PROMPTS[0], 400)
        assert settled(engine, lambda: len(answer.deltas) > 1)
        began = time.monotonic()
        engine.close(0.2)
    assert time.monotonic() - began < 2
    assert isinstance(answer.error, Unavailable)


def test_prompt_scores(llama: Any) -> None:
    with running(llama, prefill_chunk=16) as engine:
        answers = [submit(engine, ids, tokens, prompt_logprobs=2) for ids in PROMPTS for tokens in (0, 3)]
        for answer, ids in zip(answers, [ids for ids in PROMPTS for _ in (0, 3)], strict=True):
            scores = answer.wait().scores
            assert scores is not None
            with torch.inference_mode():
                logprobs = llama(torch.tensor([ids])).logits[0].log_softmax(-1)
            expected = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]
            assert scores.scores[0] is None
            assert [score.logprob for score in scores.scores[1:] if score] == pytest.approx(expected, abs=1e-4)
            assert [score.top[0].logprob for score in scores.scores[1:] if score] == pytest.approx(
                logprobs[:-1].amax(-1).tolist(), abs=1e-4
            )
        assert [len(answer.token_ids) for answer in answers] == [0, 3] * len(PROMPTS)
        assert answers[0].deltas[-1].finish_reason == "length"


def test_seeds_do_not_depend_on_neighbors(llama: Any) -> None:
    sampling = {"temperature": 1.0, "seed": 7, "top_p": 0.9}
    with running(llama) as engine:
        alone = submit(engine, PROMPTS[1], TOKENS, **sampling).wait().token_ids
        crowd = [submit(engine, ids, 40, temperature=0.7) for ids in PROMPTS]
        together = submit(engine, PROMPTS[1], TOKENS, **sampling).wait().token_ids
        for answer in crowd:
            answer.wait()
        others = [submit(engine, PROMPTS[1], TOKENS, **{**sampling, "seed": None}) for _ in range(4)]
        assert together == alone
        assert len({tuple(answer.wait().token_ids) for answer in others}) > 1


def test_a_step_that_fails_by_our_own_fault_ends_its_requests_and_no_others(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(llama) as engine:
        original = StepLoop.step

        def fails_once(loop: StepLoop) -> None:
            monkeypatch.setattr(StepLoop, "step", original)
            raise AssertionError("a bug")

        monkeypatch.setattr(StepLoop, "step", fails_once)
        with pytest.raises(TroupeError, match="a bug"):
            submit(engine, PROMPTS[0], 4).wait()
        assert_alone(llama, [submit(engine, ids, TOKENS) for ids in PROMPTS])


def test_threads_are_no_more_than_the_cores_it_was_given(llama: Any) -> None:
    """A container or batch system gives a part of a machine, of which torch counts all cores."""
    used: list[int] = []
    before, given = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        for cores, options, expected in (({min(before)}, {}, 1), (before, {"threads": 2}, 2)):
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(3)
            with (
                before_forward(llama, lambda _: used.append(torch.get_num_threads())),
                running(llama, **options) as engine,
            ):
                assert used, "the model is probed at load"
                submit(engine, PROMPTS[0], 2).wait()
            assert set(used) == {expected}
            used.clear()
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(given)
