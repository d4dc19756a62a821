"""Reads tool calls in a declared form."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import regex

from deployments.openai.parsing.arguments import KEY, read_arguments
from deployments.openai.parsing.cursor import ANY, FENCE, Cursor, Unreadable, pattern_of
from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.syntax import BARE, UNDECLARED, CallSyntax
from deployments.openai.parsing.typed import Schemas, dumps, is_text, loads

_NAME = regex.compile(r"[\w.\-/]++")
# What may stand before a name: the number of a call in a list.
_NUMBER = r"\s*(?:(?:\d{1,3}[.):]|[-*])\s)?+\s*"
# What may stand between a name and its arguments beside what is declared: an id, a fence.
_BETWEEN = r"[\s\w:.\-]{0,80}(?:```(?:json)?\s*)?"
_FENCE = regex.compile(rf"\s*+{FENCE}")
_MORE = regex.compile(r"[\s,;]*(?=\{)")
# Markup before a call of no declared form, and after it.
_MARKUP = regex.compile(r"\s*(<{1,2}(?!/)[^<>\n]{1,100}>{1,2}|\[[A-Z_]{2,40}\]|function(?=<)|functools(?=\[))")
_END = regex.compile(r"\s*(</[^<>\n]{1,100}>|<[^<>\n]{0,60}(?:end|END|suffix)[^<>\n]{0,40}>|```)")
_NAME_IN_TAG = regex.compile(r"""=\s*["']?([\w.\-]+)""")
_TAG = regex.compile(r"<([^\s=>]+)")
_LIST = regex.compile(r"\s*(?:\[\s*)?(?=[\w\-])")
_FILLING = regex.compile(r"""(?:(?!</)[^{}()"']){0,120}(?=\{)""")
_LISTS = ("tool_calls", "function_calls", "calls")
NAME_KEYS = ("name", "function", "tool_name", "tool")
ARGUMENT_KEYS = ("arguments", "parameters")
"""What the keys of a call in JSON may be beside those that are declared."""
_OF_A_CALL = {*NAME_KEYS, "id", "type", "index", "tool_call_id"}


def read_calls(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """The calls that begin at the cursor, which is moved after them.

    Raises:
        Incomplete: more text decides whether these are calls.
        Unreadable: they are none.
    """
    cursor.maybe(syntax.section)
    if not syntax.begins and cursor.take(_FENCE):
        syntax = replace(syntax, close="```")
    cursor.expect(syntax.open)
    calls = _read(cursor, syntax, schemas)
    while syntax.section and not syntax.open and syntax.shape in ("json", "named"):
        # Nothing marks each of the calls of this section.
        place = cursor.place
        try:
            cursor.maybe(syntax.separator)
            calls += _read(cursor, syntax, schemas)
        except Unreadable:
            cursor.place = place
            break
    # What nothing marks is a call only if its tool is there.
    bare = not syntax.begins and syntax.shape != "any" and "<|" not in syntax.gap
    if bare and any(call.name not in schemas or _defines(call, schemas[call.name]) for call in calls):
        raise Unreadable("a tool that is not there")
    return calls


def _read(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """The calls after what opens them."""
    try:
        calls = _READERS[syntax.shape](cursor, syntax, schemas)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    if not calls:
        raise Unreadable("no call")
    if syntax.shape not in ("tagged", "lines"):
        cursor.closing(syntax.close)
    return calls


def _name(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> str:
    """The name of a call, whose arguments are next."""
    found = cursor.take(head_of(syntax))
    if found is None:
        raise Unreadable("a name")
    name = str(found["name"])
    return name if name in schemas else name.removeprefix("functions.")


@functools.lru_cache(maxsize=256)
def head_of(syntax: CallSyntax) -> regex.Pattern[str]:
    """A pattern of what stands before the arguments of a call."""
    after = rf"{pattern_of(syntax.gap)}(?=.)"
    if syntax.shape == "named":
        parts = "".join(f"(?:{pattern_of(part)})?" for part in syntax.gap.split(ANY))
        after = rf"(?:{pattern_of(syntax.gap)}|{parts}){_BETWEEN}(?=\{{)"
    return regex.compile(rf"{_NUMBER}(?P<name>{_NAME.pattern}){after}", regex.DOTALL)


def json_calls(value: Any, syntax: CallSyntax = BARE, *, bare: bool = False) -> list[Call]:
    """Calls from parsed JSON: one object or a list of objects with `name` and `arguments` or `parameters`.

    Empty if one of them is not a call.

    Args:
        syntax: says what the keys are called.
        bare: nothing marks the value as calls, so the arguments must be there.
    """
    if isinstance(value, dict) and (held := [value[key] for key in _LISTS if isinstance(value.get(key), list)]):
        value = held[0]
    entries = value if isinstance(value, list) else [value]
    calls = [call for entry in entries if (call := _json_call(entry, syntax, bare)) is not None]
    return calls if len(calls) == len(entries) else []


def _json_call(entry: Any, syntax: CallSyntax, bare: bool) -> Call | None:
    if not isinstance(entry, dict):
        return None
    if not syntax.name:
        name, arguments = next(iter(entry.items())) if len(entry) == 1 else ("", None)
        return _call_of(name, arguments)
    keys = (syntax.arguments, *ARGUMENT_KEYS)
    inner = entry.get("function")
    entry = {**entry, **inner} if isinstance(inner, dict) else entry
    name = next((entry[key] for key in (syntax.name, *NAME_KEYS) if isinstance(entry.get(key), str)), None)
    given = [entry[key] for key in keys if key in entry]
    # A tool's definition and a record of a call have further keys; what has them instead is the model's own object.
    further = not entry.keys() <= {syntax.name, *_OF_A_CALL, *keys}
    if (bare and (further or not given)) or (further and not given):
        return None
    arguments = given[0] if given else {}
    return _call_of(name, {} if arguments is None and not bare else arguments)


def _call_of(name: Any, arguments: Any) -> Call | None:
    """A call, whose arguments may be JSON in a string; None if they are not an object."""
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not is_text(name) or not isinstance(arguments, dict):
        return None
    return Call(name, dumps(arguments))


def _json(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    fenced = syntax.begins and cursor.take(_FENCE)
    calls = json_calls(cursor.value(), syntax, bare=not syntax.begins)
    # A model may write several calls between the markers of one.
    while calls and syntax.open.strip() and syntax.close.strip() and cursor.take(_MORE):
        place = cursor.place
        try:
            calls += json_calls(cursor.value(), syntax)
        except Unreadable:
            cursor.place = place
            break
    if fenced:
        cursor.maybe("```")
    return calls


def _named(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    name = _name(cursor, syntax, schemas)
    return [Call(name, dumps(cursor.value()))]


def _tagged(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    name = _name(cursor, syntax, schemas)
    values = dict(read_arguments(cursor, syntax, name, schemas.get(name, {})))
    if not values and not syntax.gap and name not in schemas:
        raise Unreadable(name)
    return [Call(name, dumps(values))]


def _python(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """A list of calls, or calls one after the other."""
    if cursor.maybe("["):
        return cursor.items("]", lambda: _python_call(cursor))
    calls = [_python_call(cursor)]
    while syntax.close and not cursor.at_end and not cursor.maybe(syntax.close):
        cursor.maybe(",")
        calls.append(_python_call(cursor))
    return calls


def _python_call(cursor: Cursor) -> Call:
    name = cursor.match(_NAME)
    cursor.expect("(")
    return Call(name, dumps(dict(cursor.items(")", lambda: cursor.pair(KEY, "=")))))


def _any(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """Calls in whatever form follows markup."""
    marks = []
    while (found := cursor.take(_MARKUP)) is not None:
        marks.append(found)
    if not marks:
        raise Unreadable("no markup")
    for mark, argument in zip(marks, [*(mark[1] for mark in marks[1:]), ""], strict=True):
        named = _NAME_IN_TAG.search(mark[1])
        # XML, which a model may write for another reason, does not have `<function=NAME>`.
        # Nor does it have an `<invoke name="NAME">` within markup of calls.
        inner = mark is not marks[0] and "invoke" in mark[1]
        if named and (named[1] in schemas or mark[1] == f"<function={named[1]}>" or inner):
            form = replace(_in_tags(named, argument), section_end=_closing(marks[0][1]))
            cursor.place = mark.start(1) + named.start(1)
            calls = _tagged(cursor, form, schemas)
            break
    else:
        calls = _after_markup(cursor, marks[0][1], schemas)
    while cursor.take(_END):
        pass
    return calls


def _in_tags(name: regex.Match[str], argument: str) -> CallSyntax:
    """The form of a call whose name is in a tag: the first argument shows that of all."""
    close, key = _closing(name.string), _NAME_IN_TAG.search(argument)
    found = CallSyntax(shape="tagged", gap=name.string[name.end(1) :], close=close, key_open=close)
    if key is None:
        return found
    # What else the tag says, of a type for example, may differ from one argument to the next.
    rest, more, _ = argument[key.end(1) :].partition(" ")
    after = f"{rest}{ANY}>\n" if more else f"{rest}\n"
    return replace(found, key_open=argument[: key.start(1)], key_close=after, value_close=f"\n{_closing(argument)}")


def _after_markup(cursor: Cursor, first: str, schemas: Schemas) -> list[Call]:
    """The calls after their markup: in JSON, in Python, or with the name first."""
    start = cursor.place
    if not cursor.take(_LIST):
        return _json(cursor, UNDECLARED, schemas)
    name, place = _name(cursor, UNDECLARED, schemas), cursor.place
    found = cursor.take(_MARKUP)
    key = found[1] if found else ""
    if "key" in key:
        cursor.place, value = start, key.replace("key", "value")
        between, end = f"{_closing(key)} {value}", _closing(value)
        form = CallSyntax(shape="tagged", close=_closing(first), key_open=key, key_close=between, value_close=end)
        return _tagged(cursor, form, schemas)
    # A word after markup is a name only if there is such a tool.
    if name not in schemas:
        raise Unreadable(name)
    if cursor.text.startswith("(", place):
        cursor.place = start
        return _python(cursor, UNDECLARED, schemas)
    if not key and "call" in first and cursor.maybe(_closing(first)):
        return [Call(name, "{}")]
    cursor.place = place
    cursor.match(_FILLING)
    return [Call(name, dumps(cursor.value()))]


def _closing(tag: str) -> str:
    """The tag that closes what a tag opens; empty if it is not a tag."""
    found = _TAG.match(tag)
    return f"</{found[1]}>" if found else ""


def _defines(call: Call, schema: Mapping[str, Any]) -> bool:
    """Whether the arguments are the schema of a tool's arguments: the model repeats which tools there are."""
    arguments, declared = loads(call.arguments), schema.get("properties") or {}
    return isinstance(arguments.get("properties"), dict) and "type" in arguments and "properties" not in declared


_READERS = {"json": _json, "named": _named, "tagged": _tagged, "lines": _tagged, "python": _python, "any": _any}
