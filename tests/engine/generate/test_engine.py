from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import Grammar, SamplingParams
from deployments.core.errors import (
    BadRequest,
    ContextOverflow,
    ModelError,
    ModelLoadFailed,
    OutOfMemory,
    TroupeError,
    Unavailable,
    UnsupportedParameter,
)
from deployments.core.events import EngineEvent
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.generate.engine import GenerateEngine
from model_loaders.contract import ModelInfo
from tests.engine.running import ask, generate_engine, greedy, start
from tests.tiny import bart, byte_tokenizer, gpt2, llama, mamba, t5

TOKENIZER = byte_tokenizer()
LLAMA = llama()
SMALL: dict[str, Any] = {"vocab_size": 261, "eos_token_id": 257, "bos_token_id": 256, "pad_token_id": 258}


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


def build(model: Any = LLAMA, options: EngineOptions | None = None, **kwargs: Any) -> GenerateEngine:
    info = ModelInfo(**{"model": model, "tokenizer": TOKENIZER, **kwargs})
    return generate_engine(info, options)


@pytest.fixture(scope="module")
def engine() -> Iterator[GenerateEngine]:
    engine = build()
    yield engine
    engine.close()


def loud_t5() -> Any:
    model = t5(seed=3)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def unmasked(model: Any, input_ids: Any, **kw: Any) -> Any:
    return super(type(model), model).prepare_inputs_for_generation(input_ids, **kw)


PROMPTS = [ids(text) for text in ("h", "hello there", "one two three four five six seven eight", "xyz", "ab" * 30)]


class TestFaithful:
    @pytest.mark.parametrize("make", [llama, gpt2, mamba, loud_t5, bart])
    def test_greedy_text_is_that_of_generate_alone_and_together(self, make: Any) -> None:
        model = make()
        expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
        engine = build(model)
        assert [ask(engine, p, max_tokens=12, ignore_eos=True).token_ids for p in PROMPTS] == expected
        sizes: list[int] = []
        head = model.get_output_embeddings()
        head.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
        together = [start(engine, p, max_tokens=12, ignore_eos=True) for p in PROMPTS]
        assert [run.wait().token_ids for run in together] == expected
        assert max(sizes) > 1
        engine.close()

    def test_jobs_of_different_lengths_regroup_and_stay_equal(self) -> None:
        counts = [3, 40, 4, 35, 5, 6, 30, 2, 25]
        prompts = [ids(f"prompt number {i} " * (i % 3 + 1)) for i in range(len(counts))]
        expected = [greedy(LLAMA, p, n) for p, n in zip(prompts, counts, strict=True)]
        engine = build(options=EngineOptions(max_batch_size=4))
        runs = [start(engine, p, max_tokens=n, ignore_eos=True) for p, n in zip(prompts, counts, strict=True)]
        assert [run.wait().token_ids for run in runs] == expected
        # In turns of four, without regrouping, the steps would be those of the longest of each turn.
        assert engine.stats().steps < sum(counts)
        engine.close()

    @pytest.mark.parametrize("options", [EngineOptions(deterministic=True), EngineOptions(static_cache=True)])
    def test_options_change_no_text(self, options: EngineOptions) -> None:
        expected = [greedy(LLAMA, p, 10) for p in PROMPTS]
        engine = build(options=options)
        runs = [start(engine, p, max_tokens=10, ignore_eos=True) for p in PROMPTS]
        assert [run.wait().token_ids for run in runs] == expected
        engine.close()

    def test_deterministic_requests_never_run_together(self) -> None:
        engine = build(options=EngineOptions(deterministic=True))
        runs = [start(engine, PROMPTS[1], max_tokens=20, ignore_eos=True) for _ in range(4)]
        runs[0].next()
        assert engine.stats().sequences <= 1
        for run in runs:
            run.wait()
        assert engine.stats().steps == 4 * 19
        engine.close()

    def test_the_checkpoints_sampling_settings_change_nothing(self) -> None:
        model = llama()
        plain = greedy(model, PROMPTS[1], 20)
        model.generation_config.update(
            do_sample=True, temperature=0.3, top_k=2, repetition_penalty=1.8, no_repeat_ngram_size=2, max_length=10
        )
        engine = build(model)
        assert ask(engine, PROMPTS[1], max_tokens=20, ignore_eos=True).token_ids == plain
        engine.close()
        assert model.generation_config.repetition_penalty == 1.8

    def test_suppressed_tokens_of_the_checkpoint_count(self) -> None:
        model = llama()
        first = greedy(model, PROMPTS[1], 1)[0]
        model.generation_config.suppress_tokens = [first]
        engine = build(model)
        assert first not in ask(engine, PROMPTS[1], max_tokens=20, ignore_eos=True).token_ids
        engine.close()

    def test_so_do_bad_words_of_one_token(self) -> None:
        """Those of Marian's translators are the pad token, whose logit is 0, above that of every word."""
        model = llama()
        first = greedy(model, PROMPTS[1], 1)[0]
        model.generation_config.bad_words_ids = [[first], [257], [5, 6]]
        expected = greedy(model, PROMPTS[1], 20)
        model.generation_config.suppress_tokens = [-1, 261]
        engine = build(model)
        assert ask(engine, PROMPTS[1], max_tokens=20, ignore_eos=True).token_ids == expected
        engine.close()

    def test_a_model_that_names_no_mask_gets_none(self) -> None:
        """transformers' `generate` refuses what a model's code does not name."""
        model = llama()
        expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
        model.__class__ = type("Unmasked", (type(model),), {"prepare_inputs_for_generation": unmasked})
        engine = build(model)
        together = [start(engine, p, max_tokens=12, ignore_eos=True) for p in PROMPTS]
        assert [run.wait().token_ids for run in together] == expected
        engine.close()

    def test_logprobs_are_those_of_a_plain_forward(self, engine: GenerateEngine) -> None:
        run = ask(engine, PROMPTS[1], max_tokens=8, logprobs=3, ignore_eos=True)
        whole = torch.tensor([[*PROMPTS[1], *run.token_ids]])
        with torch.inference_mode():
            expected = LLAMA(whole).logits[0].log_softmax(-1)[len(PROMPTS[1]) - 1 : -1]
        for entry, row, token_id in zip(run.entries, expected, run.token_ids, strict=True):
            assert entry.token_id == token_id
            assert entry.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
            assert [c.token_id for c in entry.top] == row.topk(3).indices.tolist()

    @pytest.mark.parametrize("floats", [None, 261 * 4])
    def test_prompt_logprobs_are_those_of_a_plain_forward(
        self, engine: GenerateEngine, floats: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if floats is not None:
            monkeypatch.setattr("deployments.engine.generate.model_generate._SCORED_FLOATS", floats)
        run = ask(engine, PROMPTS[2], max_tokens=2, prompt_logprobs=2)
        with torch.inference_mode():
            expected = LLAMA(torch.tensor([PROMPTS[2]])).logits[0].log_softmax(-1)
        assert run.scores is not None
        assert run.scores.scores[0] is None
        for position, entry in list(enumerate(run.scores.scores))[1:]:
            assert entry is not None
            assert entry.token_id == PROMPTS[2][position]
            assert entry.logprob == pytest.approx(expected[position - 1, PROMPTS[2][position]].item(), abs=1e-4)
            assert [c.token_id for c in entry.top] == expected[position - 1].topk(2).indices.tolist()


class TestRequests:
    def test_seeds_give_the_same_text_whatever_the_neighbors(self, engine: GenerateEngine) -> None:
        alone = ask(engine, PROMPTS[1], seed=5, temperature=1.0, max_tokens=20).token_ids
        crowd = [start(engine, p, temperature=1.0, max_tokens=20) for p in PROMPTS]
        again = start(engine, PROMPTS[1], seed=5, temperature=1.0, max_tokens=20)
        assert again.wait().token_ids == alone
        assert ask(engine, PROMPTS[1], seed=6, temperature=1.0, max_tokens=20).token_ids != alone
        for run in crowd:
            run.wait()

    def test_streams_token_by_token(self, engine: GenerateEngine) -> None:
        run = ask(engine, PROMPTS[1], max_tokens=10, logprobs=0, ignore_eos=True)
        assert [len(delta.token_ids) for delta in run.deltas] == [1] * 10

    def test_stop_strings_and_reasons(self, engine: GenerateEngine) -> None:
        text = ask(engine, PROMPTS[1], max_tokens=20, ignore_eos=True).text
        stop = text[6:8]
        run = ask(engine, PROMPTS[1], max_tokens=20, ignore_eos=True, stop=(stop,))
        assert run.text == text[: text.index(stop)]
        assert (run.finish_reason, run.deltas[-1].stop_reason) == ("stop", stop)
        assert ask(engine, PROMPTS[1], max_tokens=3, ignore_eos=True).finish_reason == "length"

    def test_without_max_tokens_the_context_is_the_limit(self) -> None:
        engine = build(max_model_len=len(PROMPTS[1]) + 7)
        run = ask(engine, PROMPTS[1], max_tokens=None, ignore_eos=True)
        assert (len(run.token_ids), run.finish_reason) == (7, "length")
        engine.close()

    def test_grammars(self, engine: GenerateEngine) -> None:
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        grammar = Grammar(kind="json_schema", source=json.dumps(schema))
        runs = [start(engine, p, grammar=grammar, max_tokens=30, temperature=1.0) for p in PROMPTS]
        assert all(isinstance(json.loads(run.wait().text)["a"], int) for run in runs)

    def test_a_bad_grammar_fails_its_request_alone(self, engine: GenerateEngine) -> None:
        with pytest.raises(BadRequest):
            ask(engine, PROMPTS[0], grammar=Grammar(kind="regex", source="(a"))
        assert ask(engine, PROMPTS[0]).token_ids

    def test_beam_search_is_that_of_generate(self, engine: GenerateEngine) -> None:
        for model in (LLAMA, loud_t5()):
            own = engine if model is LLAMA else build(model)
            prompt = torch.tensor([PROMPTS[1]])
            found = model.generate(
                prompt, num_beams=4, max_new_tokens=10, do_sample=False, attention_mask=torch.ones_like(prompt)
            )
            expected = found[0, 1 if model is not LLAMA else len(PROMPTS[1]) :].tolist()
            run = ask(own, PROMPTS[1], num_beams=4, max_tokens=10)
            assert run.token_ids == [t for t in expected if t != 258][: len(run.token_ids)]
            assert len(run.token_ids) == len([t for t in expected if t != 258])
            if own is not engine:
                own.close()

    @pytest.mark.parametrize(
        ("kwargs", "param"),
        [
            ({"num_beams": 4, "top_p": 0.5}, "top_p"),
            ({"num_beams": 4, "logprobs": 1}, "logprobs"),
            ({"num_beams": 4, "temperature": 0.5}, "temperature"),
            ({"num_beams": 0}, "num_beams"),
        ],
    )
    def test_beams_refuse_what_they_cannot_honor(
        self, engine: GenerateEngine, kwargs: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(BadRequest) as caught:
            start(engine, PROMPTS[0], **kwargs)
        assert caught.value.param == param

    def test_refusals_at_submit(self, engine: GenerateEngine) -> None:
        for prompt in ([], [5, 261], [-1]):
            with pytest.raises(BadRequest):
                start(engine, prompt)
        with pytest.raises(ContextOverflow):
            start(engine, PROMPTS[1], max_tokens=600)
        encoder_decoder = build(loud_t5())
        with pytest.raises(UnsupportedParameter, match="prompt_logprobs"):
            start(encoder_decoder, PROMPTS[1], prompt_logprobs=1)
        encoder_decoder.close()

    def test_a_model_without_generate_is_refused_at_load(self) -> None:
        with pytest.raises(ModelLoadFailed, match="generate hook"):
            build(torch.nn.Linear(2, 2))


MARK = 259


def sick(model: Any, how: str) -> None:
    """Prompts with a marked token make the model's forward fail in a chosen way."""

    def spoil(module: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        marked = (kwargs["input_ids"] == MARK).any(-1)
        if marked.any() and how == "nan":
            out.logits[marked] = float("nan")
        elif marked.any() and how == "raise":
            raise RuntimeError("the forward is broken")
        elif marked.any():
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_hook(spoil, with_kwargs=True)


class TestItNeverDies:
    @pytest.mark.parametrize(("how", "error"), [("nan", ModelError), ("raise", ModelError), ("oom", OutOfMemory)])
    def test_a_poisoned_request_fails_alone(self, how: str, error: type[TroupeError]) -> None:
        model = llama()
        expected = [greedy(model, p, 8) for p in PROMPTS]
        assert not any(MARK in tokens for tokens in expected)
        engine = build(model)
        sick(model, how)
        runs = [start(engine, p, max_tokens=8, ignore_eos=True) for p in PROMPTS]
        poisoned = [start(engine, [*PROMPTS[1], MARK, 5], max_tokens=8) for _ in range(2)]
        runs += [start(engine, p, max_tokens=8, ignore_eos=True) for p in PROMPTS]
        assert [run.wait().token_ids for run in runs] == expected * 2
        for run in poisoned:
            assert isinstance(run.end().error, error)
        engine.check()
        engine.close()

    def test_a_gpu_that_computes_nothing_more_ends_the_engine(self) -> None:
        model = llama()
        engine = build(model)

        def broken(*args: Any) -> None:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        model.register_forward_pre_hook(broken)
        for run in [start(engine, p, max_tokens=8) for p in PROMPTS]:
            assert isinstance(run.end().error, Unavailable)
        with pytest.raises(ModelError, match="illegal memory access"):
            engine.check()
        engine.close()

    @pytest.mark.parametrize("kind", [RuntimeError, BaseException], ids=["error", "panic of a tokenizer in Rust"])
    def test_a_decode_hook_that_raises_fails_its_request_alone(self, kind: type[BaseException]) -> None:
        def decode(ids: torch.Tensor) -> str:
            if 24 in ids.tolist():
                raise kind("cannot decode 24")
            return "".join(f"<{i}>" for i in ids.tolist())

        engine = build(tokenizer=None, encode=lambda text: [[1]], decode=decode)
        prompts = [list(b"goodbye"), *PROMPTS]
        expected = [greedy(LLAMA, p, 12) for p in prompts]
        runs = [start(engine, p, max_tokens=12, ignore_eos=True).end() for p in prompts]
        for run, tokens in zip(runs, expected, strict=True):
            if 24 in tokens:
                assert isinstance(run.error, ModelError)
            else:
                assert run.token_ids == tokens
        assert isinstance(runs[0].error, ModelError)
        assert any(run.error is None for run in runs)
        engine.close()

    def test_a_request_can_be_cancelled_by_its_own_event(self) -> None:
        engine = build()
        seen: list[EngineEvent] = []

        def emit(event: EngineEvent) -> None:
            seen.append(event)
            engine.cancel("own")

        sampling = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.0, logprobs=0)
        engine.submit(EngineRequest(request_id="own", input_ids=PROMPTS[1], sampling=sampling), emit)
        assert ask(engine, PROMPTS[0], max_tokens=2).token_ids
        assert len(seen) == 1
        engine.close()

    def test_cancel_is_silent_and_lets_others_go_on(self, engine: GenerateEngine) -> None:
        victim = start(engine, PROMPTS[1], max_tokens=400, ignore_eos=True)
        victim.next()
        engine.cancel(victim.request_id)
        time.sleep(0.05)
        seen = victim.events.qsize()
        assert ask(engine, PROMPTS[0], max_tokens=4).token_ids
        assert victim.events.qsize() == seen
        engine.cancel("nobody")

    def test_cancelling_while_waiting(self) -> None:
        engine = build(options=EngineOptions(max_batch_size=1))
        running = start(engine, PROMPTS[1], max_tokens=60, ignore_eos=True)
        running.next()
        waiting = start(engine, PROMPTS[1], max_tokens=60, ignore_eos=True)
        engine.cancel(waiting.request_id)
        assert engine.stats().waiting == 0
        running.wait()
        assert waiting.events.empty()
        engine.close()

    def test_an_id_in_flight_is_refused(self, engine: GenerateEngine) -> None:
        run = start(engine, PROMPTS[1], max_tokens=100, ignore_eos=True)
        twin = EngineRequest(request_id=run.request_id, input_ids=[5], sampling=SamplingParams(max_tokens=1))
        with pytest.raises(BadRequest, match="already"):
            engine.submit(twin, run.events.put)
        run.wait()

    def test_close_lets_what_runs_end_and_fails_what_waits(self) -> None:
        engine = build(options=EngineOptions(max_batch_size=1))
        runs = [start(engine, PROMPTS[1], max_tokens=50, ignore_eos=True) for _ in range(3)]
        runs[0].next()
        engine.close()
        assert runs[0].wait().finish_reason == "length"
        assert all(isinstance(run.end().error, Unavailable) for run in runs[1:])
        with pytest.raises(Unavailable):
            start(engine, PROMPTS[0])

    def test_close_does_not_wait_for_ever(self) -> None:
        before = set(threading.enumerate())
        engine = build()
        run = start(engine, PROMPTS[1], max_tokens=450, ignore_eos=True)
        run.next()
        begun = time.monotonic()
        engine.close(timeout=0.05)
        assert time.monotonic() - begun < 3
        assert isinstance(run.end().error, Unavailable)
        assert not [each for each in set(threading.enumerate()) - before if each.name == "generate-engine"]

    def test_counters(self) -> None:
        engine = build()
        runs = [start(engine, PROMPTS[1], max_tokens=5, ignore_eos=True) for _ in range(4)]
        for run in runs:
            run.wait()
        stats = engine.stats()
        assert (stats.kind, stats.generated_tokens, stats.prompt_tokens) == ("generate", 20, 4 * len(PROMPTS[1]))
        engine.close()
        assert (engine.stats().sequences, engine.stats().waiting) == (0, 0)
