"""Call the server through litellm the way mini-swe-agent does; JSON in on standard input, JSON out on the output."""

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
            "properties": {"command": {"type": "string", "description": "The bash command to execute"}},
            "required": ["command"],
        },
    },
}


def ask(messages, provider="openai", **options):
    return litellm.completion(
        model=f"{provider}/{given['model']}",
        api_base=f"{given['url']}/v1",
        api_key="EMPTY",
        messages=messages,
        **options,
    )


def failure(**options):
    try:
        ask([{"role": "user", "content": options.pop("text", "hi")}], num_retries=0, **options)
    except Exception as error:
        return type(error).__name__
    return None


results = {}
for provider in ("openai", "hosted_vllm"):
    messages = [{"role": "system", "content": "You are an agent."}, {"role": "user", "content": "Run a command."}]
    steps = []
    for _ in range(3):
        answer = ask(messages, provider, tools=[BASH], tool_choice="required", temperature=0)
        message = answer.choices[0].message
        calls = message.tool_calls or []
        steps.append([[call.id, call.function.name, json.loads(call.function.arguments)] for call in calls])
        messages.append(message.model_dump())
        for call in calls:
            messages.append({"role": "tool", "tool_call_id": call.id, "name": "bash", "content": "output: ok"})
    streamed = litellm.stream_chunk_builder(list(ask(messages[:2], provider, stream=True, temperature=0)))
    whole = ask(messages[:2], provider, temperature=0)
    results[provider] = {
        "steps": steps,
        "same": streamed.choices[0].message.content == whole.choices[0].message.content,
        "free": ask(messages[:2], provider, tools=[BASH]).choices[0].finish_reason,
    }
given_model = given["model"]
results["overflow"] = failure(text="x" * 9000)
results["bad"] = failure(temperature=-3)
given["model"] = "no-such-model"
results["unknown"] = failure()
print(json.dumps(results))
