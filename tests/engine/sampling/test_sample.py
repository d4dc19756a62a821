from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ModelError
from deployments.core.events import FinishReason
from deployments.engine.sampling.sample import Sampled, sample_batch
from deployments.engine.sampling.state import FormatRules, SequenceSampler

CPU = torch.device("cpu")
VOCAB = 1200
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]),
        "top_p": st.sampled_from([0.1, 0.9, 1.0]),
        "top_k": st.sampled_from([0, 1, 20, 280]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "typical_p": st.sampled_from([0.8, 1.0]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 1.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.5]),
        "logit_bias": st.dictionaries(st.integers(0, 299), st.floats(-50, 50), max_size=3),
        "allowed_token_ids": st.just(tuple(range(0, 300, 3))),
        "min_tokens": st.integers(0, 3),
        "logprobs": st.integers(0, 5),
        "processed_logprobs": st.booleans(),
    },
)
PROMPT = [3, 4, 5, 3]


def row(
    prompt: list[int] | None = None, vocab: int = VOCAB, eos: tuple[int, ...] = (2,), **kwargs: Any
) -> SequenceSampler:
    own = {key: kwargs.pop(key) for key in ("processors", "mask", "rules", "bad_words") if key in kwargs}
    params = SamplingParams(**kwargs)
    return SequenceSampler(
        params,
        PROMPT if prompt is None else prompt,
        eos_ids=frozenset(eos),
        vocab_size=vocab,
        device=CPU,
        **own,
    )


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def tokens(sampled: list[Sampled]) -> list[int]:
    assert all(s.error is None for s in sampled), sampled
    return [s.token_id for s in sampled]


def generate(one: SequenceSampler, steps: int, vocab: int = VOCAB) -> list[int]:
    return [tokens(sample_batch(logits(seed=step, vocab=vocab), [one]))[0] for step in range(steps)]


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_takes_the_first_of_the_likeliest(self, dtype: torch.dtype) -> None:
        scores = logits(8).to(dtype)
        scores[3, [10, 20]] = 30.0
        found = tokens(sample_batch(scores, [row(temperature=0) for _ in range(8)]))
        assert found == scores.float().argmax(-1).tolist()

    def test_ignores_truncations_and_seed(self) -> None:
        one = row(temperature=0, top_k=3, top_p=0.1, seed=5)
        assert generate(one, 5) == [logits(seed=s)[0].argmax().item() for s in range(5)]


class TestSeeds:
    SETTINGS = (
        {},
        {"temperature": 0.5},
        {"top_k": 20},
        {"top_p": 0.8},
        {"top_p": 0.999, "temperature": 2.0},
        {"min_p": 0.05},
        {"typical_p": 0.9},
        {"repetition_penalty": 1.3},
        {"frequency_penalty": 0.5, "presence_penalty": 0.1},
    )

    def test_the_same_seed_gives_the_same_tokens_whatever_the_neighbors(self) -> None:
        alone = [generate(row(seed=7, **setting), 12) for setting in self.SETTINGS]
        rows = [row(seed=7, **setting) for setting in self.SETTINGS]
        crowd = [row(temperature=0), row(), row(top_p=0.5), row(logprobs=3)]
        together: list[list[int]] = [[] for _ in rows]
        for step in range(12):
            members = [crowd[0], *rows[:4], crowd[1], *rows[4:], *crowd[2:]]
            scores = logits(seed=step).repeat(len(members), 1)
            got = dict(zip(map(id, members), tokens(sample_batch(scores, members)), strict=True))
            for i, one in enumerate(rows):
                together[i].append(got[id(one)])
        assert together == alone

    def test_a_seed_gives_the_same_tokens_for_ever(self) -> None:
        """Of flat distributions, which are cut beyond the first candidates. The numbers were drawn row by row."""
        cuts: list[dict[str, Any]] = [
            {"top_p": 0.95},
            {"typical_p": 0.9},
            {"top_p": 0.8, "typical_p": 0.7, "min_p": 0.01},
            {"top_k": 900, "top_p": 0.9},
            {},
        ]
        rows = [row(temperature=0.9, seed=i, vocab=5000, **cut) for i, cut in enumerate(cuts * 2)]
        place = torch.arange(5000, dtype=torch.float64)
        drawn = []
        for step in range(2):
            waves = [torch.sin(place * (i + 1.7) + step) * (1 + i / 3) for i in range(len(rows))]
            drawn.append(tokens(sample_batch(torch.stack(waves).float(), rows)))
        assert drawn == [
            [4115, 608, 4696, 4694, 278, 2583, 3638, 3617, 2608, 1393],
            [1701, 3607, 1216, 178, 1269, 3693, 1561, 1971, 2365, 3851],
        ]

    def test_other_seeds_give_other_tokens(self) -> None:
        assert generate(row(seed=1), 12) != generate(row(seed=2), 12)

    def test_without_a_seed_every_sequence_differs(self) -> None:
        assert generate(row(), 12) != generate(row(), 12)


def test_frequencies_follow_the_softmax() -> None:
    scores = logits(vocab=6, spread=1.0)
    one = row(vocab=6, seed=0, temperature=0.7)
    drawn = Counter(tokens(sample_batch(scores, [one]))[0] for _ in range(4000))
    expected = (scores[0] / 0.7).softmax(-1)
    for token_id, p in enumerate(expected.tolist()):
        assert abs(drawn[token_id] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000) + 1e-3


class TestPenalties:
    def test_repetition_is_transformers_over_prompt_and_text(self) -> None:
        one = row(temperature=0, repetition_penalty=1.7, logprobs=5, processed_logprobs=True)
        seen = list(PROMPT)
        for step in range(10):
            scores = logits(seed=step % 3)
            expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), scores.clone())
            sampled = sample_batch(scores, [one])[0]
            assert sampled.score is not None
            assert sampled.token_id == expected.argmax().item()
            top = expected.log_softmax(-1).topk(5)
            assert sampled.score.top_ids == tuple(top.indices[0].tolist())
            assert sampled.score.top_logprobs == pytest.approx(top.values[0].tolist(), abs=1e-5)
            seen.append(sampled.token_id)

    def test_presence_and_frequency_are_openais_over_the_text_alone(self) -> None:
        one = row(temperature=0, presence_penalty=0.4, frequency_penalty=0.3, logprobs=1, processed_logprobs=True)
        counts = torch.zeros(VOCAB)
        for step in range(25):
            scores = logits(seed=step % 2)
            expected = scores[0] - 0.4 * (counts > 0) - 0.3 * counts
            sampled = sample_batch(scores, [one])[0]
            assert sampled.token_id == expected.argmax().item()
            counts[sampled.token_id] += 1
        assert counts.max() > 2

    def test_prompt_ids_beyond_the_logits_are_left_out(self) -> None:
        one = row(prompt=[1, VOCAB + 5, 2], temperature=0, repetition_penalty=2.0)
        assert generate(one, 2)

    def test_logit_bias_forces_and_forbids(self) -> None:
        forced = row(logit_bias={77: 100.0, 10**9: 5.0})
        assert generate(forced, 5) == [77] * 5
        best = logits()[0].argmax().item()
        assert tokens(sample_batch(logits(), [row(temperature=0, logit_bias={best: -100.0})]))[0] != best

    def test_sequences_do_not_leak_into_each_other(self) -> None:
        scores = logits(3)
        rows = [row(temperature=0), row(temperature=0, logit_bias={8: 50.0}), row(temperature=0)]
        best = scores.argmax(-1).tolist()
        assert tokens(sample_batch(scores, rows)) == [best[0], 8, best[2]]

    def test_the_logits_given_are_not_changed(self) -> None:
        scores = logits(2)
        before = scores.clone()
        sample_batch(scores, [row(logit_bias={1: 3.0}, repetition_penalty=1.5), row(top_p=0.5)])
        assert torch.equal(scores, before)


class TestBans:
    def test_only_allowed_tokens(self) -> None:
        assert set(generate(row(allowed_token_ids=(5, 9, 10**6), temperature=5.0), 30)) == {5, 9}

    def test_no_terminator_before_min_tokens(self) -> None:
        scores = logits()
        scores[0, 2], scores[0, 8] = 50.0, 49.0
        one = row(temperature=0, min_tokens=3, stop_token_ids=(8,))
        drawn = [tokens(sample_batch(scores, [one]))[0] for _ in range(5)]
        assert not {2, 8} & set(drawn[:3])
        assert drawn[3:] == [2, 2]

    def test_format_rules(self) -> None:
        scores = logits()
        order = scores[0].argsort(descending=True).tolist()
        rules = FormatRules(suppressed=(order[0],), first_suppressed=(order[1],), first=order[50])
        one = row(prompt=[1], temperature=0, rules=rules)
        drawn = [tokens(sample_batch(scores, [one]))[0] for _ in range(3)]
        assert drawn == [order[50], order[2], order[1]]

    def test_nothing_left_fails_that_sequence_alone(self) -> None:
        first, second = sample_batch(logits(2), [row(allowed_token_ids=()), row(temperature=0)])
        assert isinstance(first.error, BadRequest)
        assert second.error is None


class Shift(LogitsProcessor):
    """Forbids the last token of the context: depends on input_ids."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.dtype == torch.long
        assert input_ids.shape[0] == scores.shape[0] == 1
        return scores.scatter(1, input_ids[:, -1:], float("-inf"))


class Raises(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("processor is broken")


class Truncates(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores[:, :5]


class TestProcessors:
    def test_sees_the_whole_context(self) -> None:
        one = row(temperature=0, processors=[Shift()])
        scores = logits()
        first, second, third = scores[0].topk(3).indices.tolist()
        drawn = [tokens(sample_batch(scores, [one]))[0] for _ in range(300)]
        assert drawn[:4] == [first, second, first, second]
        assert third not in drawn

    @pytest.mark.parametrize("broken", [Raises(), Truncates()])
    def test_a_broken_one_fails_its_sequence_alone(self, broken: LogitsProcessor) -> None:
        rows = [row(temperature=0), row(processors=[broken]), row(seed=3)]
        before = row(seed=3)
        scores = logits().repeat(3, 1)
        sampled = sample_batch(scores, rows)
        assert isinstance(sampled[1].error, ModelError)
        assert rows[1].generated == []
        assert sampled[0].token_id == scores[0].argmax().item()
        assert [sampled[2].token_id] == tokens(sample_batch(scores[:1], [before]))


class TestPoison:
    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    @pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_p": 0.5, "logprobs": 2}])
    def test_logits_that_are_no_numbers_fail_one_sequence(self, poison: float, settings: dict[str, Any]) -> None:
        scores = logits(3)
        scores[1, 5] = poison
        rows = [row(seed=1, **settings) for _ in range(3)]
        clean = sample_batch(logits(3)[[0]], [row(seed=1, **settings)])[0]
        sampled = sample_batch(scores, rows)
        assert isinstance(sampled[1].error, ModelError)
        assert sampled[0] == clean
        assert sampled[2].error is None

    def test_all_minus_infinity(self) -> None:
        scores = torch.full((1, VOCAB), float("-inf"))
        assert sample_batch(scores, [row()])[0].error is not None


class TestLogprobs:
    def test_raw_ones_are_of_the_raw_logits(self) -> None:
        scores = logits(4)
        settings: list[dict[str, Any]] = [
            {"temperature": 0},
            {"temperature": 0.3, "top_k": 2},
            {"repetition_penalty": 3.0},
            {"logit_bias": {900: 90.0}},
        ]
        rows = [row(logprobs=i, seed=0, **setting) for i, setting in enumerate(settings)]
        expected = scores.log_softmax(-1)
        for i, sampled in enumerate(sample_batch(scores, rows)):
            score = sampled.score
            assert score is not None
            assert score.logprob == pytest.approx(expected[i, sampled.token_id].item(), abs=1e-5)
            assert score.rank == 1 + (expected[i] > expected[i, sampled.token_id]).sum().item()
            assert score.top_ids == tuple(expected[i].topk(i).indices.tolist())
            assert score.top_logprobs == pytest.approx(expected[i].topk(i).values.tolist(), abs=1e-5)

    def test_named_tokens_in_place_of_the_likeliest(self) -> None:
        steps = logits(rows=2)
        rows = [
            row(temperature=0, logprobs=0, logprob_token_ids=(3, 9, VOCAB + 5), allowed_token_ids=(4,)),
            row(temperature=0, logprobs=1),
        ]
        named, plain = (sampled.score for sampled in sample_batch(steps, rows))
        assert named is not None
        assert plain is not None
        expected = steps[0].log_softmax(-1)
        assert sorted(named.top_ids) == [3, 9]
        assert dict(zip(named.top_ids, named.top_logprobs, strict=True)) == pytest.approx(
            {i: expected[i].item() for i in (3, 9)}, abs=1e-5
        )
        assert named.top_logprobs[0] >= named.top_logprobs[1]
        assert plain.top_ids == (int(steps[1].argmax()),)

    @pytest.mark.parametrize(
        "settings",
        [{"top_k": 3, "temperature": 0.7}, {"top_p": 0.4}, {"top_p": 0.99}, {"top_k": 400}, {"typical_p": 0.5}, {}],
    )
    def test_processed_ones_are_of_the_distribution_drawn_from(self, settings: dict[str, Any]) -> None:
        from tests.engine.sampling.test_truncation import reference

        scores = logits(2, spread=1.0)
        rows = [row(temperature=0), row(seed=4, logprobs=8, processed_logprobs=True, **settings)]
        sampled = sample_batch(scores, rows)[1]
        expected = reference(scores[1], SamplingParams(**settings)).log_softmax(-1)
        score = sampled.score
        assert score is not None
        assert score.logprob == pytest.approx(expected[sampled.token_id].item(), abs=1e-4)
        assert math.isfinite(score.logprob)
        kept = min(8, int((expected > float("-inf")).sum()))
        assert score.top_logprobs == pytest.approx(expected.topk(kept).values.tolist(), abs=1e-4)

    def test_more_alternatives_than_tokens(self) -> None:
        sampled = sample_batch(logits(vocab=4), [row(vocab=4, logprobs=20, prompt=[1])])[0]
        assert sampled.score is not None
        assert len(sampled.score.top_ids) == 4

    def test_none_are_computed_unless_asked(self) -> None:
        assert sample_batch(logits(), [row()])[0].score is None


class Countdown:
    """A mask that allows one id after another and then ends."""

    def __init__(self, ids: list[int], replace: int | None = None) -> None:
        self.ids = ids
        self.replace = replace

    def mask(self, scores: torch.Tensor) -> None:
        kept = scores[self.ids[0]].clone()
        scores.fill_(float("-inf"))
        scores[self.ids[0]] = kept

    def advance(self, token_id: int) -> int:
        assert token_id == self.ids.pop(0)
        return token_id if self.replace is None else self.replace

    @property
    def ends(self) -> FinishReason | None:
        return None if self.ids else "stop"


class TestMasks:
    @pytest.mark.parametrize("settings", [{"temperature": 0}, {"seed": 1}, {"top_p": 0.3}])
    def test_is_followed_and_ends_the_text(self, settings: dict[str, Any]) -> None:
        one = row(mask=Countdown([9, 8, 7]), **settings)
        sampled = [sample_batch(logits(seed=s), [one])[0] for s in range(3)]
        assert tokens(sampled) == [9, 8, 7]
        assert [s.ends for s in sampled] == [None, None, "stop"]

    def test_may_replace_the_token(self) -> None:
        one = row(mask=Countdown([9], replace=11), logprobs=0)
        sampled = sample_batch(logits(), [one])[0]
        assert sampled.token_id == 11
        assert one.generated == [11]
        assert sampled.score is not None
        assert sampled.score.logprob == pytest.approx(logits().log_softmax(-1)[0, 11].item(), abs=1e-5)

    def test_one_that_raises_fails_its_sequence_alone(self) -> None:
        rows = [row(mask=Countdown([])), row(temperature=0)]
        first, second = sample_batch(logits(2), rows)
        assert first.error is not None
        assert second.token_id == logits(2)[1].argmax().item()


def test_a_batch_of_plain_greedy_sequences_costs_about_one_argmax() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    scores = logits(32, vocab=64_000)
    rows = [row(vocab=64_000, temperature=0) for _ in range(32)]

    def cost(call: Any) -> float:
        times = []
        for _ in range(12):
            begun = time.thread_time()
            call()
            times.append(time.thread_time() - begun)
        return min(times)

    argmax = cost(lambda: scores.argmax(-1))
    sampled = cost(lambda: sample_batch(scores, rows))
    torch.set_num_threads(threads)
    assert sampled < 2 * argmax


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_mixture_of_sequences_gives_each_what_it_would_get_alone(data: st.DataObject) -> None:
    """Random parameters side by side: tokens and scores are those of each sequence by itself."""
    wishes = data.draw(st.lists(PARAMS, min_size=1, max_size=6))
    seeds = data.draw(st.lists(st.integers(0, 50), min_size=len(wishes), max_size=len(wishes)))
    together = [row(vocab=300, seed=seed, **wish) for wish, seed in zip(wishes, seeds, strict=True)]
    alone = [row(vocab=300, seed=seed, **wish) for wish, seed in zip(wishes, seeds, strict=True)]
    for step in range(4):
        scores = logits(len(wishes), seed=step, vocab=300)
        expected = [sample_batch(scores[i : i + 1], [one])[0] for i, one in enumerate(alone)]
        found = sample_batch(scores, together)
        assert [s.token_id for s in found] == [s.token_id for s in expected]
        for one, other in zip(found, expected, strict=True):
            assert (one.score is None) == (other.score is None)
            if one.score is not None and other.score is not None:
                assert one.score.logprob == pytest.approx(other.score.logprob, abs=1e-5)
                assert one.score.top_ids == other.score.top_ids
