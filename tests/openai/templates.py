"""Twenty chat templates in the styles of model families, written small: roles, white space, tools, parts, reasoning."""

from __future__ import annotations

from typing import Any

from tests.openai.tiny_models import load_model

_SYSTEM_FIRST = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
)

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama2": _SYSTEM_FIRST + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    "llama3": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
    "mistral": _SYSTEM_FIRST + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "phi": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt }}",
    "vicuna": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
    "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "alpaca": "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}{{ m.content }}\n\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}### Response:\n{% endif %}",
    "falcon": "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    "openchat": "{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m.role | title }}: {{ m.content }}<|turn|>"
    "{% endfor %}{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
    "deepseek": _SYSTEM_FIRST + "{{ bos_token }}{{ system }}{% for m in rest %}{% if m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% elif m.role == 'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}"
    "<｜end｜>{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
    "hermes": "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": {{ c.function.name | tojson }}, "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama31": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}",
    "strict": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}"
    "</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
    "either": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
    "dates": "{{ strftime_now('%Y') }} {% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}"
    "{% endgeneration %}{% else %}Q: {{ m.content }}\nA: {% endif %}{% endfor %}",
}

_TURN = "<{{ m.role }}>{{ m.content }}"
_CALLS = "{% for c in m.tool_calls or [] %}[{{ c.function.name }} ARGUMENTS]{% endfor %}"
_LOOP = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}BODY</{{ m.role }}>{% endfor %}"


def _loop(body: str, arguments: str = "{{ c.function.arguments | tojson }}") -> str:
    return _LOOP.replace("BODY", body).replace("ARGUMENTS", arguments)


# What templates do with histories: each reads, or leaves out, something in a way of its own.
HISTORIES = {
    "object": _loop(_TURN + _CALLS),
    "string": _loop(_TURN + _CALLS, "{{ '' + c.function.arguments }}"),
    "printed": _loop(_TURN + _CALLS, "{{ c.function.arguments }}"),
    "text or object": _loop(
        _TURN + _CALLS,
        "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
        "{{ c.function.arguments | tojson }}{% endif %}",
    ),
    "items": _loop(_TURN + _CALLS, "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}"),
    "only null": _loop("<{{ m.role }}>{% if m.content is none %}" + _CALLS + "{% else %}{{ m.content }}{% endif %}"),
    "concatenates": _loop("{{ '<' + m.role + '>' + m.content }}" + _CALLS),
    "told apart": _loop("<{{ m.role }}>{% if m.content is not none %}({{ m.content }}){% endif %}" + _CALLS),
    "no calls": _loop(_TURN),
    "names alone": _loop(_TURN + _CALLS, ""),
    "no results": _loop("{% if m.role != 'tool' %}" + _TURN + _CALLS + "{% endif %}"),
    "no third role": _loop("{% if m.role == 'user' or m.role == 'assistant' %}" + _TURN + _CALLS + "{% endif %}"),
    "first call": _loop(_TURN + _CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")),
    "system first": _loop("{% if loop.first or m.role != 'system' %}" + _TURN + _CALLS + "{% endif %}"),
    "last system": "{% for m in messages if m.role == 'system' %}{% if loop.last %}{{ m.content }}{% endif %}"
    "{% endfor %}" + _loop("{% if m.role != 'system' %}" + _TURN + _CALLS + "{% endif %}"),
    "calls or text": _loop("<{{ m.role }}>{% if m.tool_calls %}" + _CALLS + "{% else %}{{ m.content }}{% endif %}"),
    "nine letters": _loop(
        _TURN + "{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}"
        "{% endif %}{% endfor %}" + _CALLS
    ),
    "named by id": _loop(_TURN + _CALLS.replace("c.function.name", "c.id") + "{{ m.tool_call_id }}"),
    "ipython": _loop("{% if m.role in ['user', 'assistant', 'ipython'] %}" + _TURN + _CALLS + "{% endif %}"),
    "developer": _loop("{% if m.role == 'developer' %}{{ m.content }}{% else %}" + _TURN + "{% endif %}" + _CALLS),
    "parts of users": _loop(
        "{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}{% else %}"
        + _TURN
        + "{% endif %}"
        + _CALLS
    ),
    "parts of tools": _loop(
        "{% if m.role == 'tool' and m.content is not string %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% else %}" + _TURN + "{% endif %}" + _CALLS
    ),
    "dumped parts": _loop("<{{ m.role }}>{{ m.content | tojson }}" + _CALLS),
}


def load_template(style: str) -> dict[str, Any]:
    """A loader whose model has one of the templates."""
    return load_model({**TEMPLATES, **HISTORIES}[style])


def load_named(kind: str) -> dict[str, Any]:
    """A loader whose tokenizer has several templates, as a dict or as the list of older checkpoints."""
    loaded = load_model()
    named = {"default": HISTORIES["object"].partition("{% endif %}")[2], "tool_use": HISTORIES["object"], "rag": "RAG"}
    listed = [{"name": name, "template": template} for name, template in named.items()]
    loaded["tokenizer"].chat_template = named if kind == "dict" else listed
    return {**loaded, "chat_template": None}


def load_function(kind: str) -> dict[str, Any]:
    """A loader whose own function writes the prompts."""

    def whole(messages: list[Any], tools: Any = None) -> str:
        calls = [call["function"] for m in messages for call in m.get("tool_calls", ())]
        return f"{tools or ''}{calls}" + "".join(f"<{m['role']}>{m['content'] or ''}" for m in messages)

    def texts(messages: list[Any]) -> str:
        return "".join(m["content"] or "" for m in messages)

    def last(messages: list[Any]) -> str:
        return str(messages[-1]["content"])

    functions = {"whole": whole, "texts": texts, "last": last}
    return {**load_model(), "apply_chat_template": functions[kind]}


def load_plain() -> dict[str, Any]:
    """A loader without a template: chats are lines of a role and a text."""
    loaded = load_model()
    loaded["tokenizer"].chat_template = None
    return {**loaded, "chat_template": None, "plain_chat": True}
