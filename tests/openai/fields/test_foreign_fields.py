"""Request keys of other servers: each is understood or refused by name, and misspelt keys are refused too."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from deployments.compat.legacy import GenerateBody
from deployments.openai.chat.schema import ChatBody
from deployments.openai.completions.schema import CompletionBody
from deployments.openai.embeddings import EmbeddingsBody
from deployments.openai.fields.constraint import ResponseFormat, StructuredOutputs
from deployments.openai.fields.fields import RequestObject
from deployments.openai.fields.other_servers import Harmless, Means, Refused, Spread, nearest
from deployments.openai.messages.schema import CountTokensBody, MessagesBody
from deployments.openai.responses.schema import ReasoningConfig, ResponsesBody
from deployments.openai.scores.schema import DecisionsBody, ScoreBody
from deployments.openai.tokens import DetokenizeBody, TokenizeBody
from deployments.openai.transcriptions.schema import TranscriptionBody, TranslationBody
from tests.openai.asking import CHAT, COMPLETIONS, PATHS, post, refusal, sampled
from tests.openai.conftest import Serve, Server
from tests.tiny import CHAT_TEMPLATE

SCHEMAS: dict[str, type[RequestObject]] = {
    "chat completions": ChatBody,
    "completions": CompletionBody,
    "responses": ResponsesBody,
    "messages": MessagesBody,
    "messages/count_tokens": CountTokensBody,
    "/generate": GenerateBody,
    "embeddings": EmbeddingsBody,
    "score": ScoreBody,
    "decisions": DecisionsBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
    "transcriptions": TranscriptionBody,
    "translations": TranslationBody,
}
NAMES = json.loads((Path(__file__).parent / "foreign_names.json").read_text())
FIELDS_PAGE = Path(__file__).parent.parent.parent.parent / "docs" / "reference" / "foreign_fields.md"


def names() -> Iterator[tuple[str, str, str, set[str]]]:
    for server, versions in NAMES.items():
        for version in versions:
            for route, found in version["routes"].items():
                yield server, version["version"], route, set(found)


@pytest.mark.parametrize(("server_name", "version", "route", "found"), list(names()))
def test_every_name_of_other_servers_is_known(server_name: str, version: str, route: str, found: set[str]) -> None:
    schema = ChatBody if route == "options" else SCHEMAS[route]
    known = set(schema.foreign) | set(schema.model_fields)
    if server_name == "clients":
        assert {
            name: nearest(name, frozenset(known)) for name in found - known if nearest(name, frozenset(known))
        } == {}
    else:
        assert found - known == set()


def test_names_that_are_another_routes_are_seldom_taken_for_misspellings() -> None:
    known = frozenset(set(ChatBody.foreign) | set(ChatBody.model_fields))
    everywhere = set().union(*(found for *_, found in names()))
    assert {name for name in everywhere - known if nearest(name, known)} == {"text_1", "text_2"}


def test_the_table_fits_the_schemas() -> None:
    inherited = {GenerateBody, MessagesBody, ResponsesBody}
    for schema in (*SCHEMAS.values(), ResponseFormat, StructuredOutputs, ReasoningConfig):
        own = {field.alias or name for name, field in schema.model_fields.items()}
        assert schema in inherited or not set(schema.foreign) & own, schema
        for name, row in schema.foreign.items():
            if isinstance(row, Means):
                assert {target.partition(".")[0] for target in row.target.split(", ")} <= own, (schema, name)


@pytest.mark.parametrize("path", PATHS)
def test_what_we_do_not_have_is_refused_also_where_nothing_is_sampled(server: Server, path: str) -> None:
    schema = ChatBody if path == CHAT else CompletionBody
    for name, row in schema.foreign.items():
        if isinstance(row, Refused):
            error = refusal(server, path, **{name: {"asks": "for something"}}, temperature=0)
            assert (error["param"], error["code"]) == (name, "unsupported_parameter")
            assert f"'{name}'" in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_values_that_ask_for_nothing_are_accepted(server: Server, path: str) -> None:
    rows = (ChatBody if path == CHAT else CompletionBody).foreign
    before = sampled(server, path)
    longest = max(len(row.neutral) for row in rows.values() if isinstance(row, Refused))
    for index in range(longest):
        neutral = {
            name: row.neutral[index]
            for name, row in rows.items()
            if isinstance(row, Refused) and index < len(row.neutral)
        }
        assert sampled(server, path, **neutral) == before
    assert sampled(server, path, **dict.fromkeys(rows)) == before
    harmless = {name: {"any": "thing"} for name, row in rows.items() if isinstance(row, Harmless)}
    assert sampled(server, path, **harmless) == before


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# Fields of others, and those of ours that ask for the same.
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"n_predict": 3}, {"max_tokens": 3}),
    ({"num_predict": 3}, {"max_tokens": 3}),
    ({"max_new_tokens": 3}, {"max_tokens": 3}),
    ({"max_new_tokens": 3, "max_tokens": 3}, {"max_tokens": 3}),
    ({"max_completion_tokens": 3}, {"max_tokens": 3}),
    ({"min_new_tokens": 2}, {"min_tokens": 2}),
    ({"typical": 0.9}, {"typical_p": 0.9}),
    ({"stop_strings": ["x"]}, {"stop": ["x"]}),
    ({"stop_sequences": ["x"]}, {"stop": ["x"]}),
    ({"stop_words": ["x"]}, {"stop": ["x"]}),
    ({"allowed_tokens": [97]}, {"allowed_token_ids": [97]}),
    ({"sampling_seed": 7}, {"seed": 7}),
    ({"random_seed": 7}, {"seed": 7}),
    ({"seed": -1}, {}),
    ({"sampling_seed": -1}, {}),
    ({"regex": "a+"}, {"guided_regex": "a+"}),
    ({"json_schema": SCHEMA}, {"guided_json": SCHEMA}),
    ({"json_schema": json.dumps(SCHEMA)}, {"guided_json": SCHEMA}),
    ({"format": "json"}, {"response_format": {"type": "json_object"}}),
    ({"format": SCHEMA}, {"guided_json": SCHEMA}),
    ({"format": ""}, {}),
    ({"grammar": ""}, {}),
    ({"grammar": {"type": "json", "value": SCHEMA}}, {"guided_json": SCHEMA}),
    ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, {"guided_json": SCHEMA}),
    ({"grammar": {"type": "regex", "value": "a+"}}, {"guided_regex": "a+"}),
    ({"do_sample": False}, {"temperature": 0}),
    ({"do_sample": False, "temperature": 0.0}, {"temperature": 0}),
    ({"do_sample": True}, {"temperature": 1}),
    ({"do_sample": True, "temperature": 0.3}, {"temperature": 0.3}),
    ({"repeat_penalty": 1.0}, {}),
    ({"repeat_penalty": 1.2, "repeat_last_n": -1}, {"repetition_penalty": 1.2}),
    ({"repeat_last_n": 64}, {}),
    ({"penalize_nl": False}, {}),
    ({"truncate": False}, {}),
    ({"extra_body": {"top_k": 5, "n_predict": 3}}, {"top_k": 5, "max_tokens": 3}),
    ({"options": {"num_predict": 3, "temperature": 0.5, "num_ctx": 4096}}, {"max_tokens": 3, "temperature": 0.5}),
    (
        {"options": {"stop": ["x"], "repeat_penalty": 1.2, "repeat_last_n": -1}},
        {"stop": "x", "repetition_penalty": 1.2},
    ),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("theirs", "ours"), SAME)
def test_what_is_understood(server: Server, path: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert sampled(server, path, **theirs) == sampled(server, path, **ours)


def test_what_is_understood_by_one_route(server: Server) -> None:
    alternatives = sampled(server, CHAT, n_probs=2)
    assert alternatives == sampled(server, CHAT, logprobs=True, top_logprobs=2)
    assert sampled(server, COMPLETIONS, n_probs=2) == sampled(server, COMPLETIONS, logprobs=2)
    assert sampled(server, CHAT, n_predict=-1) == sampled(server, CHAT)
    assert refusal(server, COMPLETIONS, n_predict=-1)["param"] == "n_predict"
    assert post(server, COMPLETIONS, return_full_text=True).json()["choices"][0]["text"].startswith("abcdef")
    assert len(post(server, CHAT, num_return_sequences=2).json()["choices"]) == 2
    assert post(server, CHAT, truncate=5).json()["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"enable_thinking": False}, "<enable_thinking>False</enable_thinking>"),
        ({"think": True}, "<enable_thinking>True</enable_thinking>\n<thinking>True</thinking>"),
        ({"think": "low"}, "<reasoning_effort>low</reasoning_effort>"),
        ({"thinking": {"type": "disabled"}}, "<thinking>False</thinking>"),
        ({"reasoning": {"effort": "high"}}, "<reasoning_effort>high</reasoning_effort>"),
        ({"reasoning": {"enabled": False}}, "<enable_thinking>False</enable_thinking>"),
        ({"enable_thinking": False, "chat_template_kwargs": {"a": 1}}, "<a>1</a>\n<enable_thinking>False"),
    ],
)
def test_fields_that_the_template_reads(server: Server, fields: dict[str, Any], expected: str) -> None:
    assert expected in post(server, CHAT, return_prompt_text=True, **fields).json()["prompt_text"]


THINKING = "{% if enable_thinking is defined and not enable_thinking %}<off>{% endif %}"
KIMI = "{% if thinking is defined and not thinking %}<off>{% endif %}"


@pytest.fixture(scope="module")
def templates(serve: Serve) -> Server:
    """Models whose templates read one of the two variables for thinking, or none."""
    loader = "tests.openai.tiny_models:load_model"
    sources = {"qwen": THINKING + CHAT_TEMPLATE, "kimi": KIMI + CHAT_TEMPLATE, "plain": CHAT_TEMPLATE}
    return serve([{"id": id_, "loader": loader, "kwargs": {"template": source}} for id_, source in sources.items()])


def chat(server: Server, model: str, path: str = CHAT, **fields: Any) -> requests.Response:
    body = {"model": model, **PATHS[CHAT], **fields}
    return requests.post(server.url + path, json=body, timeout=60)


@pytest.mark.parametrize("path", ["/v1/chat/completions/render", "/tokenize"])
def test_thinking_is_switched_by_the_variable_that_the_template_reads(templates: Server, path: str) -> None:
    counts = {}
    for model, fields in (
        ("qwen", {"enable_thinking": False}),
        ("qwen", {"think": False}),
        ("kimi", {"thinking": {"type": "disabled"}}),
        ("kimi", {"think": False}),
    ):
        changed = chat(templates, model, path, **fields)
        assert changed.status_code == 200, changed.text
        assert "x-troupe-ignored" not in changed.headers
        counts[model, str(fields)] = changed.json()["count"] - chat(templates, model, path).json()["count"]
    assert set(counts.values()) == {len("<off>")}
    for model, fields in (("kimi", {"enable_thinking": False}), ("plain", {"think": True})):
        refused = chat(templates, model, path, **fields)
        (key,) = fields
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, key)


def test_variables_that_the_template_does_not_read_are_listed(templates: Server) -> None:
    fields = {"chat_template_kwargs": {"enable_thinking": False, "custom": 1}, "reasoning_effort": "low"}
    path = "/v1/chat/completions/render"
    assert chat(templates, "qwen", path, **fields).headers["x-troupe-ignored"] == (
        "chat_template_kwargs.custom,reasoning_effort"
    )
    response = chat(templates, "plain", max_tokens=1, reasoning_effort="low")
    assert (response.status_code, response.headers["x-troupe-ignored"]) == (200, "reasoning_effort")


def test_defaults_give_way_to_what_a_request_sends(serve: Serve) -> None:
    defaults = {"logprobs": True, "max_tokens": 2, "response_format": {"type": "json_object"}, "temperature": 0}
    loader = "tests.openai.scripted:load_model"
    server = serve([{"id": "org/scripted", "loader": loader, "api": {"default_params": defaults}}])
    assert sampled(server, CHAT).max_tokens == 2
    for fields in ({"max_completion_tokens": 5}, {"n_predict": 5}, {"max_tokens": 5}):
        assert sampled(server, CHAT, **fields).max_tokens == 5
    regex = sampled(server, CHAT, regex="a+")
    assert regex.grammar is not None
    assert (regex.grammar.kind, regex.temperature) == ("regex", 0)
    assert sampled(server, CHAT, do_sample=True).temperature == 1
    # A response has the limit under another name, and its format in another object.
    for fields, limit in (({}, 2), ({"max_output_tokens": 5}, 5), ({"text": {"format": {"type": "text"}}}, 2)):
        body = {"model": "org/scripted", "input": "abcdef", **fields}
        answer = requests.post(server.url + "/v1/responses", json=body, timeout=10)
        assert json.loads(answer.headers["x-troupe-sampling"])["max_tokens"] == limit
    # A default of one route is not blamed on the clients of another, on which the field has another type.
    assert (sampled(server, CHAT).logprobs, sampled(server, COMPLETIONS).logprobs) == (0, None)


@pytest.mark.parametrize(
    ("path", "fields", "param", "said"),
    [
        (CHAT, {"n_predict": 3, "max_tokens": 4}, "n_predict", "'max_tokens'"),
        (CHAT, {"n_predict": 3, "max_new_tokens": 4}, "max_new_tokens", "'n_predict'"),
        (CHAT, {"options": {"num_predict": 3}, "max_tokens": 4}, "options.num_predict", "'max_tokens'"),
        (CHAT, {"options": {"temperature": 0}, "temperature": 1}, "options.temperature", "'temperature'"),
        (CHAT, {"do_sample": False, "temperature": 0.7}, "do_sample", "'temperature'"),
        (CHAT, {"do_sample": True, "temperature": 0}, "do_sample", "greedy"),
        (CHAT, {"typical": 0.5, "typical_p": 0.6}, "typical", "'typical_p'"),
        (CHAT, {"think": True, "chat_template_kwargs": {"thinking": False}}, "think", "chat_template_kwargs.thinking"),
        (CHAT, {"regex": "a", "guided_regex": "b"}, "regex", "'guided_regex'"),
        # What is wrong with a value is said of the key that was sent.
        (CHAT, {"n_predict": -5}, "n_predict", "-5"),
        (CHAT, {"n_predict": "many"}, "n_predict", "many"),
        (CHAT, {"options": {"num_predict": []}}, "options.num_predict", "[]"),
        (CHAT, {"options": {"mirostat": 2}}, "options.mirostat", "mirostat"),
        (CHAT, {"extra_body": {"min_pp": 0.1}}, "extra_body.min_pp", "min_p"),
        (CHAT, {"extra_body": {"top_k": 5}, "top_k": 6}, "extra_body.top_k", "'top_k'"),
        (CHAT, {"options": 5}, "options", "object"),
        (CHAT, {"typical": 7}, "typical", "7"),
        (CHAT, {"num_return_sequences": 2000}, "num_return_sequences", "2000"),
        (CHAT, {"n_probs": 500}, "n_probs", "20"),
        (CHAT, {"min_new_tokens": 9, "max_tokens": 3}, "min_new_tokens", "9"),
        (CHAT, {"json_schema": "{"}, "json_schema", "JSON schema"),
        (CHAT, {"grammar": 'root ::= "a"'}, "grammar", "structured_outputs.grammar"),
        (CHAT, {"ebnf": 'root ::= "a"'}, "ebnf", "structured_outputs.grammar"),
        (CHAT, {"format": "xml"}, "format", "json"),
        (CHAT, {"repeat_penalty": 1.2}, "repeat_penalty", "repetition_penalty"),
        (CHAT, {"repeat_penalty": 1.2, "repeat_last_n": 64}, "repeat_penalty", "repeat_last_n"),
        (CHAT, {"presence_penalty": 1, "repeat_last_n": 64}, "repeat_last_n", "all tokens"),
        (CHAT, {"repetition_penalty": 1.2, "penalize_nl": False}, "penalize_nl", "line ends"),
        (CHAT, {"think": "perhaps"}, "think", "boolean"),
        (CHAT, {"reasoning": {"max_tokens": 5}}, "reasoning", "effort"),
        (CHAT, {"truncate": True}, "truncate", "truncate_prompt_tokens"),
        (CHAT, {"max_length": 20}, "max_length", "max_tokens"),
        (CHAT, {"lora_path": "a"}, "lora_path", "model"),
        (COMPLETIONS, {"think": True}, "think", "/v1/chat/completions"),
        (COMPLETIONS, {"messages": [{}]}, "messages", "/v1/chat/completions"),
        (COMPLETIONS, {"tools": [{}]}, "tools", "/v1/chat/completions"),
        (COMPLETIONS, {"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens", "'max_tokens'"),
    ],
)
def test_what_cannot_be_honored(server: Server, path: str, fields: dict[str, Any], param: str, said: str) -> None:
    error = refusal(server, path, **fields)
    assert error["param"] == param
    assert f"'{param}'" in error["message"]
    assert said in error["message"]


def table() -> str:
    """The table of docs/reference/foreign_fields.md. `python -m tests.openai.fields.test_foreign_fields` writes it."""
    grouped: dict[tuple[int, str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for route, schema in SCHEMAS.items():
        for name, row in schema.foreign.items():
            grouped[_described(row)][name].append(route)
    lines: dict[tuple[int, str, str, str], list[str]] = defaultdict(list)
    for described, found in grouped.items():
        for name, routes in found.items():
            lines[(*described, ", ".join(routes).replace(_ALL, "text generation"))].append(f"`{name}`")
    head = ["| keys | on | what they do |", "|---|---|---|"]
    return "\n".join(
        head + [f"| {', '.join(sorted(keys))} | {routes} | {text} |" for (*_, text, routes), keys in _ordered(lines)]
    )


_ALL = "chat completions, completions, responses, messages, /generate"


def _ordered(lines: dict[Any, list[str]]) -> list[tuple[Any, list[str]]]:
    return sorted(((order, keys) for order, keys in lines.items()), key=lambda line: (line[0][0], line[0][1:], line[1]))


def _described(row: Any) -> tuple[int, str, str]:
    if isinstance(row, Means):
        return 0, row.target, f"understood as {', '.join(f'`{target}`' for target in row.target.split(', '))}"
    if isinstance(row, Spread):
        return 1, "", "its keys are read as if they stood beside it"
    if isinstance(row, Refused):
        neutral = ", ".join(f"`{json.dumps(value)}`" for value in row.neutral)
        accepted = f"refused unless {neutral}" if neutral else "refused"
        return 2, row.instead, accepted if row.instead == "leave it out" else f"{accepted}: {row.instead}"
    return 3, "", "accepted, no effect on an answer"


BEGIN, END = "<!-- foreign fields: begin -->", "<!-- foreign fields: end -->"


def test_the_documentation_has_the_table() -> None:
    shown = FIELDS_PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == table(), "python -m tests.openai.fields.test_foreign_fields"


if __name__ == "__main__":
    before, _, rest = FIELDS_PAGE.read_text().partition(BEGIN)
    FIELDS_PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
