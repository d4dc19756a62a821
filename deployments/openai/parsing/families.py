"""How model families write tool calls. Each family is two markers and a function that reads what is between them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.openai.parsing.parts import Call

Schemas = Mapping[str, Mapping[str, Any]]
"""The tools of a request: name to the JSON schema of the arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A way to write tool calls.

    Attributes:
        starts: texts that begin a call.
        end: the text that ends it; None where only the end of the answer does.
        inner: further markers that `read` looks for.
        read: the calls in a body; None where it holds none, so that the text stays content.
        whole: a character that begins an answer which is nothing but calls.
        harmony: the text is in channels, reasoning too; `HarmonySplitter` reads it.
        short_ids: the family's template insists on ids of nine letters and digits.
    """

    read: Callable[[str, Schemas], list[Call] | None]
    starts: tuple[str, ...] = ()
    end: str | None = None
    inner: tuple[str, ...] = ()
    whole: str = ""
    harmony: bool = False
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; those that the tokenizer has as special tokens must stay in the text."""
        return (*self.starts, *([] if self.end is None else [self.end]), *self.inner)


def json_calls(value: Any) -> list[Call] | None:
    """Calls from parsed JSON: one object or a list of objects with `name` and `arguments` or `parameters`."""
    entries = value if isinstance(value, list) else [value]
    calls = [_json_call(entry) for entry in entries]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _json_call(entry: Any) -> Call | None:
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("function"), dict):
        entry = entry["function"]
    name = entry.get("name", entry.get("function"))
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = loads(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return Call(name, _dumps(arguments))


def _tagged(body: str, schemas: Schemas) -> list[Call] | None:
    """Between <tool_call> tags: JSON (Hermes, Qwen), <function=…> (Qwen coder) or <arg_key> (GLM)."""
    body = body.strip()
    if body.startswith("<function="):
        return _function_tags(body, schemas)
    if "<arg_key>" in body:
        return _argument_tags(body, schemas)
    return json_calls(loads(body))


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)


def _function_tags(body: str, schemas: Schemas) -> list[Call] | None:
    calls: list[Call] = []
    for name, inner in _FUNCTION.findall(body):
        arguments = {key: typed(value, name, key, schemas) for key, value in _PARAMETER.findall(inner)}
        if _PARAMETER.sub("", inner).strip():
            return None
        calls.append(Call(name.strip(), _dumps(arguments)))
    return calls or None


def _argument_tags(body: str, schemas: Schemas) -> list[Call] | None:
    name = body[: body.index("<arg_key>")].strip()
    pairs = _ARGUMENT.findall(body)
    if not name or not pairs:
        return None
    return [Call(name, _dumps({key.strip(): typed(value, name, key.strip(), schemas) for key, value in pairs}))]


def typed(text: str, name: str, key: str, schemas: Schemas) -> Any:
    """An argument written as bare text, as the type its schema gives it; where that fails, the text."""
    properties = schemas.get(name, {}).get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    declared = schema.get("type") if isinstance(schema, Mapping) else None
    if declared == "string":
        return text
    value = loads(text.strip())
    if value is None and text.strip() in ("None", "null"):
        return None
    if value is None and text.strip() in ("True", "False"):
        return text.strip() == "True"
    return text if value is None else value


def _several_json(body: str, schemas: Schemas) -> list[Call] | None:
    """JSON objects one after the other, with `;` or white space between them (Llama 3)."""
    decoder = json.JSONDecoder()
    values: list[Any] = []
    rest = body.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        values.extend(value if isinstance(value, list) else [value])
        rest = rest[end:].lstrip(" \n\t;,")
    return json_calls(values) if values else None


_MISTRAL_CALL = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\])?\s*(?={)")


def _mistral(body: str, schemas: Schemas) -> list[Call] | None:
    """A JSON list, or `name[ARGS]{…}` any number of times."""
    body = body.replace("[TOOL_CALLS]", " ").strip()
    if body.startswith(("[", "{")):
        return _several_json(body, schemas)
    calls: list[Call] = []
    while body:
        match = _MISTRAL_CALL.match(body)
        if match is None:
            return None
        try:
            arguments, end = json.JSONDecoder().raw_decode(body, match.end())
        except (ValueError, RecursionError):
            return None
        calls.append(Call(match[1], _dumps(arguments)))
        body = body[end:].strip()
    return calls or None


_FENCE = re.compile(r"^```(?:json)?\s*(.*?)\s*(?:```)?$", re.DOTALL)


def _deepseek(body: str, schemas: Schemas) -> list[Call] | None:
    """`function<sep>name` and fenced JSON (V3), or `name<sep>{…}` (V3.1)."""
    calls: list[Call] = []
    for piece in body.split("<｜tool▁call▁begin｜>")[1:]:
        head, separator, tail = piece.partition("<｜tool▁call▁end｜>")[0].partition("<｜tool▁sep｜>")
        if not separator:
            return None
        name, text = head.strip(), tail.strip()
        if name == "function":
            name, _, text = text.partition("\n")
        fenced = _FENCE.match(text.strip())
        arguments = loads(fenced[1] if fenced else text)
        if not isinstance(arguments, dict):
            return None
        calls.append(Call(name.strip(), _dumps(arguments)))
    return calls or None


def _kimi(body: str, schemas: Schemas) -> list[Call] | None:
    calls: list[Call] = []
    for piece in body.split("<|tool_call_begin|>")[1:]:
        head, separator, tail = piece.partition("<|tool_call_end|>")[0].partition("<|tool_call_argument_begin|>")
        arguments = loads(tail.strip())
        if not separator or not isinstance(arguments, dict):
            return None
        calls.append(
            Call(head.strip().removeprefix("functions.").rpartition(":")[0] or head.strip(), _dumps(arguments))
        )
    return calls or None


def _pythonic(body: str, schemas: Schemas) -> list[Call] | None:
    """A Python list of calls with keyword arguments, or one call (Llama 4, Olmo)."""
    try:
        tree = ast.parse(body.strip(), mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return calls or None


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    return Call(ast.unparse(node.func), _dumps(arguments))


def _plain_json(body: str, schemas: Schemas) -> list[Call] | None:
    return json_calls(loads(body.strip()))


_TAGS = (
    "<function=",
    "</function>",
    "<parameter=",
    "</parameter>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
)

FAMILIES = {
    "hermes": Family(starts=("<tool_call>",), end="</tool_call>", inner=_TAGS, read=_tagged),
    "llama3_json": Family(starts=("<|python_tag|>",), whole="{[", read=_several_json),
    "mistral": Family(starts=("[TOOL_CALLS]",), inner=("[CALL_ID]", "[ARGS]"), read=_mistral, short_ids=True),
    "deepseek": Family(
        starts=("<｜tool▁calls▁begin｜>",),
        end="<｜tool▁calls▁end｜>",
        inner=("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        read=_deepseek,
    ),
    "kimi": Family(
        starts=("<|tool_calls_section_begin|>",),
        end="<|tool_calls_section_end|>",
        inner=("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        read=_kimi,
    ),
    "granite": Family(starts=("<|tool_call|>", "<tool_call>"), whole="[", read=_several_json),
    "phi4": Family(starts=("functools",), read=_several_json),
    "internlm": Family(starts=("<|action_start|><|plugin|>",), end="<|action_end|>", read=_plain_json),
    "pythonic": Family(starts=("<|python_start|>",), whole="[", read=_pythonic),
    "olmo3": Family(starts=("<function_calls>",), end="</function_calls>", read=_pythonic),
    "harmony": Family(
        inner=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        read=_plain_json,
        harmony=True,
    ),
    "json": Family(whole="{[", starts=("```json",), end="```", read=_several_json),
}

# What a chat template says of its model's family, the surest signs first.
_SIGNS = (
    ("<|channel|>", "harmony"),
    ("[TOOL_CALLS]", "mistral"),
    ("<｜tool▁calls▁begin｜>", "deepseek"),
    ("<|tool_calls_section_begin|>", "kimi"),
    ("<|action_start|>", "internlm"),
    ("functools[", "phi4"),
    ("<function_calls>", "olmo3"),
    ("<|tool_call|>", "granite"),
    ("<tool_call>", "hermes"),
    ("<|python_start|>", "pythonic"),
    ("<|python_tag|>", "llama3_json"),
    ('"parameters"', "llama3_json"),
)


def family_of(chat_template: str | None) -> str:
    """The family whose marks a chat template bears; `hermes` where it bears none."""
    return next((name for sign, name in _SIGNS if sign in (chat_template or "")), "hermes")


def loads(text: str) -> Any:
    """The JSON value of a text; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _dumps(arguments: Any) -> str:
    if not isinstance(arguments, dict):
        raise ValueError("the arguments are no object")
    return json.dumps(arguments, ensure_ascii=False)
