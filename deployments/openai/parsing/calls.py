"""Reads tool calls in a declared form."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deployments.openai.parsing.arguments import KEY, read_arguments
from deployments.openai.parsing.cursor import ANY, FENCE, QUOTES, Cursor, Incomplete, Unreadable
from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.syntax import BARE, UNDECLARED, CallSyntax
from deployments.openai.parsing.typed import Schemas, dumps, is_text, loads

_NAME = re.compile(r"[\w.\-/]+")
# What may stand between a name and its arguments beside what is declared: an id, a fence.
_BETWEEN = re.compile(r"[\s\w:.\-]{0,80}(?:```(?:json)?\s*)?")
_NUMBER = re.compile(r"(?:\d{1,3}[.):]|[-*])\s")
_FENCE = re.compile(FENCE)
_HEAD = re.compile(r'\{\s*"(?P<key>\w+)"\s*:\s*"(?P<name>[\w.\-/]+)"\s*,\s*"(?P<held>\w+)"\s*:\s*(?=\{)')
_KEYED = re.compile(r'\{\s*"(?P<name>[\w.\-/]+)"\s*:\s*(?=\{)')
# Markup before a call of no declared form and after it, and what may be the beginning of such markup.
_MARKUP = re.compile(r"<(?!/)[^<>\n]{1,100}>|\[[A-Z_]{2,40}\]|function(?=<)|functools(?=\[)")
_END = re.compile(r"</[^<>\n]{1,100}>|<[^<>\n]{0,60}(?:end|END|suffix)[^<>\n]{0,40}>|```")
_MARKUP_BEGUN = re.compile(r"<[^<>\n]{0,100}|\[[A-Z_]{0,40}|`{1,2}|[a-z]{0,9}")
_MOST_MARKUP = 8
_NAME_IN_TAG = re.compile(r"""=\s*["']?([\w.\-]+)""")
_NAME_AS_TAG = re.compile(r"<function=[\w.\-]+>")
_TAG = re.compile(r"<([^\s=>]+)")
_LIST = re.compile(r"\[\s*(?=\w)")
_FILLING = re.compile(r"""(?:(?!</)[^{}()"']){0,120}""")
_NAMES = ("name", "function", "tool_name", "tool")
_LISTS = ("tool_calls", "function_calls", "calls")
_ARGUMENTS = ("arguments", "parameters")
_OF_A_CALL = {*_NAMES, "id", "type", "index", "tool_call_id"}


def read_calls(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """The calls that begin at the cursor, which is moved after them.

    Raises:
        Incomplete: more text decides whether these are calls.
        Unreadable: they are none.
    """
    if syntax.section:
        cursor.maybe(syntax.section)
    if syntax.quote:
        cursor.quotes = (syntax.quote, *QUOTES)
    fenced = not syntax.begins and cursor.skip(_FENCE)
    if fenced:
        syntax = replace(syntax, close="```")
    cursor.expect(syntax.open)
    try:
        calls = _READERS[syntax.shape](cursor, syntax, schemas)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if syntax.shape not in ("tagged", "lines"):
        cursor.closing(syntax.close)
    if syntax.section and not syntax.open and syntax.shape in ("json", "named"):
        calls += _more(cursor, syntax, schemas)
    # What nothing marks is a call only if its tool is there.
    bare = not syntax.begins and syntax.shape != "any"
    if bare and any(call.name not in schemas or _defines(call, schemas[call.name]) for call in calls):
        raise Unreadable("a tool that is not there")
    return calls


def _more(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """The other calls of a section, where nothing marks each of them."""
    calls: list[Call] = []
    while True:
        place = cursor.place
        cursor.maybe(syntax.separator)
        try:
            calls += _READERS[syntax.shape](cursor, syntax, schemas)
        except (Unreadable, ValueError):
            cursor.place = place
            return calls


def call_start(cursor: Cursor, syntax: CallSyntax, *, again: bool) -> str:
    """The name of the call at the cursor, which is moved to the object of its arguments.

    Args:
        again: the cursor is after the arguments of another call of the same list.

    Raises:
        Incomplete: more text is needed.
        Unreadable: the arguments are not an object that follows the name.
    """
    if again:
        cursor.expect("}")
        cursor.expect(",")
    else:
        cursor.maybe(syntax.section)
        cursor.expect(syntax.open)
    if syntax.shape == "named" and not again:
        return _start(cursor, syntax, {})
    if syntax.shape != "json":
        raise Unreadable(syntax.shape)
    cursor.maybe("[")
    cursor.space()
    found = (_HEAD if syntax.name else _KEYED).match(cursor.text, cursor.place)
    keys = found.groupdict() if found else {}
    known = (syntax.name, *_NAMES), (syntax.arguments, *_ARGUMENTS)
    if found is None or (syntax.name and (keys["key"] not in known[0] or keys["held"] not in known[1])):
        raise Unreadable("a call")
    cursor.place = found.end()
    return str(keys["name"])


def json_calls(value: Any, syntax: CallSyntax = BARE, *, bare: bool = False) -> list[Call] | None:
    """Calls from parsed JSON: one object or a list of objects with `name` and `arguments` or `parameters`.

    Args:
        syntax: says what the keys are called.
        bare: nothing marks the value as calls, so the arguments must be there.
    """
    if isinstance(value, dict) and (held := [value[key] for key in _LISTS if isinstance(value.get(key), list)]):
        value = held[0]
    entries = value if isinstance(value, list) else [value]
    calls = [_json_call(entry, syntax, bare) for entry in entries]
    found = [call for call in calls if call is not None]
    return found if found and len(found) == len(calls) else None


def _json_call(entry: Any, syntax: CallSyntax, bare: bool) -> Call | None:
    if not isinstance(entry, dict):
        return None
    if not syntax.name:
        name, arguments = next(iter(entry.items())) if len(entry) == 1 else ("", None)
        return call_of(name, arguments)
    keys = {syntax.arguments, *_ARGUMENTS}
    for _ in range(2):
        # A tool's definition and a record of a call have further keys.
        if bare and not entry.keys() <= {syntax.name, *_OF_A_CALL, *keys}:
            return None
        entry = entry["function"] if isinstance(entry.get("function"), dict) else entry
    name = next((entry[key] for key in (syntax.name, *_NAMES) if key in entry), None)
    given = [key for key in (syntax.arguments, *_ARGUMENTS) if key in entry]
    # What has other keys instead is an object of the model's own.
    if not given and (bare or not entry.keys() <= {syntax.name, *_OF_A_CALL}):
        return None
    arguments = entry[given[0]] if given else {}
    return call_of(name, {} if arguments is None and not bare else arguments)


def call_of(name: Any, arguments: Any) -> Call | None:
    """A call, whose arguments may be JSON in a string; None if they are not an object."""
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not is_text(name) or not isinstance(arguments, dict):
        return None
    return Call(name, dumps(arguments))


def _json(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    calls = json_calls(cursor.value(), syntax, bare=not syntax.begins)
    if not calls:
        raise Unreadable("no call")
    return calls


def _named(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    name = _start(cursor, syntax, schemas)
    return [Call(name, dumps(cursor.value()))]


def _start(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> str:
    """The name before arguments in JSON."""
    name = _name(cursor, schemas)
    if not cursor.maybe(syntax.gap):
        for part in syntax.gap_parts:
            cursor.maybe(part)
    cursor.pass_over(_BETWEEN, "{")
    return name


def _tagged(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    name = _name(cursor, schemas)
    cursor.expect(syntax.gap)
    values = dict(read_arguments(cursor, syntax, name, schemas))
    if not values and not syntax.gap and name not in schemas:
        raise Unreadable(name)
    return [Call(name, dumps(values))]


def _name(cursor: Cursor, schemas: Schemas) -> str:
    cursor.skip(_NUMBER)
    name = cursor.match(_NAME)
    return name if name in schemas else name.removeprefix("functions.")


def _python(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """A list of calls, or calls one after the other."""
    listed = cursor.maybe("[")
    calls = [_python_call(cursor)]
    while not (cursor.maybe("]") if listed else cursor.at_end or (syntax.close and cursor.maybe(syntax.close))):
        cursor.maybe(",")
        if listed and cursor.maybe("]"):
            break
        if not listed and not syntax.close:
            break
        calls.append(_python_call(cursor))
    return calls


def _python_call(cursor: Cursor) -> Call:
    name = cursor.match(_NAME)
    cursor.expect("(")
    arguments: dict[str, Any] = {}
    while not cursor.maybe(")"):
        key = cursor.match(KEY)
        cursor.expect("=")
        arguments[key] = cursor.value()
        if not cursor.maybe(","):
            cursor.expect(")")
            break
    return Call(name, dumps(arguments))


def _any(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """Calls in whatever form follows markup."""
    first = markup = _markup(cursor, _MARKUP)
    if not first:
        raise Unreadable("no markup")
    for _ in range(_MOST_MARKUP):
        named = _NAME_IN_TAG.search(markup)
        # XML, which a model may write for another reason, does not have `<function=NAME>`.
        if named and (named[1] in schemas or _NAME_AS_TAG.fullmatch(markup)):
            tags = replace(_in_tags(cursor, markup, named), section_end=_closing(first))
            calls = _tagged(cursor, tags, schemas)
            break
        markup = _markup(cursor, _MARKUP)
    else:
        calls = _after_markup(cursor, first, schemas)
    while _markup(cursor, _END):
        pass
    return calls


def _markup(cursor: Cursor, pattern: re.Pattern[str]) -> str:
    """The markup at the cursor, which is moved after it; empty if there is none."""
    cursor.space()
    if not cursor.final and _MARKUP_BEGUN.fullmatch(cursor.text, cursor.place):
        raise Incomplete
    found = pattern.match(cursor.text, cursor.place)
    cursor.place = found.end() if found else cursor.place
    return found[0] if found else ""


def _in_tags(cursor: Cursor, markup: str, named: re.Match[str]) -> CallSyntax:
    """The form of a call whose name is in a tag, at the name: the first argument shows that of all."""
    start = cursor.place - len(markup) + named.start(1)
    key = _NAME_IN_TAG.search(argument := _markup(cursor, _MARKUP))
    cursor.place = start
    found = CallSyntax(shape="tagged", gap=markup[named.end(1) :], close=_closing(markup))
    if key is None:
        return replace(found, key_open=_closing(markup))
    # What else the tag says, of a type for example, may differ from one argument to the next.
    rest, more, _ = argument[key.end(1) :].partition(" ")
    close = f"{rest}{ANY}>\n" if more else f"{rest}\n"
    return replace(found, key_open=argument[: key.start(1)], key_close=close, value_close=f"\n{_closing(argument)}")


def _closing(tag: str) -> str:
    """The tag that closes what a tag opens; empty if it is not a tag."""
    found = _TAG.match(tag)
    return f"</{found[1]}>" if found else ""


def _after_markup(cursor: Cursor, first: str, schemas: Schemas) -> list[Call]:
    """The calls after their markup: in JSON, in Python, or with the name first."""
    start = cursor.place
    try:
        return _json(cursor, UNDECLARED, schemas)
    except Unreadable:
        cursor.place = start
    cursor.skip(_LIST)
    name, place = _name(cursor, schemas), cursor.place
    key = _markup(cursor, _MARKUP)
    if "key" in key:
        cursor.place = start
        value = key.replace("key", "value")
        tags = CallSyntax(
            shape="tagged",
            key_open=key,
            key_close=f"{_closing(key)} {value}",
            value_close=_closing(value),
            close=_closing(first),
        )
        return _tagged(cursor, tags, schemas)
    # A word after markup is a name only if there is such a tool.
    if name not in schemas:
        raise Unreadable(name)
    cursor.place = place
    if cursor.text.startswith("(", place):
        cursor.place = start
        return _python(cursor, UNDECLARED, schemas)
    if not key and "call" in first and cursor.maybe(_closing(first)):
        return [Call(name, "{}")]
    cursor.pass_over(_FILLING, "{")
    return [Call(name, dumps(cursor.value()))]


def _defines(call: Call, schema: Mapping[str, Any]) -> bool:
    """Whether the arguments are the schema of a tool's arguments: the model repeats which tools there are."""
    arguments, declared = loads(call.arguments), schema.get("properties") or {}
    return isinstance(arguments.get("properties"), dict) and "type" in arguments and "properties" not in declared


_READERS = {"json": _json, "named": _named, "tagged": _tagged, "lines": _tagged, "python": _python, "any": _any}
