from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
import torch

from deployments.core.calls import Grammar, SamplingParams
from deployments.core.errors import BadRequest
from deployments.core.events import Delta
from deployments.engine.grammar import grammar as grammar_module
from deployments.engine.grammar.grammar import MAX_SOURCE, CompiledGrammar, GrammarCompiler, GrammarMask
from deployments.engine.sampling.sample import sample_batch
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.vocabulary import Vocabulary
from tests.engine.text.test_vocabulary import BYTES, SENTENCEPIECE
from tests.tiny import Words, byte_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "place": {
            "type": "object",
            "properties": {"x": {"type": "number"}, "side": {"enum": ["left", "right"]}},
            "required": ["x", "side"],
        },
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


def schema(value: object) -> Grammar:
    return Grammar(kind="json_schema", source=json.dumps(value))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(BYTES, 261)


def compiled(compiler: GrammarCompiler, grammar: Grammar) -> CompiledGrammar:
    return compiler.compile(grammar).result(timeout=10)


def random_text(
    grammar: Grammar, compiler: GrammarCompiler, vocabulary: Vocabulary, *, width: int, seed: int, **kwargs: Any
) -> tuple[str, Delta]:
    """What a model with random logits writes under a grammar, and the last delta."""
    params = SamplingParams(grammar=grammar, seed=seed, **kwargs)
    mask = compiled(compiler, grammar).mask(params.max_tokens or 1)
    row = vocabulary.sampler(params, [1], vocab_size=width, device=torch.device("cpu"), mask=mask)
    output, text = ChoiceOutput(vocabulary, params), ""
    noise = torch.Generator().manual_seed(seed)
    while True:
        sampled = sample_batch(torch.randn(1, width, generator=noise) * 3, [row])[0]
        assert sampled.error is None
        delta = output.push(sampled)
        text += delta.text if delta is not None else ""
        if delta is not None and delta.finish_reason is not None:
            return text, delta


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "left": {"$ref": "#/$defs/node"},
                "right": {"$ref": "#/$defs/node"},
                "label": {"type": "string", "minLength": 20},
            },
            "required": ["label"],
        }
    },
    "$ref": "#/$defs/node",
}


def _driven(mask: GrammarMask, text: bytes) -> list[int]:
    """The bytes a sequence takes whose model wants to write a text."""
    single = {BYTES.token_bytes(i): i for i in range(256)}
    taken: list[int] = []
    for byte in text:
        taken += BYTES.token_bytes(mask.advance(single[bytes([byte])]))
        if mask.ends:
            break
    return taken


class TestRandomWeights:
    @pytest.mark.parametrize("max_tokens", [29, 31, 60, 200])
    def test_write_json_of_the_schema_within_max_tokens(self, compiler: GrammarCompiler, max_tokens: int) -> None:
        for seed in range(15):
            text, last = random_text(
                schema(PERSON), compiler, BYTES, width=261, seed=seed, max_tokens=max_tokens, temperature=1.5
            )
            value = json.loads(text)
            assert {"name", "tags"} <= set(value) <= set(PERSON["properties"])  # type: ignore[call-overload]
            assert len(value["tags"]) <= 3
            assert last.finish_reason in ("stop", "length")

    @pytest.mark.parametrize("beyond", [3, 20, 40, 70, 150])
    def test_write_json_whose_ending_grows_by_many_tokens_at_once(self, compiler: GrammarCompiler, beyond: int) -> None:
        budget = len(compiled(compiler, schema(TREE)).ending or ()) + beyond
        for seed in range(6):
            text, _ = random_text(schema(TREE), compiler, BYTES, width=261, seed=seed, max_tokens=budget)
            assert len(json.loads(text)["label"]) >= 20

    def test_a_place_without_a_known_ending_is_left_while_there_is_time(self, compiler: GrammarCompiler) -> None:
        # The greedy search writes x for ever.
        grammar = schema({"type": "object", "properties": {"p": {"type": "string", "pattern": "^x*y$"}}})
        mask = compiled(compiler, grammar).mask(400)
        assert bytes(_driven(mask, b'{"p":"xxxy"}')) == b'{"p":"xxxy"}'
        short = compiled(compiler, grammar).mask(40)
        assert "p" not in json.loads(bytes(_driven(short, b'{"p":"xxxy"}')))

    def test_a_text_cut_short_says_so_and_one_that_is_complete_does_not(self, compiler: GrammarCompiler) -> None:
        reasons = {
            random_text(schema(PERSON), compiler, BYTES, width=261, seed=s, max_tokens=29)[1].finish_reason
            for s in range(5)
        }
        assert reasons == {"length"}
        one = Grammar(kind="choice", source='["yes", "no"]')
        assert random_text(one, compiler, BYTES, width=261, seed=0, max_tokens=50)[1].finish_reason == "stop"

    def test_with_sentencepiece_tokens(self) -> None:
        compiler = GrammarCompiler(SENTENCEPIECE, 300)
        for seed in range(5):
            text, _ = random_text(schema(PERSON), compiler, SENTENCEPIECE, width=300, seed=seed, max_tokens=80)
            json.loads(text)

    @pytest.mark.parametrize("seed", range(5))
    def test_json_object(self, compiler: GrammarCompiler, seed: int) -> None:
        text, _ = random_text(
            Grammar(kind="json_object", source=""), compiler, BYTES, width=261, seed=seed, max_tokens=40
        )
        assert isinstance(json.loads(text), dict)

    @pytest.mark.parametrize("seed", range(5))
    def test_regex(self, compiler: GrammarCompiler, seed: int) -> None:
        pattern = r"[0-9]{3}-[0-9]{4}( [a-z]+)?"
        text, _ = random_text(
            Grammar(kind="regex", source=pattern), compiler, BYTES, width=261, seed=seed, max_tokens=20
        )
        assert re.fullmatch(pattern, text)

    def test_choice(self, compiler: GrammarCompiler) -> None:
        choices = ["yes", "no", 'may"be', "ja 日本\n"]
        grammar = Grammar(kind="choice", source=json.dumps(choices))
        found = {random_text(grammar, compiler, BYTES, width=261, seed=s, max_tokens=30)[0] for s in range(40)}
        assert found == set(choices)

    def test_lark(self, compiler: GrammarCompiler) -> None:
        grammar = Grammar(kind="lark", source='start: "a" ("b" | "c")+ "."')
        text, _ = random_text(grammar, compiler, BYTES, width=261, seed=1, max_tokens=12)
        assert re.fullmatch(r"a[bc]+\.", text)

    def test_special_tokens_are_no_text(self, compiler: GrammarCompiler) -> None:
        grammar = schema({"type": "string"})
        mask = compiled(compiler, grammar).mask(50)
        mask.advance(BYTES.text_side.encode('"').input_ids[0])
        scores = torch.zeros(261)
        mask.mask(scores)
        assert not torch.isfinite(scores[256:]).any()
        assert torch.isfinite(scores[BYTES.text_side.encode("<").input_ids[0]])

    def test_logits_wider_than_the_vocabulary(self) -> None:
        compiler = GrammarCompiler(BYTES, 320)
        text, _ = random_text(schema(PERSON), compiler, BYTES, width=320, seed=0, max_tokens=100)
        json.loads(text)

    def test_without_a_terminator(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = None
        tokenizer.eos_token = None
        vocabulary = Words(tokenizer)
        assert not vocabulary.eos_ids
        compiler = GrammarCompiler(vocabulary, 261)
        text, last = random_text(schema(PERSON), compiler, vocabulary, width=261, seed=0, max_tokens=100)
        json.loads(text)
        assert last.finish_reason in ("stop", "length")

    def test_white_space_cannot_fill_the_text(self, compiler: GrammarCompiler) -> None:
        mask = compiled(compiler, schema(PERSON)).mask(10_000)
        space = BYTES.text_side.encode(" ").input_ids[0]
        mask.advance(BYTES.text_side.encode("{").input_ids[0])
        for _ in range(100):
            scores = torch.zeros(261)
            mask.mask(scores)
            if not torch.isfinite(scores[space]):
                return
            mask.advance(space)
        pytest.fail("white space without end")

    def test_ignore_eos_still_ends_where_the_grammar_does(self, compiler: GrammarCompiler) -> None:
        grammar = Grammar(kind="regex", source="[a-c]*")
        text, _ = random_text(grammar, compiler, BYTES, width=261, seed=2, max_tokens=500, ignore_eos=True)
        assert re.fullmatch("[a-c]*", text)
        assert len(text) < 500


class TestRefusals:
    @pytest.mark.parametrize(
        "grammar",
        [
            Grammar(kind="json_schema", source="{"),
            Grammar(kind="json_schema", source='"x"'),
            schema({"type": "strin"}),
            schema({"not": {"type": "string"}}),
            schema({"type": "integer", "minimum": 5, "maximum": 3}),
            schema({"$ref": "http://example.org/schema"}),
            schema({"$ref": "#"}),
            schema(False),
            Grammar(kind="json_schema", source='{"a":' * 500 + "1" + "}" * 500),
            Grammar(kind="json_schema", source='{"items":' * 3000 + "{}" + "}" * 3000),
            Grammar(kind="regex", source="(a"),
            Grammar(kind="regex", source=r"(a)\1"),
            Grammar(kind="regex", source="(?=a)b"),
            Grammar(kind="choice", source="[]"),
            Grammar(kind="choice", source='["a", ""]'),
            Grammar(kind="choice", source='"a"'),
            Grammar(kind="choice", source="x"),
            Grammar(kind="lark", source="start: foo"),
        ],
        ids=lambda g: f"{g.kind}:{g.source[:30]}",
    )
    def test_what_cannot_be_followed(self, compiler: GrammarCompiler, grammar: Grammar) -> None:
        with pytest.raises(BadRequest) as caught:
            compiled(compiler, grammar)
        assert len(caught.value.message) < 500

    def test_a_source_that_is_too_large(self, compiler: GrammarCompiler) -> None:
        with pytest.raises(BadRequest, match="more than"):
            compiler.compile(Grammar(kind="regex", source="a" * (MAX_SOURCE + 1)))

    @pytest.mark.parametrize(
        "source",
        ["((a{1,1000}){1,1000}){1,1000}", "(a|a)*(a|a)*b" * 20, ".{0,100000}z", "(.*a.*b.*c.*){10}"],
    )
    def test_hostile_expressions_are_bounded(self, compiler: GrammarCompiler, source: str) -> None:
        begun = time.monotonic()
        try:
            mask = compiled(compiler, Grammar(kind="regex", source=source)).mask(100)
            for token_id in BYTES.text_side.encode("a" * 50).input_ids:
                mask.mask(torch.zeros(261))
                mask.advance(token_id)
        except BadRequest:
            pass
        assert time.monotonic() - begun < 6

    def test_one_that_takes_too_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        released = threading.Event()
        monkeypatch.setattr(grammar_module, "COMPILE_SECONDS", 0.1)
        monkeypatch.setattr(grammar_module, "GrammarTokens", lambda *args: released.wait(5))
        compiler = GrammarCompiler(BYTES, 261)
        try:
            with pytest.raises(BadRequest, match="to compile"):
                compiler.compile(Grammar(kind="regex", source="a")).result(timeout=3)
        finally:
            released.set()
            compiler.close()


class TestCompiler:
    def test_compiles_off_the_caller_and_once(self) -> None:
        compiler = GrammarCompiler(BYTES, 261)
        first, second = compiler.compile(schema(PERSON)), compiler.compile(schema(PERSON))
        assert first.result(timeout=10).ending == second.result(timeout=10).ending
        assert compiler.compile(schema(PERSON)).done()
        compiler.close()

    def test_sequences_of_one_grammar_are_apart(self, compiler: GrammarCompiler) -> None:
        grammar = Grammar(kind="choice", source='["ab", "cd"]')
        first, second = compiled(compiler, grammar).mask(5), compiled(compiler, grammar).mask(5)
        a, c = BYTES.text_side.encode("ac").input_ids
        first.advance(a)
        second.advance(c)
        scores = torch.zeros(2, 261)
        first.mask(scores[0])
        second.mask(scores[1])
        assert [s.argmax().item() for s in scores] == BYTES.text_side.encode("bd").input_ids
