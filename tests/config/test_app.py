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
        (
            {"models": [model(engine={"memory_gib": -1})]},
            "models[0].engine: memory_gib should be more than 0, and finite; got -1",
        ),
        (
            {"models": [model(engine={"torch_compile": "fast"})]},
            "models[0].engine: torch_compile should be one of default, reduce-overhead",
        ),
        ({"models": [model(), model()]}, "two models have the id 'a'; give one of them another"),
        ({"models": [model(aliases=["b", "a"])]}, "model 'a' has the name 'a' twice"),
        ({"models": [model(), model(id="b", aliases=["a"])]}, "'a' names both model 'a' and model 'b'"),
        (
            {"models": [model(engine={"memory_gib": float("nan")})]},
            "models[0].engine.memory_gib: input should be a finite",
        ),
        ({"models": [model(engine={"prefix_cache_gib": float("inf")})]}, "prefix_cache_gib: input should be a finite"),
        ({"models": [model(load_timeout_s=float("inf"))]}, "models[0].load_timeout_s: input should be a finite"),
        ({"models": [model()], "api": {"heartbeat_seconds": float("nan")}}, "api.heartbeat_seconds: input should be"),
        ({"models": [model()], "stream_interval_ms": float("inf")}, "stream_interval_ms: input should be a finite"),
        (
            {"models": [model(engine={"max_batch_size": True})]},
            "models[0].engine.max_batch_size: write a number (got true)",
        ),
        ({"models": [model(engine={"threads": False})]}, "models[0].engine.threads: write a number (got false)"),
        ({"models": [model(idle_unload_s=True)]}, "models[0].idle_unload_s: write a number (got true)"),
        ({"models": [model()], "max_concurrent_requests": True}, "max_concurrent_requests: write a number (got true)"),
        ({"models": [model()], "api": {"max_choices": True}}, "api.max_choices: write a number (got true)"),
        (
            {"models": [model()], "pools": {"p": {"models": ["a"], "replicas": True}}},
            "pools.p.replicas: write a number (got true)",
        ),
        ({"models": [model(id=" a")]}, "models[0].id: remove the white space around ' a'"),
        ({"models": [model(aliases=["b\t"])]}, "models[0].aliases: remove the white space around 'b\\t'"),
        ({"models": [model(aliases=[""])]}, "models[0].aliases: a name is empty"),
        (
            {"models": [model(engine={"kind": "continuous_batching", "static_cache": True})]},
            "models[0].engine: static_cache needs the kind generate",
        ),
        (
            {"models": [model(api={"allow_request_chat_template": True})]},
            "models[0].api.allow_request_chat_template: unknown key (it belongs in args.api)",
        ),
        (
            {"models": [model(max_batch_size=3)]},
            "models[0].max_batch_size: unknown key (it belongs in args.models[].engine)",
        ),
        ({"models": [model()], "pinned": True}, "pinned: unknown key (it belongs in args.models[])"),
        ({"models": [model()], "tool_parser": "x"}, "tool_parser: unknown key (it belongs in args.models[].api)"),
        ({"models": [model(pinned=True), model(id="b")]}, "1 pinned models (a) leave no room"),
    ],
)
def test_faults_name_the_key_and_the_fix(args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    assert said in str(caught.value)


def test_booleans_stay_booleans() -> None:
    entry = model(pinned=True, kwargs={"n": True}, engine={"deterministic": True, "pack_linears": False})
    args = parse_args({"models": [entry], "api": {"stream_usage": True}})
    assert args.models[0].engine.deterministic
    assert args.models[0].kwargs == {"n": True}


def test_the_known_keys_are_those_of_the_section() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [model(api={"zzz": 1})]})
    assert "(known: merge_consecutive_roles, default_params, pooling, " in str(caught.value)


def test_a_fault_of_the_whole_does_not_show_the_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [model(pinned=True), model(id="b")], "api": {"api_keys": ["secret"]}})
    assert "secret" not in str(caught.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args({"models": [model(loadr="x", engin={})], "maxx": 1})
    assert len(str(caught.value).splitlines()) == 4


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    args: AppArgs = parse_args({"models": [model(), model(id="org/b")]})
    assert "This server has: a, org/b." in str(unknown_model("c", args.models))
