from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.core.calls import SamplingParams
from deployments.core.events import Delta
from deployments.core.reasoning import ReasoningMarkers
from deployments.engine.sampling.logprobs import TokenScore
from deployments.engine.sampling.sample import Sampled
from deployments.engine.text.output import ChoiceOutput, StopStrings
from tests.engine.text.test_vocabulary import BYTES, SENTENCEPIECE

EOS, IM_END = 257, 260


def ids(text: str) -> list[int]:
    return BYTES.text_side.encode(text).input_ids


THINK = ReasoningMarkers("<think>", "</think>")


def run(
    tokens: list[int], *, reasoning: ReasoningMarkers | None = None, opened: bool = False, **kwargs: Any
) -> list[Delta]:
    """The deltas of a choice that is given these tokens until it ends; `length` where they run out."""
    output = ChoiceOutput(BYTES, SamplingParams(**kwargs), reasoning=reasoning, opened=opened)
    deltas = []
    for token_id in tokens:
        delta = output.push(Sampled(token_id))
        if delta is not None:
            deltas.append(delta)
        if output.finished:
            return deltas
    return [*deltas, output.finish("length")]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_text_comes_at_once_and_adds_up() -> None:
    deltas = run(ids("hello"))
    assert [d.text for d in deltas] == ["h", "e", "l", "l", "o", ""]
    assert sum((d.token_ids for d in deltas), ()) == tuple(ids("hello"))
    assert [d.finish_reason for d in deltas] == [None] * 5 + ["length"]


def test_tokens_of_an_unfinished_character_come_with_it() -> None:
    deltas = run(ids("é!"))
    assert [(d.text, len(d.token_ids)) for d in deltas] == [("é", 2), ("!", 1), ("", 0)]


def test_an_unfinished_character_at_the_end_is_not_lost() -> None:
    assert text(run(ids("a😀")[:-1])) == "a�"


class TestTerminators:
    def test_end_the_text_without_being_part_of_it(self) -> None:
        deltas = run([*ids("ab"), EOS, *ids("c")])
        assert text(deltas) == "ab"
        assert deltas[-1].finish_reason == "stop"
        assert deltas[-1].stop_reason is None
        assert deltas[-1].token_ids == (EOS,)

    def test_of_the_request(self) -> None:
        deltas = run(ids("abc"), stop_token_ids=(ids("b")[0],))
        assert text(deltas) == "a"
        assert deltas[-1].stop_reason == ids("b")[0]

    def test_are_part_of_the_text_where_asked(self) -> None:
        assert text(run([*ids("ab"), EOS], include_stop_str_in_output=True, skip_special_tokens=False)) == "ab<|eos|>"
        assert text(run([*ids("ab"), EOS], include_stop_str_in_output=True)) == "ab"
        assert text(run(ids("abc"), stop_token_ids=(ids("b")[0],), include_stop_str_in_output=True)) == "ab"

    def test_ignored(self) -> None:
        deltas = run([*ids("a"), EOS, *ids("b")], ignore_eos=True, skip_special_tokens=False)
        assert text(deltas) == "a<|eos|>b"
        assert text(run([*ids("a"), EOS, *ids("b")], ignore_eos=True)) == "ab"
        stopped = run([*ids("a"), EOS, *ids("b")], ignore_eos=True, stop_token_ids=(EOS,))
        assert stopped[-1].stop_reason == EOS

    def test_not_before_min_tokens(self) -> None:
        assert run([EOS, EOS, EOS], min_tokens=3)[-1].token_ids == (EOS, EOS, EOS)


class TestMaxTokens:
    def test_ends_as_length(self) -> None:
        deltas = run(ids("abcdef"), max_tokens=3)
        assert text(deltas) == "abc"
        assert deltas[-1].finish_reason == "length"

    def test_a_terminator_at_the_last_token_is_a_stop(self) -> None:
        assert run([*ids("ab"), EOS], max_tokens=3)[-1].finish_reason == "stop"

    def test_a_stop_string_at_the_last_token_is_a_stop(self) -> None:
        deltas = run(ids("abc"), max_tokens=3, stop=("c",))
        assert (text(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("ab", "stop", "c")

    def test_what_was_held_back_comes_out(self) -> None:
        assert text(run(ids("abc"), max_tokens=3, stop=("cd",))) == "abc"


class TestStopStrings:
    def test_across_tokens_nothing_of_it_is_given_out(self) -> None:
        deltas = run(ids("say STOP now"), stop=("STOP",))
        assert text(deltas) == "say "
        assert deltas[-1].stop_reason == "STOP"
        assert not any("S" in d.text for d in deltas)

    def test_a_false_start_is_given_out_later(self) -> None:
        assert [d.text for d in run(ids("aSTx"), stop=("STOP",)) if d.text] == ["a", "STx"]

    def test_included(self) -> None:
        assert text(run(ids("a STOP b"), stop=("STOP",), include_stop_str_in_output=True)) == "a STOP"

    def test_not_before_min_tokens(self) -> None:
        assert text(run(ids("a.b.c"), stop=(".",), min_tokens=3)) == "a.b"
        assert text(run(ids("a.b.c"), stop=(".",), min_tokens=2)) == "a"

    def test_that_is_a_special_token(self) -> None:
        deltas = run([*ids("ab"), IM_END, *ids("c")], stop=("<|im_end|>",), ignore_eos=True)
        assert (text(deltas), deltas[-1].stop_reason) == ("ab", "<|im_end|>")

    def test_that_is_written_out_like_a_special_token(self) -> None:
        assert text(run(ids("ab<|im_end|>c"), stop=("<|im_end|>",))) == "ab"

    def test_of_several_the_one_that_ends_first(self) -> None:
        deltas = run(ids("abcdef"), stop=("bcde", "cd", "zz"))
        assert (text(deltas), deltas[-1].stop_reason) == ("ab", "cd")

    def test_empty_ones_are_ignored(self) -> None:
        assert text(run(ids("ab"), stop=("",))) == "ab"

    def test_with_a_multibyte_character(self) -> None:
        assert text(run(ids("日本。語"), stop=("。",))) == "日本"

    def test_completed_by_text_held_back_to_the_end(self) -> None:
        output = ChoiceOutput(SENTENCEPIECE, SamplingParams(stop=("€",), max_tokens=4))
        convert = SENTENCEPIECE.tokenizer.convert_tokens_to_ids
        tokens = [convert("▁hello"), *(3 + byte for byte in "€".encode())]
        deltas = [d for d in map(output.push, map(Sampled, tokens)) if d is not None]
        assert (text(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == ("hello", "stop", "€")

    @settings(max_examples=300, deadline=None)
    @given(
        pieces=st.lists(st.text("ab", max_size=4), max_size=12),
        stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        include=st.booleans(),
    )
    def test_the_cut_does_not_depend_on_the_pieces(self, pieces: list[str], stops: list[str], include: bool) -> None:
        def cut(parts: list[str]) -> tuple[str, str | None]:
            scanner, given = StopStrings(stops, include=include), ""
            for part in parts:
                new, stop = scanner.feed(part, True)
                given += new
                if stop is not None:
                    return given, stop
            return given + scanner.flush(), None

        whole = "".join(pieces)
        assert cut(pieces) == cut([whole]) == cut(list(whole))
        if not include:
            assert not any(stop in cut(pieces)[0] for stop in stops)


class TestLogprobs:
    def test_one_for_every_token(self) -> None:
        output = ChoiceOutput(BYTES, SamplingParams(logprobs=1, max_tokens=3))
        score = TokenScore(-1.0, 1, (65,), (-1.0,))
        deltas = [output.push(Sampled(token_id, score)) for token_id in ids("é!")]
        found = [entry for d in deltas if d is not None for entry in d.logprobs or ()]
        assert [entry.token_id for entry in found] == ids("é!")
        assert [entry.bytes for entry in found] == [b"\xc3", b"\xa9", b"!"]
        assert all(d is None or len(d.logprobs or ()) == len(d.token_ids) for d in deltas)

    def test_absent_unless_asked(self) -> None:
        assert all(d.logprobs is None for d in run(ids("ab")))


def test_a_mask_ends_the_text() -> None:
    output = ChoiceOutput(BYTES, SamplingParams(ignore_eos=True))
    assert output.push(Sampled(ids("}")[0], ends="stop")) == Delta(
        text="}", token_ids=tuple(ids("}")), finish_reason="stop"
    )
    assert output.finished
    cut = ChoiceOutput(BYTES, SamplingParams()).push(Sampled(EOS, ends="length"))
    assert cut is not None
    assert cut.finish_reason == "length"


def test_cached_tokens_come_once() -> None:
    output = ChoiceOutput(BYTES, SamplingParams())
    output.cached_tokens = 12
    deltas = [output.push(Sampled(i)) for i in ids("ab")]
    assert [d.cached_tokens for d in deltas if d is not None] == [12, 0]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_stream_joined_is_the_whole_up_to_the_stop(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 260), min_size=1, max_size=40))
    stops = tuple(data.draw(st.lists(st.sampled_from(["a", "ab", "�", "<|eos|>", "é"]), max_size=2)))
    skip = data.draw(st.booleans())
    deltas = run(tokens, stop=stops, ignore_eos=True, skip_special_tokens=skip, max_tokens=len(tokens))
    taken = sum((d.token_ids for d in deltas), ())
    assert taken == tuple(tokens[: len(taken)])
    whole = BYTES.text_side.decode(list(taken), skip_special_tokens=skip)
    if deltas[-1].finish_reason == "length":
        assert text(deltas) == whole
    else:
        assert whole.startswith(text(deltas))
        assert deltas[-1].stop_reason in stops
    assert sum(d.finish_reason is not None for d in deltas) == 1


def reasoned(deltas: list[Delta]) -> int:
    return sum(delta.reasoning_tokens for delta in deltas)


def test_stop_strings_count_behind_the_reasoning_only() -> None:
    whole = "<think>a stop b</think>yes stop no"
    deltas = run(ids(whole), stop=("stop",), reasoning=THINK)
    assert text(deltas) == "<think>a stop b</think>yes "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "stop")
    assert reasoned(deltas) == len("<think>a stop b</think>")
    opened = run(ids("a stop b</think>yes stop no"), stop=("stop",), reasoning=THINK, opened=True)
    assert text(opened) == "a stop b</think>yes "
    assert reasoned(opened) == len("a stop b</think>")


def test_a_text_without_reasoning_is_an_answer() -> None:
    for answer in ("a stop b", "<th stop", " <thin", "<"):
        deltas = run(ids(answer), stop=("stop",), reasoning=THINK)
        assert text(deltas) == answer.partition("stop")[0]
        assert reasoned(deltas) == 0


def test_reasoning_that_does_not_end_is_all_there_is() -> None:
    deltas = run(ids("<think>on and </thi"), reasoning=THINK, stop=("on",))
    assert text(deltas) == "<think>on and </thi"
    assert (deltas[-1].finish_reason, reasoned(deltas)) == ("length", len("<think>on and </thi"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<", "th", " ", "stop", "x"]), max_size=12), st.booleans())
def test_no_text_is_lost_around_reasoning(pieces: list[str], opened: bool) -> None:
    whole = "".join(pieces)
    assert text(run(ids(whole), reasoning=THINK, opened=opened)) == whole
