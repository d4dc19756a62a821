"""How model families write tool calls. Each family is two markers and a function that reads what is between them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.typed import Schemas, dumps, is_text, loads, python_literal, typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A format of tool calls.

    Attributes:
        starts: texts that begin a call.
        end: the text that ends it; None where only the end of the answer does.
        inner: further markers that `read` looks for.
        read: the calls in a body; None where it holds none, so that the text stays content.
        whole: a character that begins an answer which is nothing but calls.
        bare: calls are also JSON values anywhere in the text, with nothing to mark them.
        harmony: the text is in channels, reasoning too; `HarmonySplitter` reads it.
        short_ids: the family's template insists on ids of nine letters and digits.
    """

    read: Callable[[str, Schemas], list[Call] | None]
    starts: tuple[str, ...] = ()
    end: str | None = None
    inner: tuple[str, ...] = ()
    whole: str = ""
    bare: bool = False
    harmony: bool = False
    short_ids: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All markers; those that the tokenizer has as special tokens must stay in the text."""
        return (*self.starts, *([] if self.end is None else [self.end]), *self.inner)


def json_calls(value: Any, *, bare: bool = False) -> list[Call] | None:
    """Calls from parsed JSON: one object or a list of objects with `name` and `arguments` or `parameters`.

    Args:
        bare: nothing marks the value as calls, so the arguments must be there.
    """
    entries = value if isinstance(value, list) else [value]
    calls = [_json_call(entry, bare) for entry in entries]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _json_call(entry: Any, bare: bool) -> Call | None:
    if not isinstance(entry, dict):
        return None
    for _ in range(2):
        # A tool's definition and a record of a call have further keys.
        if bare and not entry.keys() <= _OF_A_CALL | _ARGUMENTS:
            return None
        entry = entry["function"] if isinstance(entry.get("function"), dict) else entry
    name = entry.get("name", entry.get("function"))
    given = "arguments" in entry or "parameters" in entry
    # What has other keys instead is an object of the model's own.
    if not given and (bare or not entry.keys() <= _OF_A_CALL):
        return None
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else {}
    if given and arguments is None and not bare:
        arguments = {}
    if not isinstance(name, str) or not name or not is_text(name) or not isinstance(arguments, dict):
        return None
    return Call(name, dumps(arguments))


_OF_A_CALL = {"name", "function", "id", "type", "index"}
_ARGUMENTS = {"arguments", "parameters"}


def _tagged(body: str, schemas: Schemas) -> list[Call] | None:
    """Between <tool_call> tags: JSON (Hermes, Qwen), <function=…> (Qwen coder) or <arg_key> (GLM)."""
    body = body.strip()
    if body.startswith("<function="):
        return _function_tags(body, schemas)
    if "<arg_key>" in body:
        return _argument_tags(body, schemas)
    return [Call(body, "{}")] if body in schemas else json_calls(loads(body))


_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?")
_VALUE_END = re.compile(r"\n?</parameter>|\n<parameter=([^>\n]+)>")
# A value whose end is missing goes on to the next key, or to the end of the call.
_ARGUMENT = re.compile(
    r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)"
    r"(?:</arg_value>|(?=\s*<arg_key>[^<]*</arg_key>\s*<arg_value>)|\s*\Z)",
    re.DOTALL,
)


def _function_tags(body: str, schemas: Schemas) -> list[Call] | None:
    calls: list[Call] = []
    for name, inner in _FUNCTION.findall(body):
        values = _parameters(inner, schemas.get(name.strip(), {}).get("properties"))
        if values is None:
            return None
        arguments = {key: typed(value, name.strip(), key, schemas) for key, value in values.items()}
        calls.append(Call(name.strip(), dumps(arguments)))
    return calls or None


def _parameters(text: str, declared: Any) -> dict[str, str] | None:
    """The values of `<parameter=…>` tags; None if there is anything else. One that is not closed ends at the next."""
    values: dict[str, str] = {}
    while text.strip():
        begin = _PARAMETER.match(text)
        if begin is None:
            return None
        text, key = text[begin.end() :], begin[1].strip()
        for end in _VALUE_END.finditer(text):
            if end[1] is None:
                values[key], text = text[: end.start()], text[end.end() :]
                break
            following = end[1].strip()
            if following not in values and following != key and (not declared or following in declared):
                values[key], text = text[: end.start()], text[end.start() :]
                break
        else:
            values[key], text = text.removesuffix("\n"), ""
    return values


def _argument_tags(body: str, schemas: Schemas) -> list[Call] | None:
    name = body[: body.index("<arg_key>")].strip()
    pairs = _ARGUMENT.findall(body)
    if not name or not pairs:
        return None
    return [Call(name, dumps({key.strip(): typed(value, name, key.strip(), schemas) for key, value in pairs}))]


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
        calls.append(Call(match[1], dumps(arguments)))
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
        calls.append(Call(name.strip(), dumps(arguments)))
    return calls or None


def _kimi(body: str, schemas: Schemas) -> list[Call] | None:
    calls: list[Call] = []
    for piece in body.split("<|tool_call_begin|>")[1:]:
        head, separator, tail = piece.partition("<|tool_call_end|>")[0].partition("<|tool_call_argument_begin|>")
        arguments = loads(tail.strip())
        if not separator or not isinstance(arguments, dict):
            return None
        calls.append(Call(head.strip().removeprefix("functions.").rpartition(":")[0] or head.strip(), dumps(arguments)))
    return calls or None


_PYTHON_MARKERS = ("<|python_start|>", "<|python_end|>")


def _pythonic(body: str, schemas: Schemas) -> list[Call] | None:
    """Python lists of calls with keyword arguments, or calls, each on a line of its own (Llama 4, Olmo)."""
    for marker in _PYTHON_MARKERS:
        body = body.replace(marker, "")
    try:
        statements = ast.parse(body.strip()).body
        trees = [each.value if isinstance(each, ast.Expr) else None for each in statements]
        nodes = [node for tree in trees for node in (tree.elts if isinstance(tree, ast.List) else [tree])]
        calls = [_python_call(node) for node in nodes]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return calls or None


def _python_call(node: ast.expr | None) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with keyword arguments")
    if any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("keywords without a name")
    arguments = {keyword.arg: python_literal(keyword.value) for keyword in node.keywords}
    return Call(ast.unparse(node.func), dumps(arguments))


def _plain_json(body: str, schemas: Schemas) -> list[Call] | None:
    return json_calls(loads(body.strip()))


def bare_calls(body: str, schemas: Schemas) -> list[Call] | None:
    """Calls of known tools in a JSON value that nothing marks as calls."""
    calls = json_calls(loads(body.strip()), bare=True)
    known = calls and all(call.name in schemas and not _defines(call, schemas[call.name]) for call in calls)
    return calls if known else None


def _defines(call: Call, schema: Mapping[str, Any]) -> bool:
    """Whether the arguments are the schema of a tool's arguments: the model repeats which tools there are."""
    arguments, declared = loads(call.arguments), schema.get("properties") or {}
    return isinstance(arguments.get("properties"), dict) and "type" in arguments and "properties" not in declared


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
    "llama3_json": Family(starts=("<|python_tag|>",), bare=True, read=_several_json),
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
    "granite": Family(starts=("<|tool_call|>", "<tool_call>"), bare=True, read=_several_json),
    "phi4": Family(starts=("functools",), read=_several_json),
    "internlm": Family(starts=("<|action_start|><|plugin|>",), end="<|action_end|>", read=_plain_json),
    "pythonic": Family(starts=("<|python_start|>",), inner=("<|python_end|>",), whole="[", read=_pythonic),
    "olmo3": Family(starts=("<function_calls>",), end="</function_calls>", read=_pythonic),
    "harmony": Family(
        inner=("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"),
        read=_plain_json,
        harmony=True,
    ),
    "json": Family(bare=True, starts=("```json",), end="```", read=bare_calls),
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


def shown_family(chat_template: str | None) -> str | None:
    """The family whose markers are in a chat template; None if there are none."""
    return next((name for sign, name in _SIGNS if sign in (chat_template or "")), None)


def family_of(chat_template: str | None) -> str:
    """The family in whose format tool calls are read: the one that the template shows, else `hermes`."""
    return shown_family(chat_template) or "hermes"
