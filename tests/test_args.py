"""Defaults of request fields and names of parsers are checked when the configuration is read."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.args import read_args
from deployments.core.errors import ConfigError


def model(**more: Any) -> dict[str, Any]:
    return {"id": "a", "loader": "m:f", **more}


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
        ({"messages": []}, "messages: a request sets this itself"),
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
        read_args(args)
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
    assert read_args({"models": [model(api={"default_params": defaults})]}).models[0].api.default_params == defaults


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tool_parser": "hermess"}, "tool_parser: there is no parser 'hermess' (did you mean 'hermes'?); known: "),
        ({"reasoning_parser": "deepseek_r1"}, "reasoning_parser: there is no parser 'deepseek_r1'; known: think, "),
    ],
)
def test_a_parser_that_does_not_exist(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_args({"models": [model(api=options)]}, source="my.yaml")
    assert f"my.yaml:\n  models[0].api.{said}" in str(caught.value)
