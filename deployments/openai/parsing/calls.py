"""Reads tool calls in a declared form."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import regex

from deployments.openai.parsing.arguments import read_arguments
from deployments.openai.parsing.cursor import ANY, FENCE, Cursor, Unreadable, either, pattern_of
from deployments.openai.parsing.parts import Call
from deployments.openai.parsing.syntax import BARE, BARE_PYTHON, UNDECLARED, CallSyntax
from deployments.openai.parsing.typed import Schemas, dumps, is_text, loads

_NAME = regex.compile(r"[\w.\-/]++")
# What may stand before a name: the number of a call in a list.
_NUMBER = r"\s*(?:(?:\d{1,3}[.):]|[-*])\s)?+\s*"
# What may stand between a name and its arguments beside what is declared: an id, a fence.
_BETWEEN = r"[\s\w:.\-]{0,80}(?:```(?:json)?\s*)?"
_FENCE = regex.compile(rf"\s*+{FENCE}")
_SEPARATORS = regex.compile(r"[\s,;]*+")
_BRACKET = regex.compile(r"\s*(?=[\[{])")
OBJECT = r"(?:\[\s{0,99}){0,2}\{\s{0,99}[\"']"
"""A pattern of how an object begins, or a list of them."""
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
    cursor.expect(syntax.open)
    fenced = cursor.take(_FENCE) is not None
    calls = _read(cursor, syntax, schemas)
    # Nothing may mark each of the calls of a section, and a model may write several between the markers of one.
    while not _closed(cursor, syntax, fenced) or (syntax.section and not syntax.open):
        place = cursor.place
        try:
            cursor.take(_SEPARATORS)
            cursor.maybe(syntax.separator)
            calls += _read(cursor, syntax, schemas)
        except Unreadable:
            cursor.place = place
            break
    return calls


def _read(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """The calls after what opens them."""
    try:
        calls = _READERS.get(syntax.shape, _named)(cursor, syntax, schemas)
    except ValueError as error:
        raise Unreadable(str(error)) from error
    # What nothing marks is a call only if its tool is there.
    bare = not syntax.begins and syntax.shape != "any" and "<|" not in syntax.gap
    if not calls or (bare and any(call.name not in schemas or _defines(call, schemas[call.name]) for call in calls)):
        raise Unreadable("no call of a tool that is there")
    return calls


def _closed(cursor: Cursor, syntax: CallSyntax, fenced: bool) -> bool:
    """Take what closes calls. False if it is missing, so that another one may follow."""
    if syntax.shape in ("tagged", "lines", "any"):
        return True
    after_fence = fenced and cursor.maybe("```")
    closed = cursor.closing(syntax.close) or after_fence or syntax.shape == "named"
    return closed or not (fenced or (syntax.open.strip() and syntax.close.strip()))


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
    try:
        return [_json_call(entry, syntax, bare) for entry in (value if isinstance(value, list) else [value])]
    except ValueError:
        return []


def _json_call(entry: Any, syntax: CallSyntax, bare: bool) -> Call:
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    if not syntax.name:
        ((name, arguments),) = entry.items()
        return _call_of(name, arguments)
    keys = (syntax.arguments, *ARGUMENT_KEYS)
    inner = entry.get("function")
    entry = {**entry, **inner} if isinstance(inner, dict) else entry
    name = next((entry[key] for key in (syntax.name, *NAME_KEYS) if isinstance(entry.get(key), str)), None)
    given = [entry[key] for key in keys if key in entry]
    # A tool's definition and a record of a call have further keys; what has them instead is the model's own object.
    further = not entry.keys() <= {syntax.name, *_OF_A_CALL, *keys}
    if (bare and further) or ((bare or further) and not given):
        raise ValueError("not a call")
    return _call_of(name, given[0] if given and (bare or given[0] is not None) else {})


def _call_of(name: Any, arguments: Any) -> Call:
    """A call, whose arguments may be JSON in a string."""
    if isinstance(arguments, str):
        arguments = loads(arguments) if arguments.strip() else {}
    if not isinstance(name, str) or not name or not is_text(name):
        raise ValueError("not a name")
    return Call(name, dumps(arguments))


def object_of(syntax: CallSyntax) -> str:
    """A pattern of how an object begins that nothing marks and that may be a call, or a list of them."""
    keys = {syntax.name, syntax.arguments, *ARGUMENT_KEYS, *_OF_A_CALL, *_LISTS} if syntax.name else ()
    return rf"{OBJECT}(?:{either(sorted(keys)) or _NAME.pattern})[\"']\s*:"


def _json(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    cursor.need(_BRACKET)
    return json_calls(cursor.value(), syntax, bare=not syntax.begins)


def _named(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """A name, then the arguments: between markers, in parentheses, or an object. In Python there may be a list."""
    if syntax.shape == "python" and cursor.maybe("["):
        return [call for calls in cursor.items("]", lambda: _named(cursor, syntax, schemas)) for call in calls]
    name = _name(cursor, syntax, schemas)
    if syntax.shape in ("tagged", "lines"):
        values = dict(read_arguments(cursor, syntax, name, schemas.get(name, {})))
        if not values and not syntax.gap and name not in schemas:
            raise Unreadable(name)
    elif syntax.shape == "python":
        cursor.expect("(")
        values = dict(cursor.items(")", lambda: cursor.pair("=")))
    else:
        values = cursor.value()
    return [Call(name, dumps(values))]


def _any(cursor: Cursor, syntax: CallSyntax, schemas: Schemas) -> list[Call]:
    """Calls in whatever form follows markup: the first that can be read."""
    marks = []
    while (found := cursor.take(_MARKUP)) is not None:
        marks.append(found)
    for place, form in _forms(cursor, marks, schemas):
        cursor.place = place
        with contextlib.suppress(Unreadable):
            calls = _READERS.get(form.shape, _named)(cursor, form, schemas)
            while cursor.take(_END):
                pass
            return calls
    raise Unreadable("no call after markup")


def _forms(cursor: Cursor, marks: Sequence[regex.Match[str]], schemas: Schemas) -> Iterator[tuple[int, CallSyntax]]:
    """The forms that calls after markup may have, and where what stands after their opening begins."""
    start = cursor.place
    for mark, argument in zip(marks, [*(mark[1] for mark in marks[1:]), ""], strict=True):
        named = _NAME_IN_TAG.search(mark[1])
        # XML, which a model may write for another reason, does not have `<function=NAME>`.
        # Nor does it have an `<invoke name="NAME">` within markup of calls.
        inner = mark is not marks[0] and "invoke" in mark[1]
        if named and (named[1] in schemas or mark[1] == f"<function={named[1]}>" or inner):
            place = mark.start(1) + named.start(1)
            yield place, replace(_in_tags(named, argument), section_end=_closing(marks[0][1]))
            yield place, CallSyntax(shape="named", gap=named.string[named.end(1) :])
    cursor.place = start
    if marks and cursor.take(_LIST):
        yield from ((start, form) for form in _after_name(cursor, marks[0][1], schemas))
    elif marks:
        yield start, BARE


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


def _after_name(cursor: Cursor, first: str, schemas: Schemas) -> Iterator[CallSyntax]:
    """The forms that calls may have whose name is next."""
    name, place = _name(cursor, UNDECLARED, schemas), cursor.place
    found = cursor.take(_MARKUP)
    key, close = found[1] if found else "", _closing(first)
    if "key" in key:
        value = key.replace("key", "value")
        between, end = f"{_closing(key)} {value}", _closing(value)
        yield CallSyntax(shape="tagged", close=close, key_open=key, key_close=between, value_close=end)
    # A word after markup is a name only if there is such a tool.
    if name in schemas:
        yield BARE_PYTHON
        # Without arguments: none begins with what ends the call.
        yield from [CallSyntax(shape="tagged", close=close, key_open=close)] if "call" in first else []
        cursor.place = place
        yield CallSyntax(shape="named", gap=cursor.need(_FILLING)[0])


def _closing(tag: str) -> str:
    """The tag that closes what a tag opens; empty if it is not a tag."""
    found = _TAG.match(tag)
    return f"</{found[1]}>" if found else ""


def _defines(call: Call, schema: Mapping[str, Any]) -> bool:
    """Whether the arguments are the schema of a tool's arguments: the model repeats which tools there are."""
    arguments, declared = loads(call.arguments), schema.get("properties") or {}
    return isinstance(arguments.get("properties"), dict) and "type" in arguments and "properties" not in declared


_READERS = {"json": _json, "any": _any}
