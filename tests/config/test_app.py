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
        (
            {"models": [model(engine={"max_row": 3})]},
            "models[0].engine.max_row: unknown key (did you mean 'max_rows'?)",
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
        ({"models": [model(engine={"max_rows": 0})]}, "models[0].engine: max_rows should be at least 1; got 0"),
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


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"temprature": 0}, "temprature: unknown request field (did you mean 'temperature'?)"),
        ({"my_field": 0}, "my_field: unknown request field"),
        ({"temperature": -1}, "temperature: Invalid 'temperature'"),
        ({"temperature": "hot"}, "temperature: Invalid 'temperature'"),
        ({"temperature": 1e39}, "temperature: Invalid 'temperature'"),
        ({"max_tokens": "many"}, "max_tokens: Invalid 'max_tokens'"),
        ({"stop": 5}, "stop: Invalid 'stop'"),
        ({"n_predict": 5}, "n_predict: another server's field; this server has max_tokens"),
        ({"mirostat": 1}, "mirostat: not supported"),
        ({"user": "me"}, "user: has no effect"),
        ({"messages": []}, "messages: a request says this itself"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format: Unknown field"),
        ({"response_format": {"type": "json_object", "mine": {}}}, "response_format: unknown key"),
        ({"response_format": {"type": "xml"}}, "response_format: Invalid 'response_format.type'"),
        ({"structured_outputs": {}}, "structured_outputs: Invalid 'structured_outputs'"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens: Invalid 'min_tokens'"),
        ({"prompt_logprobs": 50}, "prompt_logprobs: Invalid 'prompt_logprobs'"),
        ({"logprobs": "x"}, "logprobs: Invalid 'logprobs'"),
        ({"n": 2000}, "n: Invalid 'n'"),
    ],
)
def test_wrong_defaults_are_found_at_start(defaults: dict[str, Any], said: str) -> None:
    args = {"models": [model(id="first"), model(id="second", api={"default_params": {"top_p": 0.5, **defaults}})]}
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert f"models[1].api.default_params.{said}" in str(caught.value)


@pytest.mark.parametrize(
    "defaults",
    [
        {"temperature": 0, "max_tokens": 512, "top_k": 40, "repetition_penalty": 1.3},
        {"logprobs": True, "top_logprobs": 2},
        {"logprobs": 2},
        {"response_format": {"type": "json_object"}},
        {"response_format": "text", "language": "en", "timestamp_granularities": ["word"]},
        {"chat_template_kwargs": {"enable_thinking": False}, "seed": -1},
        {"normalize": True},
    ],
)
def test_right_defaults(defaults: dict[str, Any]) -> None:
    assert parse_args({"models": [model(api={"default_params": defaults})]}).models[0].api.default_params == defaults
