"""The table of request fields: each is honored, refused by name, or bookkeeping. None is missing."""

from __future__ import annotations

import json
from typing import Any

import pytest
import requests
from openai.types import completion_create_params as completion_params
from openai.types import decision_create_params as decision_params
from openai.types.audio import transcription_create_params as transcription_params
from openai.types.audio import translation_create_params as translation_params
from openai.types.chat import completion_create_params as chat_params

from deployments.core.calls import SamplingParams
from deployments.openai.chat.schema import ChatBody
from deployments.openai.completions.schema import CompletionBody
from deployments.openai.fields.fields import RequestBody
from deployments.openai.scores.schema import DecisionsBody
from deployments.openai.transcriptions.schema import TranscriptionBody, TranslationBody
from tests.openai import scripted
from tests.openai.conftest import Server

VLLM_BOTH = """
    use_beam_search top_k min_p repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output
    ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids prompt_logprobs logprob_token_ids bad_words add_special_tokens response_format structured_outputs
    guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern
    priority request_id session_id return_tokens_as_token_ids return_token_ids routed_experts_prompt_start
    return_token_offsets return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs
    repetition_detection thinking_token_budget stream_interval
"""
VLLM_CHAT = """
    echo add_generation_prompt continue_final_message documents chat_template chat_template_kwargs media_io_kwargs
    mm_processor_kwargs include_reasoning return_prompt_text best_of
"""
VLLM_COMPLETIONS = "prompt_embeds"


def known(schema: type[RequestBody]) -> set[str]:
    return set(schema.model_fields) | set(schema.foreign)


def test_no_field_of_a_chat_is_missing() -> None:
    openai_fields = set(chat_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert openai_fields | set(f"{VLLM_BOTH} {VLLM_CHAT}".split()) <= known(ChatBody)


def test_no_field_of_a_completion_is_missing() -> None:
    openai_fields = set(completion_params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert openai_fields | set(f"{VLLM_BOTH} {VLLM_COMPLETIONS}".split()) <= known(CompletionBody)


def test_no_field_of_a_decision_is_missing() -> None:
    openai_fields = set(decision_params.DecisionCreateParams.__annotations__)
    assert openai_fields <= known(DecisionsBody)


VLLM_AUDIO = """
    hotwords stream stream_include_usage stream_continuous_usage_stats vllm_xargs to_language use_beam_search n
    length_penalty include_stop_str_in_output top_p top_k min_p seed frequency_penalty repetition_penalty penalty_decay
    presence_penalty max_completion_tokens language
"""


def test_no_field_of_a_recording_is_missing() -> None:
    vllm = set(VLLM_AUDIO.split())
    openai_fields = set(transcription_params.TranscriptionCreateParamsBase.__annotations__)
    assert openai_fields | vllm <= known(TranscriptionBody)
    assert set(translation_params.TranslationCreateParams.__annotations__) | vllm <= known(TranslationBody)


@pytest.mark.parametrize("schema", [ChatBody, CompletionBody, DecisionsBody, TranscriptionBody, TranslationBody])
def test_each_field_has_one_fate(schema: type[RequestBody]) -> None:
    assert not set(schema.foreign) & set(schema.model_fields)


PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "abcdef"}]},
    "/v1/completions": {"prompt": "abcdef"},
}


def post(server: Server, path: str, **fields: Any) -> requests.Response:
    body = {"model": "org/scripted", **PATHS[path], **fields}
    return requests.post(server.url + path, json=body, timeout=10)


def sampled(server: Server, path: str, **fields: Any) -> SamplingParams:
    """The parameters that reached the engine."""
    response = post(server, path, **fields)
    assert response.status_code == 200, response.text
    assert "x-troupe-ignored" not in response.headers
    (engine,) = [
        each for each in scripted.ENGINES if each.seen and each.seen[-1].request_id.startswith(response.json()["id"])
    ]
    return engine.seen[-1].sampling


REACHES_THE_ENGINE: list[tuple[str, Any, str, Any]] = [
    ("temperature", 0.5, "temperature", 0.5),
    ("temperature", 0, "temperature", 0.0),
    ("temperature", "0.5", "temperature", 0.5),
    ("top_p", 0.5, "top_p", 0.5),
    ("top_k", 5, "top_k", 5),
    ("top_k", -1, "top_k", 0),
    ("top_k", 5.0, "top_k", 5),
    ("min_p", 0.1, "min_p", 0.1),
    ("typical_p", 0.9, "typical_p", 0.9),
    ("repetition_penalty", 1.1, "repetition_penalty", 1.1),
    ("presence_penalty", 0.5, "presence_penalty", 0.5),
    ("frequency_penalty", -0.5, "frequency_penalty", -0.5),
    ("logit_bias", {"97": -100, "98": 5}, "logit_bias", {97: -100.0, 98: 5.0}),
    ("allowed_token_ids", [97], "allowed_token_ids", (97,)),
    ("bad_words", ["x"], "bad_words", ("x",)),
    ("stop", "x", "stop", ("x",)),
    ("stop", ["x", "", "y"], "stop", ("x", "y")),
    ("stop_token_ids", [97], "stop_token_ids", (97,)),
    ("include_stop_str_in_output", True, "include_stop_str_in_output", True),
    ("ignore_eos", True, "ignore_eos", True),
    ("min_tokens", 2, "min_tokens", 2),
    ("max_tokens", 3, "max_tokens", 3),
    ("seed", -7, "seed", -7),
    ("prompt_logprobs", 2, "prompt_logprobs", 2),
    ("skip_special_tokens", False, "skip_special_tokens", False),
    ("num_beams", 2, "num_beams", 2),
    ("generate_kwargs", {"penalty_alpha": 0.6}, "extra", {"penalty_alpha": 0.6}),
]
DEFAULTS = {field: getattr(SamplingParams(), field) for field in SamplingParams.__dataclass_fields__}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("field", "given", "name", "expected"), REACHES_THE_ENGINE)
def test_fields_that_reach_the_engine(
    server: Server, path: str, field: str, given: Any, name: str, expected: Any
) -> None:
    assert getattr(sampled(server, path, **{field: given}), name) == expected


@pytest.mark.parametrize("path", PATHS)
def test_defaults(server: Server, path: str) -> None:
    sampling = sampled(server, path)
    changed = {name for name, value in DEFAULTS.items() if getattr(sampling, name) != value}
    assert changed == {"max_tokens"}
    assert sampling.max_tokens == (16 if path == "/v1/completions" else 2000 - len("<user>abcdef</user>\n<assistant>"))


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SOURCE = json.dumps(SCHEMA, separators=(",", ":"))
GRAMMARS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_object"}}, "json_object", ""),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        "json_schema",
        SOURCE,
    ),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SOURCE),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, "json_schema", SOURCE),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, "json_schema", SOURCE),
    ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SOURCE),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SOURCE),
    ({"structured_outputs": {"regex": "a+"}}, "regex", "a+"),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]'),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, "lark", 'start: "a"'),
    ({"structured_outputs": {"json_object": True}}, "json_object", ""),
    ({"guided_json": SCHEMA}, "json_schema", SOURCE),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]'),
    ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "kind", "source"), GRAMMARS)
def test_constraints(server: Server, path: str, fields: dict[str, Any], kind: str, source: str) -> None:
    grammar = sampled(server, path, **fields).grammar
    assert grammar is not None
    assert (grammar.kind, grammar.source) == (kind, source)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json": None}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format.shema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schem": {}}}},
            "response_format.json_schema.schem",
        ),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": {}}}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        (
            {"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {"type": "object"}}}},
            "response_format.schema",
        ),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
    ],
)
def test_constraints_that_are_none(server: Server, path: str, fields: dict[str, Any], param: str) -> None:
    response = post(server, path, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_template_fields(server: Server) -> None:
    fields = {
        "chat_template_kwargs": {"enable_thinking": False},
        "documents": [{"text": "d"}],
        "reasoning_effort": "low",
        "return_prompt_text": True,
    }
    text = post(server, "/v1/chat/completions", **fields).json()["prompt_text"]
    assert "<enable_thinking>False</enable_thinking>" in text
    assert "<documents>[{'text': 'd'}]</documents>" in text
    assert "<reasoning_effort>low</reasoning_effort>" in text
    closed = post(server, "/v1/chat/completions", add_generation_prompt=False, return_prompt_text=True).json()
    assert closed["prompt_text"] == "<user>abcdef</user>\n"


def test_the_affinity_of_a_conversation() -> None:
    from deployments.openai.chat.plan import conversation_key

    first = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    later = [*first, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    other = [{"role": "system", "content": "s"}, {"role": "user", "content": "z"}]
    assert conversation_key("m", first) == conversation_key("m", later)
    assert conversation_key("m", first) != conversation_key("m", other)
    assert conversation_key("m", first) != conversation_key("n", first)
    assert conversation_key("m", first, "me") == conversation_key("m", later, "me")
    assert conversation_key("m", first, "me") != conversation_key("m", first, "you")


@pytest.mark.parametrize("path", PATHS)
def test_named_alternatives(server: Server, path: str) -> None:
    logprobs = {"logprobs": True} if "chat" in path else {"logprobs": 0}
    asked = sampled(server, path, logprob_token_ids=[97, 98], **logprobs)
    assert (asked.logprobs, asked.logprob_token_ids) == (0, (97, 98))
    alone = post(server, path, logprob_token_ids=[97])
    assert (alone.status_code, alone.json()["error"]["param"]) == (400, "logprob_token_ids")


@pytest.mark.parametrize("path", PATHS)
def test_a_truncated_prompt(server: Server, path: str) -> None:
    whole = post(server, path, return_token_ids=True).json()
    cut = post(server, path, return_token_ids=True, truncate_prompt_tokens=5).json()
    assert cut["usage"]["prompt_tokens"] == 5
    ids = [each.get("prompt_token_ids") or each["choices"][0]["prompt_token_ids"] for each in (whole, cut)]
    assert ids[1] == ids[0][-5:]
    for enough in (-1, 1900):
        assert post(server, path, truncate_prompt_tokens=enough).json()["usage"] == whole["usage"]
    nothing = post(server, path, truncate_prompt_tokens=0)
    assert (nothing.status_code, nothing.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_a_prompt_truncated_to_the_context(server: Server) -> None:
    body = {"model": "org/scripted", "prompt": "x" * 3000, "max_tokens": 100}
    url = f"{server.url}/v1/completions"
    assert requests.post(url, json=body, timeout=10).status_code == 400
    answer = requests.post(url, json={**body, "truncate_prompt_tokens": -1}, timeout=10).json()
    assert answer["usage"]["prompt_tokens"] == 1900
    echoed = requests.post(url, json={**body, "truncate_prompt_tokens": 7, "echo": True, "max_tokens": 0}, timeout=10)
    assert echoed.json()["choices"][0]["text"] == "x" * 7
