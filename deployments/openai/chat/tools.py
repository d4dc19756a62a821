"""The tools of a chat request: which ones the model may call, whether it must, and how a call is enforced."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.core.calls import Grammar
from deployments.core.errors import BadRequest, UnsupportedParameter, shown
from deployments.openai.fields.constraint import schema_grammar, unfollowable
from deployments.openai.fields.schema_keywords import DATA, NAMED, TYPES, check_keywords
from deployments.openai.parsing.calls import json_calls
from deployments.openai.parsing.live import LiveCalls
from deployments.openai.parsing.parts import Content, Part, Splitter
from deployments.openai.parsing.syntax import BARE
from deployments.openai.parsing.typed import loads

Mode = Literal["auto", "required", "named"]
_MAX_TOOLS = 512
_MAX_NAME = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSet:
    """The tools a request lets the model call.

    Attributes:
        definitions: OpenAI tool definitions, for the chat template.
        schemas: the JSON schema of each tool's arguments, by name.
        callable: the names the model may call; all of them but where `tool_choice` allows only some.
        mode: whether the model is free to call, must call, or must call the one tool in `callable`.
        parallel: several calls in one answer are wanted.
    """

    definitions: Sequence[Mapping[str, Any]]
    schemas: Mapping[str, Mapping[str, Any]]
    callable: tuple[str, ...]
    mode: Mode = "auto"
    parallel: bool = True

    @property
    def forced(self) -> bool:
        return self.mode != "auto"

    def grammar(self) -> Grammar | None:
        """The JSON that a forced answer consists of: the arguments of the named tool, or a list of calls."""
        if self.mode == "auto":
            return None
        definitions = {name: rebased(self.schemas[name], f"#/$defs/{escaped(name)}") for name in self.callable}
        if self.mode == "named":
            root: dict[str, Any] = {"$ref": f"#/$defs/{escaped(self.callable[0])}"}
        else:
            root = {"type": "array", "minItems": 1, "items": {"anyOf": [_call_schema(name) for name in self.callable]}}
            if not self.parallel:
                root["maxItems"] = 1
        return schema_grammar({**root, "$defs": definitions}, "tools")


def read_tools(tools: Sequence[object] | None, choice: object, parallel: bool) -> ToolSet | None:
    """The tools of a request; None where the model is to call none.

    Args:
        tools: the request's `tools`.
        choice: its `tool_choice`.
        parallel: its `parallel_tool_calls`.

    Raises:
        BadRequest: a tool or the choice is malformed, or names a tool that is not there.
        UnsupportedParameter: a tool is not a function.
    """
    definitions = [_definition(tool, f"tools[{index}]") for index, tool in enumerate(tools or ())]
    for index, tool in enumerate(definitions):
        if tool["function"].get("strict") is True and choice != "none":
            _check_strict(tool, f"tools[{index}].function.parameters")
    if len(definitions) > _MAX_TOOLS:
        raise BadRequest(f"Invalid 'tools': at most {_MAX_TOOLS}; got {len(definitions)}.", param="tools")
    schemas = _schemas(definitions)
    mode, names = _choice(choice, schemas)
    for index, name in enumerate(schemas):
        if mode in ("required", "named") and name in names:
            check_keywords(schemas[name], f"tools[{index}].function.parameters")
    if mode == "none" or not definitions:
        return None
    return ToolSet(definitions=definitions, schemas=schemas, callable=names, mode=mode, parallel=parallel)


def _schemas(definitions: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool, by its name; in the order of the tools."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(definitions):
        if (name := tool["function"]["name"]) in schemas:
            raise BadRequest(
                f"Invalid 'tools[{index}].function.name': another tool is named {shown(name)}; rename one of them.",
                param=f"tools[{index}].function.name",
            )
        schemas[name] = _parameters(tool)
    return schemas


def _definition(tool: object, place: str) -> Mapping[str, Any]:
    if not isinstance(tool, Mapping):
        raise BadRequest(f"Invalid '{place}': input should be an object; got {shown(tool)}.", param=place)
    kind = tool.get("type", "function")
    if kind != "function":
        raise UnsupportedParameter(
            f"This server does not support '{place}' of type {shown(kind)}; use functions.", param=f"{place}.type"
        )
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise BadRequest(
            f"Invalid '{place}.function': input should be an object with a name of 1 to {_MAX_NAME} characters; got "
            f"{shown(function)}.",
            param=f"{place}.function",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise BadRequest(
            f"Invalid '{place}.function.parameters': input should be a JSON schema; got {shown(parameters)}.",
            param=f"{place}.function.parameters",
        )
    kind = (parameters or {}).get("type")
    if isinstance(kind, str) and kind not in TYPES:
        raise BadRequest(
            f"Invalid '{place}.function.parameters.type': the arguments of a tool are an object; got {shown(kind)}.",
            param=f"{place}.function.parameters.type",
        )
    for key, kind_of in (("description", str), ("strict", bool)):
        if not isinstance(function.get(key), kind_of | None):
            raise BadRequest(
                f"Invalid '{place}.function.{key}': input should be a {'string' if kind_of is str else 'boolean'}; "
                f"got {shown(function[key])}.",
                param=f"{place}.function.{key}",
            )
    cleaned = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": cleaned}


def _check_strict(tool: Mapping[str, Any], place: str) -> None:
    """Refuse a schema that could not be held to, if the tool asks for that."""
    problem = unfollowable(_parameters(tool), place)
    if problem is not None:
        raise BadRequest(
            f"Invalid '{place}': strict is true, but no grammar can hold this schema: {problem}. Change the schema or "
            "leave strict out.",
            param=place,
        )


def _parameters(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters = tool["function"].get("parameters") or {"properties": {}}
    return {**parameters, "type": "object"}


def _choice(choice: object, schemas: Mapping[str, Any]) -> tuple[Mode | Literal["none"], tuple[str, ...]]:
    names = tuple(schemas)
    if choice is None or choice == "auto":
        return "auto", names
    if choice == "none":
        return "none", ()
    if choice == "required":
        if not names:
            raise BadRequest("Invalid 'tool_choice': required needs 'tools'.", param="tool_choice")
        return "required", names
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), names)
    name = None
    if isinstance(choice, Mapping) and choice.get("type", "function") == "function":
        name = _name_of(choice)
    if not isinstance(name, str):
        raise BadRequest(
            "Invalid 'tool_choice': input should be none, auto, required, or "
            f'{{"type": "function", "function": {{"name": …}}}}; got {shown(choice)}.',
            param="tool_choice",
        )
    return "named", (_known(name, names),)


def _allowed(allowed: object, names: tuple[str, ...]) -> tuple[Mode, tuple[str, ...]]:
    tools = allowed.get("tools") if isinstance(allowed, Mapping) else None
    mode = allowed.get("mode") if isinstance(allowed, Mapping) else None
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise BadRequest(
            "Invalid 'tool_choice.allowed_tools': input should have a mode (auto, required) and tools.",
            param="tool_choice",
        )
    chosen = [_known(_name_of(tool), names) for tool in tools]
    return ("required" if mode == "required" else "auto"), tuple(chosen)


def _name_of(tool: object) -> object:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return function.get("name") if isinstance(function, Mapping) else None


def _known(name: object, names: tuple[str, ...]) -> str:
    if not isinstance(name, str) or name not in names:
        raise BadRequest(
            f"Invalid 'tool_choice': no tool is named {shown(name)}; there are {', '.join(names) or 'none'}.",
            param="tool_choice",
        )
    return name


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": {"$ref": f"#/$defs/{escaped(name)}"}},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def escaped(name: str) -> str:
    """A key as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def rebased(schema: Any, base: str) -> Any:
    """A schema whose references to itself are right where the schema stands at `base`."""
    if isinstance(schema, list):
        return [rebased(item, base) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    # A document of its own no longer: what names it would change what references mean.
    moved = {key: _keyword(key, value, base) for key, value in schema.items() if key not in ("$schema", "$id")}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = base + reference[1:]
    return moved


def _keyword(key: str, value: Any, base: str) -> Any:
    """The value of a schema's keyword: data, schemas by name, a schema or a list of them."""
    if key in DATA:
        return value
    if key in NAMED and isinstance(value, Mapping):
        return {name: rebased(each, base) for name, each in value.items()}
    return rebased(value, base)


class CallsAlone:
    """Reads an answer that has to be calls in the model's own format: the beginning of one is not text for a reader."""

    def __init__(self, reader: Splitter) -> None:
        self._reader = reader

    def feed(self, text: str) -> list[Part]:
        return [part for part in self._reader.feed(text) if not isinstance(part, Content)]

    def finish(self) -> list[Part]:
        return [part for part in self._reader.finish() if not isinstance(part, Content)]


class ForcedCalls:
    """Reads an answer that a grammar made tool calls. Of one cut off it gives the calls that are complete, and no more:
    the beginning of a call is not text for a reader.

    Args:
        least: None gives whole calls alone; else their arguments come while they are written.
    """

    def __init__(self, tools: ToolSet, least: int | None) -> None:
        self._named = tools.mode == "named"
        # The answer is what stands after the name.
        self._text = f'{{"name": {json.dumps(tools.callable[0])}, "arguments": ' if self._named else ""
        self._live = None if least is None else LiveCalls((BARE,), tools.schemas)

    def feed(self, text: str) -> list[Part]:
        self._text += text
        return [] if self._live is None else self._live.more(self._text)

    def finish(self) -> list[Part]:
        calls = json_calls(loads(self._text + "}") if self._named else _complete_items(self._text))
        return [*calls] if self._live is None else self._live.rest(calls, self._text)


def _complete_items(text: str) -> list[Any]:
    """The items of a JSON array that are complete, though the array may be cut off."""
    decoder, items = json.JSONDecoder(), []
    rest = text.lstrip().removeprefix("[").lstrip()
    while rest.startswith("{"):
        try:
            item, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            break
        items.append(item)
        rest = rest[end:].lstrip().removeprefix(",").lstrip()
    return items
