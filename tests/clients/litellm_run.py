"""Call the server through litellm: streams against whole answers, and the classes of its errors.

JSON on standard input, JSON on standard output.
"""

import json
import sys

import litellm

given = json.load(sys.stdin)
litellm.suppress_debug_info = True
BASH = {
    "type": "function",
    "function": {
        "name": "bash",
        "description": "Execute a bash command",
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "string", "minLength": 5, "maxLength": 20}},
            "required": ["command"],
        },
    },
}
MESSAGES = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": "Repeat exactly: k7Qp2x"}]


def ask(messages, provider="openai", model=given["model"], **options):
    return litellm.completion(
        model=f"{provider}/{model}",
        api_base=f"{given['url']}/v1",
        api_key="none",
        messages=messages,
        temperature=0,
        **{"max_tokens": 100, **options},
    )


def whole_and_streamed(provider, **options):
    whole = ask(MESSAGES, provider, **options)
    streamed = litellm.stream_chunk_builder(list(ask(MESSAGES, provider, stream=True, **options)))
    return [answer.choices[0].message for answer in (whole, streamed)]


def called(message):
    return [[call.function.name, json.loads(call.function.arguments)] for call in message.tool_calls]


def failure(text="hi", **options):
    try:
        ask([{"role": "user", "content": text}], num_retries=0, **options)
    except Exception as error:
        return type(error).__name__
    return None


results = {}
for provider in ("openai", "hosted_vllm"):
    forced = whole_and_streamed(provider, tools=[BASH], tool_choice="required")
    results[provider] = {
        "texts": [message.content for message in whole_and_streamed(provider)],
        "calls": [called(message) for message in forced],
        "free": ask(MESSAGES, provider, tools=[BASH]).choices[0].finish_reason,
    }
results["overflow"] = failure(text="x" * 9000)
results["bad"] = failure(presence_penalty=-300)
results["unknown"] = failure(model="no-such-model")
print(json.dumps(results))
