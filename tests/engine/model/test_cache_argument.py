"""Models whose forward names its cache as no version of transformers does: batched, and answered as by `generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaForCausalLM, LlamaModel, LlavaForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.generate.call import GenerateCall
from deployments.engine.generate.engine import GenerateEngine
from deployments.engine.model.cache_argument import argument_of, cache_argument
from deployments.engine.verify.capabilities import check_batchable
from deployments.engine.verify.refused import Refused
from tests.engine.architectures import VISION, llava
from tests.engine.running import batching_engine, built_engine, generate_alone, model_info, prompt, submit
from tests.tiny import llama

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (33, 4, 12)
TOKENS = 9
OWN = argument_of(LlamaModel.forward)
"""What the installed version calls the cache."""


class Renamed(LlamaForCausalLM):
    """A model of its own around the library's layers, which computes what Llama computes."""

    def states(self, ids: Any, mask: Any, positions: Any, cache: Any) -> torch.Tensor:
        given = {"attention_mask": mask, "position_ids": positions, OWN: cache, "use_cache": cache is not None}
        logits: torch.Tensor = self.lm_head(self.model(input_ids=ids, **given).last_hidden_state)
        return logits


class Typed(Renamed):
    """The type says what it is."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        attention_store: Cache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        store = DynamicCache(config=self.config) if attention_store is None else attention_store
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, store))


class Default(Renamed):
    """A default says what it is."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        beads: Any = DynamicCache(),  # noqa: B008
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, beads))


class Untyped(Renamed):
    """Only a trial tells: another optional argument comes first, and takes anything."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        hints=None,
        beads=None,
        use_cache=True,
        return_dict=True,
    ):
        store = DynamicCache(config=self.config) if beads is None else beads
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, store))


class Decoy(Renamed):
    """Two arguments have the name or the type of one, and one of them is a plain table."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        image_table: Cache | None = None,
        beads: Cache | None = None,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> Any:
        store = DynamicCache(config=self.config) if beads is None else beads
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, store))


class Old(Renamed):
    """The name before 5.24."""

    def forward(  # type: ignore[no-untyped-def]
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=True,
        return_dict=True,
    ):
        store = DynamicCache(config=self.config) if past_key_values is None else past_key_values
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, store))


class New(Renamed):
    """The name from 5.24 on."""

    def forward(  # type: ignore[no-untyped-def]
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=True, return_dict=True
    ):
        store = DynamicCache(config=self.config) if cache is None else cache
        return CausalLMOutputWithPast(logits=self.states(input_ids, attention_mask, position_ids, store))


class Wrapped(LlamaForCausalLM):
    """It hands on whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Around(Renamed):
    """It hands what it does not know to a model inside that has a name of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.inner = Typed(config)

    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        return self.inner(input_ids=input_ids, **{k: v for k, v in kwargs.items() if k != "logits_to_keep"})


class Prepares(Untyped):
    """Its own preparation of inputs knows both names."""

    def prepare_inputs_for_generation(  # type: ignore[no-untyped-def]
        self, input_ids, past_key_values=None, attention_mask=None, **kwargs
    ):
        past = past_key_values.get_seq_length()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = mask.cumsum(-1)[:, past:] - 1
        found = {"input_ids": input_ids[:, past:], "attention_mask": mask, "position_ids": positions}
        return {**found, "beads": past_key_values, "use_cache": True}


NAMES = {
    Typed: "attention_store",
    Default: "beads",
    Untyped: "beads",
    Decoy: "beads",
    Old: "past_key_values",
    New: "cache",
    Wrapped: OWN,
    Around: "attention_store",
    Prepares: "beads",
}


def built(kind: type[Any]) -> Any:
    """Llama's weights in a class of another make."""
    plain = llama()
    model = kind(plain.config).eval()
    (model.inner if kind is Around else model).load_state_dict(plain.state_dict())
    return model


@pytest.mark.parametrize("kind", NAMES)
def test_the_argument_is_found(kind: type[Any]) -> None:
    assert cache_argument(built(kind)) == NAMES[kind]


@pytest.mark.parametrize("kind", NAMES)
def test_it_is_batched_and_answers_as_ever(kind: type[Any]) -> None:
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    engine = built_engine(model_info(built(kind)), memory_gib=0.1)
    try:
        assert isinstance(engine, BatchingEngine)
        answers = [submit(engine, ids, TOKENS) for ids in prompts]
        assert [a.wait().token_ids for a in answers] == [generate_alone(llama(), p, TOKENS).token_ids for p in prompts]
    finally:
        engine.close(5)


@pytest.mark.parametrize("kind", NAMES)
def test_generate_decodes_with_the_cache(kind: type[Any]) -> None:
    """One token in each forward after the first: `generate` and the model mean the same cache."""
    model = built(kind)
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    inner = model.inner if kind is Around else model
    if inner is not model:
        inner.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    call = GenerateCall(model)
    seen.clear()
    ids = torch.tensor([prompt(0, 12)])
    found = call(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert found[0, 12:].tolist() == generate_alone(llama(), prompt(0, 12), 4).token_ids
    assert seen == [12, 1, 1, 1]


def test_the_models_own_functions_stay_as_they_are() -> None:
    """The names are bridged on the engine's view: a loader's model is not patched."""
    model = built(Old)
    GenerateCall(model)
    assert not {"forward", "prepare_inputs_for_generation"} & vars(model).keys()


class Cacheless(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, hints: Any = None) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


def test_no_cache_is_found_in_a_forward_that_takes_none() -> None:
    assert cache_argument(built(Cacheless)) is None
    with pytest.raises(Refused, match="its forward takes no cache"):
        check_batchable(built(Cacheless))


def test_a_trial_leaves_nothing_on_the_modules() -> None:
    model = built(Untyped)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    cache_argument(model)
    kept = {name: set(vars(module)) - {"_troupe_fresh_state"} for name, module in model.named_modules()}
    assert kept == before


class Seeing(LlavaForConditionalGeneration):
    """A model of images that names its cache in its own way; what prepares its inputs is the library's."""

    def forward(self, input_ids: Any = None, beads: Cache | None = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, **{**kwargs, OWN: beads})


def test_a_prompt_with_an_image() -> None:
    _, image, media = VISION["llava"]
    engine = batching_engine(llava(kind=Seeing))
    prompts = [[*prompt(i, 3), *image, *prompt(9 + i, 8)] for i in range(3)]
    inputs = [media(ids, i) for i, ids in enumerate(prompts)]
    sent = zip(prompts, inputs, strict=True)
    answers = [submit(engine, ids, TOKENS, inputs=shown, content_key=str(i)) for i, (ids, shown) in enumerate(sent)]
    for answer, ids, shown in zip(answers, prompts, inputs, strict=True):
        assert answer.wait().token_ids == generate_alone(llava(), ids, TOKENS, **shown).token_ids
    engine.close(5)


# Outputs with a class of their own.

OUTPUTS = """
from dataclasses import dataclass
from typing import Any
from transformers.utils import ModelOutput

@dataclass
class Answered(ModelOutput):
    loss: Any = None
    logits: Any = None
    {field}: Any = None
"""


@pytest.fixture
def answered() -> Iterator[Callable[[str], Any]]:
    """A class whose output class has a field of some name; both in a module of their own, as a checkpoint's code."""
    names: list[str] = []

    def make(field: str) -> Any:
        name = f"remote_code_of_{field}"
        module = sys.modules[name] = ModuleType(name)
        names.append(name)
        exec(OUTPUTS.format(field=field), vars(module))

        class Answering(Old):
            def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
                found = super().forward(*args, past_key_values=past_key_values, **kwargs)
                return module.Answered(logits=found.logits, **{field: past_key_values})

        Answering.__module__ = name
        return Answering, module.Answered

    yield make
    for name in names:
        del sys.modules[name]


@pytest.mark.parametrize("field", ["past_key_values", "cache", "cache_params", "beads"])
def test_an_output_class_of_its_own(field: str, answered: Callable[[str], Any]) -> None:
    kind, output = answered(field)
    prompts = [prompt(i, length) for i, length in enumerate(LENGTHS)]
    for engine_kind in ("auto", "generate"):
        engine = built_engine(model_info(built(kind)), kind=engine_kind, memory_gib=0.1)
        assert isinstance(engine, BatchingEngine if engine_kind == "auto" else GenerateEngine)
        answers = [submit(engine, ids, TOKENS) for ids in prompts]  # type: ignore[arg-type]
        assert [a.wait().token_ids for a in answers] == [generate_alone(llama(), p, TOKENS).token_ids for p in prompts]
        engine.close(5)
    held = DynamicCache()
    made = output(logits=torch.zeros(1), **{field: held})
    assert getattr(made, field) is held
    assert made[field] is held
    assert field in made
    assert made.to_tuple()[-1] is held


def test_an_output_class_of_the_library_is_left_alone() -> None:
    before = dict(vars(CausalLMOutputWithPast))
    built_engine(model_info(built(Old)), memory_gib=0.1).close()
    assert dict(vars(CausalLMOutputWithPast)) == before


@dataclass
class Table(ModelOutput):
    """No cache in it."""

    logits: Any = None
    beads: Any = None


def test_an_output_without_a_cache_is_left_alone() -> None:
    class Bare(Untyped):
        def forward(self, *args: Any, beads: Any = None, **kwargs: Any) -> Any:
            return Table(logits=super().forward(*args, beads=beads, **kwargs).logits)

    model = built(Bare)
    call = GenerateCall(model)
    ids = torch.tensor([prompt(0, 12)])
    found = call(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
    assert found[0, 12:].tolist() == generate_alone(llama(), prompt(0, 12), 4).token_ids
