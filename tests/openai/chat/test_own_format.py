"""Calls forced in the model's own format, limited reasoning, and constraints beside both, through the real engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from tests.openai.conftest import Serve
from tests.openai.saying import say

EACH = "{% for c in m.tool_calls or [] %}"
ARGUMENT = "{% for k, v in c.function.arguments.items() %}"
FORMS = {
    "tags": EACH + "<do>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</do>{% endfor %}",
    "arguments": EACH
    + "<run={{ c.function.name }}>\n"
    + ARGUMENT
    + "<arg={{ k }}>\n{{ v }}\n</arg>\n{% endfor %}</run>\n"
    "{% endfor %}",
    "python": "{% if m.tool_calls %}<|py|>[" + EACH + "{{ c.function.name }}(" + ARGUMENT + "{{ k }}={{ v | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]<|/py|>"
    "{% endif %}",
}
CHANNELS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %}"
    "{% set f = m.tool_calls[0].function %} to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>{% else %}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content or '' }}{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
CHANNEL_TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "kind": {"enum": ["x", "y"]}},
                "required": ["a", "kind"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "rest", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
    },
]
STRICT = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
NAMED: Any = {"type": "function", "function": {"name": "get"}}
THOUGHTS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"


def template(calls: str, thoughts: str = THOUGHTS) -> str:
    return (
        "{% if reasoning_effort %}Think {{ reasoning_effort }}.{% endif %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        + thoughts
        + "{{ m.content or '' }}"
        + calls
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


@pytest.fixture(scope="module")
def client(serve: Serve) -> OpenAI:
    loader, engine = "tests.openai.saying:load_model", {"pack_linears": False}
    models = [
        {
            "id": name,
            "loader": loader,
            "engine": engine,
            "kwargs": {"template": template(calls), "special": ["<|py|>", "<|/py|>"]},
        }
        for name, calls in FORMS.items()
    ]
    channels = {"template": CHANNELS, "special": CHANNEL_TOKENS}
    models.append({"id": "channels", "loader": loader, "engine": engine, "kwargs": channels})
    models.append({"id": "plain", "loader": loader, "engine": engine, "kwargs": {"template": template("", "")}})
    untooled = template("", "").replace("{{ tools | tojson }}", "")
    models.append({"id": "untooled", "loader": loader, "kwargs": {"template": untooled}})
    models.append({**models[-1], "id": "told", "api": {"tools_without_template": True}})
    return serve(models).client(timeout=60, _strict_response_validation=False)


def ask(client: OpenAI, model: str, text: str, **fields: Any) -> Any:
    fields = {"temperature": 1, "seed": 3, "max_tokens": 200, **fields}
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": say(text)}], **fields)


def arguments_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


@pytest.mark.parametrize("model", FORMS)
def test_calls_are_forced_in_the_models_own_format(client: OpenAI, model: str) -> None:
    shown = client.models.retrieve(model) if ask(client, model, "hi") else None
    assert shown is not None
    assert shown.model_extra["answers"]["proved"] is True
    for seed in range(3):
        (choice,) = ask(client, model, "No.", tools=TOOLS, tool_choice="required", seed=seed).choices
        calls = arguments_of(choice.message)
        assert calls
        assert choice.message.content is None
        for name, arguments in calls:
            assert (
                arguments == {} if name == "rest" else (type(arguments["a"]), arguments["kind"] in "xy") == (int, True)
            )
    (choice,) = ask(client, model, "<think>hm</think>No.", tools=TOOLS, tool_choice=NAMED).choices
    assert choice.message.reasoning_content == choice.message.reasoning == "hm"
    assert [name for name, _ in arguments_of(choice.message)] == ["get"]
    (choice,) = ask(client, model, "No.", tools=TOOLS, tool_choice="required", max_tokens=2).choices
    assert (choice.message.tool_calls, choice.message.content or "", choice.finish_reason) == (None, "", "length")


THOUGHT = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>No.<|return|>"


@pytest.mark.parametrize("text", ["No.", FINAL, THOUGHT, THOUGHT + FINAL])
def test_a_call_is_forced_in_channels(client: OpenAI, text: str) -> None:
    reasoning = "hm" if "hm" in text else None
    for choice, names in (("required", {"get", "rest"}), (NAMED, {"get"})):
        message = ask(client, "channels", text, tools=TOOLS, tool_choice=choice, logprobs=True).choices[0].message
        assert (message.content, getattr(message, "reasoning", None)) == (None, reasoning)
        ((name, _),) = arguments_of(message)
        assert name in names
    written = ask(client, "channels", text, tools=TOOLS, tool_choice=NAMED, logprobs=True).choices[0].logprobs.content
    whole = "".join(token.token for token in written)
    assert " to=functions.get<|channel|>commentary json<|message|>{" in whole


def test_without_force_channels_are_free(client: OpenAI) -> None:
    for tools in (TOOLS, STRICT):
        message = ask(client, "channels", THOUGHT + FINAL, tools=tools).choices[0].message
        assert (message.content, message.reasoning, message.tool_calls) == ("No.", "hm", None)


def test_a_text_or_calls_or_a_schema(client: OpenAI) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "b", "schema": schema}}
    call = '<do>{"name": "rest", "arguments": {}}</do>'
    message = ask(client, "tags", call, tools=TOOLS, response_format=wanted).choices[0].message
    assert (arguments_of(message), message.content) == ([("rest", {})], None)
    message = ask(client, "tags", '{"b": 4}', tools=TOOLS, response_format=wanted).choices[0].message
    assert (message.tool_calls, json.loads(message.content)) == (None, {"b": 4})
    with pytest.raises(BadRequestError, match="response_format"):
        ask(client, "plain", "hi", tools=TOOLS, response_format=wanted)
    assert ask(client, "tags", "Just text.", tools=STRICT).choices[0].message.content == "Just text."
    text = 'So <do>{"name": "get", "arguments": {"a": "one", "kind": "x"}}</do>'
    message = ask(client, "tags", text, tools=STRICT).choices[0].message
    assert [type(arguments["a"]) for _, arguments in arguments_of(message)] == [int]


def test_a_reasoning_has_a_budget(client: OpenAI) -> None:
    text = "<think>" + "on and " * 20 + "</think>Yes."
    for budget in (20, 30, 60):
        answer = ask(client, "tags", text, extra_body={"thinking_token_budget": budget})
        assert answer.usage.completion_tokens_details.reasoning_tokens == budget
        assert answer.choices[0].message.reasoning_content.startswith("on")
        assert answer.choices[0].message.content
    fields = {"thinking_token_budget": 40, "thinking_budget_message": " Enough."}
    message = ask(client, "tags", text, extra_body=fields).choices[0].message
    assert message.reasoning_content.endswith(" Enough.")
    assert "Enough" not in message.content
    answer = ask(client, "tags", text, extra_body={"thinking_token_budget": -1})
    assert answer.choices[0].message.content == "Yes."
    forced = ask(client, "tags", text, tools=TOOLS, tool_choice=NAMED, extra_body={"thinking_token_budget": 20})
    assert arguments_of(forced.choices[0].message)
    with pytest.raises(BadRequestError, match="thinking_token_budget"):
        ask(client, "plain", "hi", extra_body={"thinking_token_budget": 5})


@pytest.mark.parametrize("stream", [False, True])
def test_a_turn_that_reaches_an_answer_within_its_budget_is_unchanged(client: OpenAI, stream: bool) -> None:
    for text in ("<think>29</think>", "<think>29</think>\n\nYes.", "Yes."):
        answers = [
            spoken(ask(client, "tags", text, extra_body=budget, stream=stream), stream)
            for budget in ({}, {"thinking_token_budget": 20}, {"thinking_token_budget": 500})
        ]
        assert answers == answers[:1] * 3
        assert answers[0][2] == "stop"
    for text in ("<think>29", "<think>" + "on and " * 9):
        reasoning, content, _ = spoken(ask(client, "tags", text, extra_body={"thinking_token_budget": 20}), False)
        assert reasoning
        assert content
    wanted: Any = {"type": "json_object"}
    message = ask(client, "tags", "<think>29", response_format=wanted, extra_body={"thinking_token_budget": 30})
    assert json.loads(message.choices[0].message.content) is not None


def spoken(answer: Any, stream: bool) -> tuple[str, str, str]:
    """The reasoning, the content and the reason to end."""
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    parts = [each.delta if stream else each.message for each in choices]
    reasoning = "".join(getattr(part, "reasoning_content", None) or "" for part in parts)
    return reasoning, "".join(part.content or "" for part in parts), choices[-1].finish_reason


def test_a_message_of_a_budget_has_to_fit_into_it(client: OpenAI) -> None:
    message = {"thinking_budget_message": " Enough of this, I have to answer."}
    for budget in ({"thinking_token_budget": 20}, {}):
        with pytest.raises(BadRequestError, match="thinking_budget_message") as error:
            ask(client, "tags", "<think>on and on", extra_body={**message, **budget})
        assert error.value.param == "thinking_budget_message"
    assert ask(client, "tags", "Yes.", extra_body={**message, "thinking_token_budget": 60}).choices[0].message.content


def test_completions_have_no_budget_of_reasoning(client: OpenAI) -> None:
    for fields, param in (
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking_budget_message": "Enough."}, "thinking_budget_message"),
    ):
        with pytest.raises(BadRequestError) as error:
            client.completions.create(model="tags", prompt="<think>", extra_body=fields)
        assert error.value.param == param


def test_a_budget_does_not_cut_a_call(client: OpenAI) -> None:
    call = '<do>{"name": "get", "arguments": {"a": 12, "kind": "x"}}</do>'
    fields: Any = {"tools": TOOLS, "extra_body": {"thinking_token_budget": 30}}
    for text in (f"<think>Well.{call}", f"<think>Well.{call}\n{call}"):
        (choice,) = ask(client, "tags", text, **fields).choices
        assert arguments_of(choice.message) == [("get", {"a": 12, "kind": "x"})] * text.count("<do>")
        assert (choice.message.reasoning_content, choice.finish_reason) == ("Well.", "tool_calls")
    message = ask(client, "tags", f"<think>Well.{call} or not, and on and on", **fields).choices[0].message
    assert message.tool_calls is None
    assert message.reasoning_content == f"Well.{call}"


@pytest.mark.parametrize("count", [4, pytest.param(50, marks=pytest.mark.long)])
def test_a_budget_holds_in_every_run(client: OpenAI, count: int) -> None:
    for run in range(count):
        text = "<think>" + "é and on " * (run % 7) + "</think>" * (run % 2) + "Yes."
        answer = ask(client, "tags", text, seed=run, extra_body={"thinking_token_budget": 16 + run % 23})
        assert answer.usage.completion_tokens_details.reasoning_tokens <= 16 + run % 23
        assert answer.choices[0].message.content


@pytest.mark.parametrize("model", [*FORMS, "plain"])
def test_arguments_are_streamed(client: OpenAI, model: str) -> None:
    for choice in ("required", NAMED):
        fields: Any = {"tools": TOOLS, "tool_choice": choice, "seed": 1}
        whole = [
            [c.function.name, c.function.arguments]
            for c in ask(client, model, "No.", **fields).choices[0].message.tool_calls
        ]
        calls: list[list[str]] = []
        count = 0
        for chunk in ask(client, model, "No.", stream=True, **fields):
            for call in chunk.choices[0].delta.tool_calls or ():
                if call.id:
                    calls.append([call.function.name, ""])
                calls[call.index][1] += call.function.arguments
                count += bool(call.function.arguments)
        assert calls == whole
        assert model == "python" or "get" not in str(whole) or count > len(whole)
    fields = {"tools": [{"type": "function", **tool["function"]} for tool in TOOLS], "tool_choice": "required"}
    with client.responses.stream(
        model=model, input=say("No."), temperature=1, max_output_tokens=200, **fields
    ) as events:
        got = list(events)
    deltas = [event.delta for event in got if event.type == "response.function_call_arguments.delta"]
    items = [event.item for event in got if event.type == "response.output_item.done"]
    assert "".join(deltas) == "".join(item.arguments for item in items if item.type == "function_call")
    assert deltas


def test_a_template_knows_the_effort(client: OpenAI) -> None:
    create = client.chat.completions.with_raw_response.create
    asked: Any = {"reasoning_effort": "low", "extra_body": {"return_prompt_text": True}, "max_tokens": 4}
    raw = create(model="tags", messages=[{"role": "user", "content": say("hi")}], **asked)
    assert "x-troupe-ignored" not in raw.headers
    assert "Think low." in raw.text
    answer = client.responses.create(
        model="tags", input=say("<think>on and on</think>Yes."), reasoning={"effort": "high"}, temperature=1,
        extra_body={"thinking_token_budget": 20},
    )  # fmt: skip
    assert answer.usage.output_tokens_details.reasoning_tokens <= 20
    assert answer.output_text


def test_an_answer_that_ends_while_it_reasons_has_no_content(client: OpenAI) -> None:
    (choice,) = ask(client, "tags", "<think>on and on", max_tokens=12).choices
    assert (choice.message.reasoning_content, choice.message.content, choice.finish_reason) == ("on an", None, "length")


def test_a_grammar_may_be_gbnf(client: OpenAI) -> None:
    grammar = 'root ::= "yes" | "no" [0-9]\n'
    message = ask(client, "plain", "no7", extra_body={"guided_grammar": grammar}).choices[0].message
    assert message.content == "no7"
    with pytest.raises(BadRequestError, match="GBNF"):
        ask(client, "plain", "no7", extra_body={"guided_grammar": 'root ::= ("yes"'})


def test_tools_are_written_for_a_template_without_a_place_for_them(client: OpenAI) -> None:
    written = '<tool_call>\n{"name": "get", "arguments": {"a": 1, "kind": "x"}}\n</tool_call>'
    message = ask(client, "told", f"So.\n{written}", tools=TOOLS).choices[0].message
    assert (message.content, arguments_of(message)) == ("So.", [("get", {"a": 1, "kind": "x"})])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        {**message.model_dump(exclude_none=True), "content": "So."},
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "41"},
        {"role": "user", "content": say("Done.")},
    ]
    asked = {"model": "told", "messages": messages, "tools": TOOLS}
    prompt = client.post("/chat/completions/render", body=asked, cast_to=object)["prompt"]
    assert "<|im_start|>system\nBe brief.\n\nYou can call functions." in prompt
    assert '{"name": "rest", "parameters": {"type": "object"' in prompt
    assert f"<|im_start|>assistant\nSo.\n{written}<|im_end|>" in prompt
    assert "<|im_start|>user\n<tool_response>\n41\n</tool_response><|im_end|>" in prompt
    assert client.chat.completions.create(**asked).choices[0].message.content
    assert arguments_of(ask(client, "told", "No.", tools=TOOLS, tool_choice=NAMED).choices[0].message)
    with pytest.raises(BadRequestError, match="tools_without_template"):
        ask(client, "untooled", "hi", tools=TOOLS)


def test_a_call_that_cannot_be_read_is_told(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": say("<tool_call>none</tool_call>")}]
    raw = client.chat.completions.with_raw_response.create(model="tags", messages=messages, tools=TOOLS, temperature=0)
    assert raw.headers["x-troupe-unread"] == "%3Ctool_call%3E"
