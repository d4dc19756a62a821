"""Formats that no model is known to have: a chat template each, and what a model would write of the same calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Calls = Sequence[tuple[str, dict[str, Any]]]

HEAD = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>\n"
    "{% endif %}{{ m.content or '' }}"
)
TAIL = "<|done|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}"
NAME = "{{ c.function.name }}"
JSON = "{{ c.function.arguments | tojson }}"
PAIRS = "{% for k, v in c.function.arguments.items() %}"
VALUE = "{{ v if v is string else v | tojson }}"
END = "{% endfor %}"
KEYWORDS = "(" + PAIRS + "{{ k }}={{ v | tojson }}{{ ', ' if not loop.last }}" + END + ")"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invented:
    """A format.

    Attributes:
        template: shows it, or tells the model of it.
        write: what a model writes of calls.
        prompt: how a prompt ends.
        opening, closing: what stands around reasoning.
        before, after: what stands around a text.
        found_by: how the format is found; one that the template shows is proved.
    """

    template: str
    write: Callable[[Calls], str]
    prompt: str = "<|assistant|>"
    opening: str = "<think>"
    closing: str = "</think>\n"
    before: str = ""
    after: str = ""
    found_by: str = "template"


def each(write: Callable[[str, dict[str, Any]], str], between: str = "\n") -> Callable[[Calls], str]:
    """A writer of calls one after the other."""
    return lambda calls: between.join(write(name, arguments) for name, arguments in calls)


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(value: Any) -> str:
    """A value without quotes, where that is a text."""
    return value if isinstance(value, str) else dumped(value)


def python(name: str, arguments: dict[str, Any]) -> str:
    """A call in Python."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"


def pairs(arguments: dict[str, Any], form: str, spell: Callable[[Any], str] = bare) -> str:
    """Every argument in a form of its own."""
    return "".join(form.format(key, spell(value)) for key, value in arguments.items())


def shown(calls: str) -> str:
    return HEAD + calls + TAIL


def headed(open_: str, body: str, end: str, *, to: str, think: str, say: str) -> str:
    """A template whose messages have headers, each call a message of its own."""
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        f"{{% if m.reasoning_content %}}{open_}{think}{body}{{{{ m.reasoning_content }}}}{end}{{% endif %}}"
        f"{{% if m.content %}}{open_}{say}{body}{{{{ m.content }}}}{end}{{% endif %}}"
        f"{EACH}{open_}{to}{NAME}{body}{JSON}{end}{END}"
        f"{{% else %}}{open_.replace('assistant', '{{ m.role }}')}{body}{{{{ m.content }}}}{end}{{% endif %}}{END}"
        f"{{% if add_generation_prompt %}}{open_}{{% endif %}}"
    )


RECIPIENT = ("<|start|>assistant", "<|body|>", "<|end|>")
HEADER = ("<|head|>assistant", "<|head_end|>\n", "<|eom|>")
THOUGHT = "{% if m.reasoning_content %}{{ m.reasoning_content }}\n[BEGIN FINAL RESPONSE]\n{% endif %}"

FORMATS = {
    "a recipient in the header": Invented(
        template=headed(*RECIPIENT, to=" to=", think=" think", say=" say"),
        write=each(lambda n, a: f" to={n}<|body|>{dumped(a)}<|end|>", "<|start|>assistant"),
        prompt="<|start|>assistant",
        opening=" think<|body|>",
        closing="<|end|><|start|>assistant",
        before=" say<|body|>",
        after="<|end|><|start|>assistant",
    ),
    "every message with a recipient": Invented(
        template=headed(*HEADER, to=" to=tools.", think=" to=self", say=" to=user"),
        write=each(lambda n, a: f" to=tools.{n}<|head_end|>\n{dumped(a)}", "<|eom|><|head|>assistant"),
        prompt="<|head|>assistant",
        opening=" to=self<|head_end|>\n",
        closing="<|eom|><|head|>assistant",
        before=" to=user<|head_end|>\n",
        after="<|eom|><|head|>assistant",
    ),
    "a header that names the tool": Invented(
        template=HEAD.replace("<|{{ m.role }}|>", "{% if not m.tool_calls %}<|{{ m.role }}|>\n{% endif %}")
        + f"{EACH}<|assistant|>{NAME}\n{JSON}{END}"
        + TAIL,
        write=each(lambda n, a: f"{n}\n{dumped(a)}", "<|assistant|>"),
        before="\n",
    ),
    "reasoning that the prompt begins": Invented(
        template="{% for m in messages %}<|{{ m.role }}|>\n"
        + f"{THOUGHT}{{{{ m.content or '' }}}}{{% if m.tool_calls %}}<calls>[{EACH}"
        + '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
        + "{{ ', ' if not loop.last }}{% endfor %}]</calls>{% endif %}\n<|end|>\n{% endfor %}"
        + "{% if add_generation_prompt %}<|assistant|>\nHere are my thoughts:\n{% endif %}",
        write=lambda calls: (
            f"<calls>{dumped([{'name': n, 'arguments': a, 'id': 'Ab3456789'} for n, a in calls])}</calls>"
        ),
        prompt="<|assistant|>\nHere are my thoughts:\n",
        opening="",
        closing="\n[BEGIN FINAL RESPONSE]\n",
    ),
    "a key and a value on each line": Invented(
        template=shown(
            f"{EACH}<tool>\nname: {NAME}\narguments:\n{PAIRS}  {{{{ k }}}}: {VALUE}{{{{ '\\n' }}}}{END}</tool>\n{END}"
        ),
        write=each(lambda n, a: f"<tool>\nname: {n}\narguments:\n" + pairs(a, "  {}: {}\n", dumped) + "</tool>"),
    ),
    "lines of texts without quotes": Invented(
        template=shown(f"{EACH}<do>{NAME}\n{PAIRS}{{{{ k }}}} = {VALUE}{{{{ '\\n' }}}}{END}</do>\n{END}"),
        write=each(lambda n, a: f"<do>{n}\n" + pairs(a, "{} = {}\n") + "</do>"),
    ),
    "Python in a fence that nothing shows": Invented(
        template=shown(""),
        write=lambda calls: "```tool_code\n" + each(python)(calls) + "\n```",
        found_by="default",
    ),
    "labels that the template tells of": Invented(
        template="{% if tools %}Use this form.\nAction: the tool\nAction Input: its input as JSON\n{% endif %}"
        + shown(""),
        write=each(lambda n, a: f"Action: {n}\nAction Input: {dumped(a)}"),
        found_by="instruction",
    ),
    "a name, and JSON on the next line": Invented(
        template=shown(f"{EACH}{NAME}\n{JSON}{{{{ '\\n' if not loop.last }}}}{END}"),
        write=each(lambda n, a: f"{n}\n{dumped(a)}"),
    ),
    "labels": Invented(
        template=shown(f"{EACH}@do: {NAME}\n@with: {JSON}{{{{ '\\n' if not loop.last }}}}{END}"),
        write=each(lambda n, a: f"@do: {n}\n@with: {dumped(a)}"),
    ),
    "a fence of JSON": Invented(
        template=shown(
            EACH + "```do\n{{ {'tool': c.function.name, 'input': c.function.arguments} | tojson }}\n```\n{% endfor %}"
        ),
        write=each(lambda n, a: f"```do\n{dumped({'tool': n, 'input': a})}\n```"),
    ),
    "a tag that begins as the prompt ends": Invented(
        template=shown(f"{EACH}<tool: {NAME}>\n{JSON}\n</tool>{END}").replace("t|>{% endif", "t|><think>\n{% endif"),
        write=each(lambda n, a: f"<tool: {n}>\n{dumped(a)}\n</tool>"),
        prompt="<|assistant|><think>\n",
        opening="",
    ),
    "ids and names as attributes": Invented(
        template=shown(f'{EACH}<call id="{{{{ c.id }}}}" name="{NAME}">{JSON}</call>{END}'),
        write=each(lambda n, a: f'<call id="x19" name="{n}">{dumped(a)}</call>'),
    ),
    "parameters with types": Invented(
        template=shown(
            f'{EACH}<use name="{NAME}">{PAIRS}<in name="{{{{ k }}}}" '
            """type="{{ 'string' if v is string else 'integer' }}">"""
            f"{VALUE}</in>{END}</use>\n{END}"
        ),
        write=each(lambda n, a: f'<use name="{n}">' + pairs(a, '<in name="{}" type="any">{}</in>') + "</use>"),
    ),
    "Python in a section": Invented(
        template=shown(
            "{% if m.tool_calls %}[RUN]"
            + EACH
            + NAME
            + KEYWORDS
            + "{{ '\\n' if not loop.last }}{% endfor %}[/RUN]{% endif %}"
        ),
        write=lambda calls: f"[RUN]{each(python)(calls)}[/RUN]",
    ),
    "the name as an assignment": Invented(
        template=shown(f"{EACH}<|do|>function={NAME}{JSON}<|did|>{END}"),
        write=each(lambda n, a: f"<|do|>function={n}{dumped(a)}<|did|>", ""),
    ),
    "keys and values between tokens": Invented(
        template=shown(f"{EACH}<|do|>{NAME}{PAIRS}<|k|>{{{{ k }}}}<|v|>{VALUE}{END}<|did|>{END}"),
        write=each(lambda n, a: f"<|do|>{n}{pairs(a, '<|k|>{}<|v|>{}')}<|did|>", ""),
    ),
}
