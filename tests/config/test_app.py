"""The YAML's schema: what it accepts, and how it says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.config.app import AppArgs, parse_args, unknown_model
from deployments.core.errors import ConfigError


def model(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "loader": "model_loaders.demo:load_model", **fields}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"models": [model()], "max_models": 2}, "max_models: unknown key (did you mean 'max_models_per_replica'?)"),
        ({"models": [model(loadr="x")]}, "models[0].loadr: unknown key (did you mean 'loader'?)"),
        ({"models": [model(engine={"max_rows": 3})]}, "models[0].engine: max_rows is now max_batch_size"),
        ({"models": [model(engine={"kind": "rows"})]}, "models[0].engine: kind rows is now continuous_batching"),
        ({"models": [model(engine={"kind": "one_shot"})]}, "models[0].engine: kind one_shot is now generate"),
        (
            {"models": [model(engine={"max_batch_siz": 3})]},
            "models[0].engine.max_batch_siz: unknown key (did you mean 'max_batch_size'?)",
        ),
        (
            {"models": [model(api={"tool_prser": 1})]},
            "models[0].api.tool_prser: unknown key (did you mean 'tool_parser'?",
        ),
        ({"models": [model()], "api": {"api_key": []}}, "api.api_key: unknown key (did you mean 'api_keys'?)"),
        ({"models": [{"id": "a"}]}, "models[0].loader: missing"),
        ({"models": []}, "models: "),
        (
            {"models": [model(loader="model_loaders.triton:load_model")]},
            "models[0].loader: this loader is now model_loaders.backends.triton:load_model",
        ),
        ({}, "models: missing"),
        ({"models": [model(engine={"kind": "fast"})]}, "models[0].engine.kind: "),
        (
            {"models": [model(engine={"max_batch_size": 0})]},
            "models[0].engine: max_batch_size should be at least 1; got 0",
        ),
        ({"models": [model(engine={"memory_gib": -1})]}, "models[0].engine: memory_gib should be more than 0; got -1"),
        (
            {"models": [model(engine={"torch_compile": "fast"})]},
            "models[0].engine: torch_compile should be one of default, reduce-overhead",
        ),
        ({"models": [model(), model()]}, "'a' names both model 'a' and model 'a'"),
        ({"models": [model(), model(id="b", aliases=["a"])]}, "'a' names both model 'a' and model 'b'"),
        ({"models": [model(pinned=True), model(id="b")]}, "1 pinned models (a) leave no room"),
    ],
)
def test_faults_name_the_key_and_the_fix(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert said in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [model(loadr="x", engin={})], "maxx": 1})
    assert len(str(caught.value).splitlines()) == 4


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    args: AppArgs = parse_args({"models": [model(), model(id="org/b")]})
    assert "Configured: a, org/b." in str(unknown_model("c", args))
