from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ContextOverflow, UnsupportedParameter
from deployments.core.token_ids import vocab_size
from deployments.engine.base.admission import ALL_PARAMS, check_request, context_length
from deployments.engine.base.protocol import EngineRequest
from model_loaders.contract import ModelInfo
from tests.engine.running import ask, built_engine, model_info
from tests.tiny import llama


def info(tokenizer: Any = None, max_model_len: int | None = None, **config: Any) -> ModelInfo:
    return ModelInfo(
        model=SimpleNamespace(config=SimpleNamespace(**config)), tokenizer=tokenizer, max_model_len=max_model_len
    )


def tokenizer(length: int) -> Any:
    return SimpleNamespace(model_max_length=length)


class TestContextLength:
    def test_the_option_wins_then_the_loader_then_the_config(self) -> None:
        given = info(max_model_len=300, max_position_embeddings=200)
        assert context_length(given, EngineOptions(max_model_len=100)) == 100
        assert context_length(given, EngineOptions()) == 300
        assert context_length(info(max_position_embeddings=200), EngineOptions()) == 200

    @pytest.mark.parametrize("name", ["n_positions", "max_seq_len", "max_target_positions"])
    def test_the_names_configs_use(self, name: str) -> None:
        assert context_length(info(**{name: 77}), EngineOptions()) == 77

    def test_of_the_text_model(self) -> None:
        model = llama()
        assert context_length(ModelInfo(model=model), EngineOptions()) == 512

    @pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
    @pytest.mark.parametrize(
        ("rope", "length"),
        [
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, 1024),
            ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
            ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 512}, 768),
            ({"rope_type": "linear", "factor": 4}, 2048),
            ({"type": "linear", "factor": 4.0}, 2048),
            ({"type": "dynamic", "factor": 2.0}, 1024),
            ({"rope_type": "longrope", "original_max_position_embeddings": 128}, 512),
            ({"rope_type": "longrope", "factor": 8.0, "original_max_position_embeddings": 128}, 1024),
            ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}, 512),
            ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 512),
            ({"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0}, 512),
            ({"rope_type": "default"}, 512),
            ({"full": {"rope_type": "linear", "factor": 8.0}, "sliding": {"rope_type": "default"}}, 512),
            ({"full": {"rope_type": "linear", "factor": 2.0}, "chunked": None}, 1024),
            ({"full": {"type": "linear", "factor": 2.0}, "sliding": {"type": "dynamic", "factor": 2.0}}, 1024),
            ({"full": {"rope_type": "dynamic", "factor": 4.0}, "sliding": {"rope_type": "default"}}, 2048),
            (
                {
                    "full": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
                    "sliding": {"rope_type": "default"},
                },
                2048,
            ),
        ],
    )
    def test_rope_scaling_stretches_it(self, name: str, rope: dict[str, Any], length: int) -> None:
        assert context_length(info(max_position_embeddings=512, **{name: rope}), EngineOptions()) == length

    def test_an_original_length_beside_the_scaling(self) -> None:
        config = {"max_position_embeddings": 512, "original_max_position_embeddings": 256}
        rope = {"rope_type": "yarn", "factor": 8.0}
        assert context_length(info(**config, rope_parameters=rope), EngineOptions()) == 2048

    def test_a_request_of_the_stretched_length_is_served(self) -> None:
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
        engine = built_engine(model_info(llama(max_position_embeddings=64, rope_parameters=rope)), memory_gib=0.1)
        assert engine.max_model_len == 256
        assert len(ask(engine, range(3, 203), ignore_eos=True).token_ids) == 16
        engine.close()

    def test_the_tokenizer_and_no_limit_at_all(self) -> None:
        assert context_length(info(tokenizer(64)), EngineOptions()) == 64
        assert context_length(info(tokenizer(10**30)), EngineOptions()) == 131072
        assert context_length(info(), EngineOptions()) == 131072


def test_vocab_size() -> None:
    assert vocab_size(llama()) == 261
    assert vocab_size(object()) is None


def check(ids: list[int], *, supports: frozenset[str] = ALL_PARAMS, vocab: int | None = 50, **kwargs: Any) -> None:
    request = EngineRequest(request_id="r", input_ids=ids, sampling=SamplingParams(**{"max_tokens": 4, **kwargs}))
    check_request(request, max_model_len=10, supports=supports, vocab=vocab)


class TestCheck:
    def test_what_fits(self) -> None:
        check([0, 49])
        check([1] * 6)
        check([10**6], vocab=None)

    @pytest.mark.parametrize("ids", [[], [50], [-1], [3, 10**9]])
    def test_ids(self, ids: list[int]) -> None:
        with pytest.raises(BadRequest):
            check(ids)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("logit_bias", {49: 1.0, 50: -1.0}),
            ("allowed_token_ids", (3, 10**9)),
            ("logprob_token_ids", (50,)),
            ("stop_token_ids", (49, 50)),
        ],
    )
    def test_ids_in_parameters(self, name: str, value: Any) -> None:
        with pytest.raises(BadRequest, match=f"Invalid '{name}': token id .* does not exist") as caught:
            check([1], **{name: value})
        assert caught.value.param == name
        check([1], vocab=None, **{name: value})

    def test_the_length_of_prompt_and_text(self) -> None:
        with pytest.raises(ContextOverflow, match="11 tokens"):
            check([1] * 7)
        with pytest.raises(ContextOverflow):
            check([1] * 10, max_tokens=None)

    def test_only_what_differs_from_its_default_must_be_supported(self) -> None:
        few = frozenset({"temperature"})
        check([1], supports=few, temperature=0.5, top_p=1.0, logit_bias={}, extra={})
        with pytest.raises(UnsupportedParameter, match=r"top_p=0\.5") as caught:
            check([1], supports=few, top_p=0.5)
        assert caught.value.param == "top_p"

    def test_arguments_of_a_hook_are_for_engines_that_have_one(self) -> None:
        with pytest.raises(UnsupportedParameter, match="generate_kwargs") as caught:
            check([1], extra={"penalty_alpha": 0.6})
        assert caught.value.param == "generate_kwargs"
        check([1], supports=ALL_PARAMS | {"extra"}, extra={"penalty_alpha": 0.6})
