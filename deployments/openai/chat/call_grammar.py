"""A grammar of tool calls in the model's own format, from the declaration that also reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.core.calls import Grammar
from deployments.openai.chat.tools import ToolSet, escaped, rebased
from deployments.openai.parsing.cursor import ANY
from deployments.openai.parsing.syntax import CallSyntax

# The white space that models are trained to write.
_SPACED = {"x-guidance": {"whitespace_flexible": False, "key_separator": ": ", "item_separator": ", "}}
# What a text in quotes other than JSON's cannot be held to.
_FREE = {"pattern", "format", "minLength", "const", "$ref", "anyOf", "oneOf", "allOf"}
_BARE_KEY = re.compile(r"[^\W\d][\w.\-]*")
_LONG = 500
_CONSTRAINTS = {"regex": "/{}/", "json_schema": "%json {}", "json_object": '%json {{"type": "object"}}'}


def call_grammar(syntax: CallSyntax, tools: ToolSet, other: Grammar | None = None) -> Grammar | None:
    """The grammar of an answer to a request with tools; None if the answer is free.

    Args:
        other: what an answer follows that makes no calls.
    """
    writer = _Writer(syntax, tools)
    if tools.forced:
        return writer.grammar(writer.calls())
    if other is not None:
        return writer.grammar(f"{writer.calls()} | {writer.constraint(other)}")
    if syntax.begins and any(tool["function"].get("strict") for tool in tools.definitions):
        marker = syntax.starts[0]
        return writer.grammar(f"{writer.part('free', marker)} | {writer.part('text', marker)} {writer.calls(marker)}")
    return None


class _Writer:
    """Writes rules in Lark. Markers are rules of their own, which the engine fills: it knows which texts are tokens."""

    def __init__(self, syntax: CallSyntax, tools: ToolSet) -> None:
        self._syntax = syntax
        self._tools = tools
        self._rules: list[str] = []
        self._parts: dict[str, tuple[str, str]] = {}

    def grammar(self, start: str) -> Grammar:
        source = {"lark": "\n".join([f"start: {start}", *self._rules]), "parts": self._parts}
        return Grammar(kind="calls", source=json.dumps(source), param="tools")

    def calls(self, begun: str = "") -> str:
        """One call, or several where they may be parallel.

        Args:
            begun: what the text has of them already.
        """
        syntax = self._syntax
        section, opening = syntax.section.removeprefix(begun), syntax.open.removeprefix(begun)
        several = self._tools.parallel and self._tools.mode != "named" and not syntax.alone
        if syntax.several:
            return f"{self._marker(opening)} {self._list(several)} {self._marker(syntax.close, 'close')}"
        call = self._rule(" | ".join(self._call(name, syntax.open) for name in self._tools.callable))
        first = call
        if opening != syntax.open:
            first = self._rule(" | ".join(self._call(name, opening) for name in self._tools.callable))
        if syntax.shape == "python":
            more = f"({json.dumps(', ' if syntax.listed else chr(10))} {call})*" if several else ""
            inner = f'"[" {call} {more} "]"' if syntax.listed else f"{call} {more}"
            return f"{self._marker(opening)} {inner} {self._marker(syntax.close, 'close')}"
        separator, end = self._marker(syntax.separator), self._marker(syntax.section_end, "close")
        around = self._marker(section)
        if syntax.each:
            first = self._rule(f"{around} {first} {end}")
            call = self._rule(f"{self._marker(syntax.section)} {call} {end}")
            around = end = ""
        return f"{around} {first} {f'({separator} {call})*' if several else ''} {end}"

    def constraint(self, grammar: Grammar) -> str:
        """Another constraint as a part of this grammar."""
        if grammar.kind == "choice":
            return " | ".join(map(json.dumps, json.loads(grammar.source)))
        source = grammar.source.replace("/", "\\/") if grammar.kind == "regex" else grammar.source
        return self._rule(_CONSTRAINTS[grammar.kind].format(source))

    def _call(self, name: str, opening: str) -> str:
        syntax, schema = self._syntax, self._tools.schemas[name]
        around = (self._marker(opening), self._marker(syntax.close, "close"))
        match syntax.shape:
            case "json":
                return self._rule(f"{around[0]} {_json(_call_schema(syntax, name, schema))} {around[1]}")
            case "named":
                inner = f"{json.dumps(name)} {self._marker(syntax.gap)} {self._object(schema)}"
            case "tagged" | "lines":
                inner = f"{json.dumps(name)} {self._marker(syntax.gap)} {self._arguments(schema, self._tagged)}"
            case "python":
                return self._rule(f'{json.dumps(name + "(")} {self._arguments(schema, self._keyword, ", ")} ")"')
        return self._rule(f"{around[0]} {inner} {around[1]}")

    def _list(self, several: bool) -> str:
        """A JSON list of calls."""
        names, schemas = self._tools.callable, self._tools.schemas
        items = [_call_schema(self._syntax, name, {"$ref": f"#/$defs/{escaped(name)}"}) for name in names]
        definitions = {name: rebased(schemas[name], f"#/$defs/{escaped(name)}") for name in names}
        array: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items}, "$defs": definitions}
        return self._rule(_json(array if several else {**array, "maxItems": 1}))

    def _arguments(self, schema: Mapping[str, Any], write: Any, separator: str = "") -> str:
        """The arguments in their order; those that are not required may be left out."""
        properties = list((schema.get("properties") or {}).items())
        properties = sorted(properties, key=lambda each: each[0]) if self._syntax.sorts else properties
        required = set(schema.get("required") or ())
        between = json.dumps(separator) if separator else ""
        nothing = '""'
        # What follows, after an argument and where none has come yet.
        after = first = ""
        for key, described in reversed(properties):
            argument = write(key, described, schema)
            present, opening = f"{between} {argument} {after}", f"{argument} {after}"
            optional = key not in required
            after, first = (
                self._rule(f"{present} | {after or nothing}" if optional else present),
                self._rule(f"{opening} | {first or nothing}" if optional else opening),
            )
        return first

    def _object(self, schema: Mapping[str, Any]) -> str:
        """Arguments as JSON, or as it is with bare keys and other quotes."""
        keys = schema.get("properties")
        if not self._syntax.quote or keys is None or not all(map(_BARE_KEY.fullmatch, keys)):
            return _json(schema)
        return f'"{{" {self._arguments(schema, self._pair, ",")} "}}"'

    def _pair(self, key: str, described: Any, root: Mapping[str, Any]) -> str:
        return f"{json.dumps(key + ':')} {self._quoted(described, root)}"

    def _quoted(self, described: Any, root: Mapping[str, Any]) -> str:
        """A value, a text in the quotes of the format."""
        quote, named = self._syntax.quote, _named(described)
        free = isinstance(described, Mapping) and described.get("type") == "string" and _FREE.isdisjoint(described)
        if not quote or not free or any(quote in each or "\\" in each for each in named):
            return self._json_of(described, root)
        around = self._marker(quote)
        if named:
            return f"{around} ({' | '.join(map(json.dumps, named))}) {around}"
        if len(quote) > 1:
            return f"{around} {self.part('text', quote)}"
        most = f"{{0,{described['maxLength']}}}" if described.get("maxLength", _LONG) < _LONG else "*"
        return f"{around} /([^{quote}\\\\\n]|\\\\[{quote}\\\\n]){most}/ {around}"

    def _tagged(self, key: str, described: Any, root: Mapping[str, Any]) -> str:
        syntax = self._syntax
        close = syntax.value_close.replace(ANY, key)
        text = _is_text(described)
        if syntax.shape == "lines":
            value = self._json_of(described, root) if syntax.quote else self._value(described, root)
            value = r"/[^\s\"'\[{][^\n]*/" if text and not syntax.quote else value
            return f'{self._marker(syntax.key_open + key + syntax.key_close)} {value} "\\n"'
        if not text:
            value = f"{self._value(described, root)} {self.part('close', close)}"
        elif syntax.cdata:
            marked = f'"<![CDATA[" /[^<&\\n\\]]*[<&\\n]/ {self.part("text", "]]>")}'
            value = f"(/[^<&\\n]*/ | {marked}) {self.part('close', close)}"
        elif close:
            value = self.part("text", close)
        else:
            # What ends it is the next marker.
            ends = {marker.strip()[0] for marker in (syntax.key_open, syntax.close)}
            value = f"/[^{re.escape(''.join(ends))}]*/"
        after = self._marker(syntax.key_close.replace(ANY, self._kind(described)) if syntax.kinds else syntax.key_close)
        return f"{self._marker(syntax.key_open)} {json.dumps(key)} {after} {value}"

    def _kind(self, described: Any) -> str:
        """What says before a value of which type it is."""
        text, number = self._syntax.kinds
        kind = described.get("type") if isinstance(described, Mapping) else None
        if _is_text(described) or kind == "string":
            return text
        return kind if text == "string" and kind in ("boolean", "array", "object", "null") else number

    def _keyword(self, key: str, described: Any, root: Mapping[str, Any]) -> str:
        kind = described.get("type") if isinstance(described, Mapping) else None
        literals = {"boolean": '("True" | "False")', "null": '"None"'}
        return f"{json.dumps(key + '=')} {literals.get(str(kind)) or self._quoted(described, root)}"

    def _value(self, described: Any, root: Mapping[str, Any]) -> str:
        """A value as bare text."""
        if named := _named(described):
            return f"({' | '.join(map(json.dumps, named))})"
        return self._json_of(described, root)

    def _json_of(self, described: Any, root: Mapping[str, Any]) -> str:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return self._rule(_json({**described, **definitions} if isinstance(described, Mapping) else {}))

    def _marker(self, text: str, kind: str = "marker") -> str:
        """A marker as rules; `…` in it is an id."""
        parts = [self.part(kind, part) if part else "" for part in text.split(ANY)]
        return f" /{self._syntax.ids}/ ".join(parts)

    def part(self, kind: str, text: str) -> str:
        known = next((name for name, part in self._parts.items() if part == (kind, text)), None)
        name = known or f"part_{len(self._parts)}"
        self._parts[name] = (kind, text)
        return name

    def _rule(self, body: str) -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name


def _json(schema: Any) -> str:
    return f"%json {json.dumps({**schema, **_SPACED})}"


def _named(described: Any) -> list[str]:
    """The texts that a schema lists; none if it lists other values as well."""
    listed = described.get("enum") if isinstance(described, Mapping) else None
    return listed if isinstance(listed, list) and all(isinstance(each, str) for each in listed) else []


def _is_text(described: Any) -> bool:
    """Whether a value is written as it is: any text may stand there."""
    if not isinstance(described, Mapping) or "enum" in described or "const" in described or "anyOf" in described:
        return not isinstance(described, Mapping)
    kinds = described.get("type")
    return "$ref" not in described and (kinds is None or "string" in (kinds if isinstance(kinds, list) else [kinds]))


def _call_schema(syntax: CallSyntax, name: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a call."""
    known: dict[str, Any] = {syntax.name: {"const": name}, syntax.arguments: _placed(schema, syntax.arguments)}
    properties = {key: known.get(key, {"type": "string", "pattern": f"^{syntax.ids}$"}) for key in syntax.keys or known}
    if not syntax.name:
        properties = {name: _placed(schema, name)}
    required: Sequence[str] = list(properties)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _placed(schema: Mapping[str, Any], key: str) -> Any:
    """A schema that stands at a property of another one."""
    return schema if set(schema) == {"$ref"} else rebased(schema, f"#/properties/{escaped(key)}")
