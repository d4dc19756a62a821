"""Finds how a model writes calls.

From what its chat template renders: conversations that differ in one thing differ in its markers. Else from what the
template tells the model, or from the tokens that the model has for calls.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.cursor import ANY, Cursor, Unreadable
from deployments.openai.parsing.rendering import IDS, KEYS, NAMES, TOKEN, VALUES, Rendered, boundary, common_prefix
from deployments.openai.parsing.syntax import BARE_PYTHON, ID, INDEX, SYNTAXES, CallSyntax


def syntax_of(rendered: Rendered, reasoning: ReasoningMarkers | None) -> CallSyntax | None:
    """The declaration of what a template renders."""
    one, two = (None if text is None else _past(text, reasoning) for text in (rendered.one, rendered.two))
    assert one is not None
    for find in (_json_syntax, _named_syntax, _tagged_syntax, _python_syntax):
        syntax = find(one, two)
        if syntax is not None and syntax.open.strip() == rendered.header:
            syntax = replace(syntax, open="", separator=syntax.open)
        if syntax is not None:
            syntax = replace(syntax, alone=two is None, sorts=rendered.sorts, cdata=rendered.cdata)
        # Arguments in tags end only with the call.
        if syntax is not None and (syntax.shape not in ("tagged", "lines") or syntax.close.strip()):
            return syntax
    return None


def _past(text: str, reasoning: ReasoningMarkers | None) -> str:
    """The text after an empty reasoning."""
    if reasoning is not None and reasoning.closing in text:
        place = text.find(NAMES[0])
        return text[:place].rpartition(reasoning.closing)[2] + text[place:]
    return text


def _values(text: str, before: int) -> Iterator[tuple[int, int, Any]]:
    """The objects and lists that begin before a place: where, up to where, and what."""
    for found in re.finditer(r"[\[{]", text[:before]):
        cursor = Cursor(text, found.start())
        try:
            value = cursor.value()
        except Unreadable:
            continue
        yield found.start(), cursor.place, value


def _json_syntax(one: str, two: str | None) -> CallSyntax | None:
    place = one.find(NAMES[0])
    found = next(((a, b, v) for a, b, v in _values(one, place) if b > place), None)
    if found is None:
        return None
    begin, end, value = found
    keys = _keys(value[0] if isinstance(value, list) else value)
    if keys is None:
        return None
    syntax = CallSyntax(shape="json", name=keys[0], arguments=keys[1], several=isinstance(value, list))
    entry = value[0] if isinstance(value, list) else value
    ids = [str(entry[key]) for key in entry if key not in keys]
    if keys[0] in entry and keys[1] in entry and all(each in IDS or each.isdigit() for each in ids):
        syntax = replace(syntax, keys=tuple(entry), ids=INDEX if "".join(ids).isdigit() else syntax.ids)
    second = next(((a, b) for a, b, v in _values(two or "", (two or "").find(NAMES[1])) if a >= end and v), None)
    between = None if syntax.several or two is None or second is None else two[end : second[0]]
    return _around(syntax, one[:begin], one[end:], between)


def _keys(entry: Any) -> tuple[str, str] | None:
    """The keys of a call's name and arguments."""
    if not isinstance(entry, dict):
        return None
    if NAMES[0] in entry:
        return "", ""
    listed = next((value for value in entry.values() if isinstance(value, list) and value), None)
    if listed is not None:
        return _keys(listed[0])
    name = next((key for key, value in entry.items() if value == NAMES[0]), None)
    held = next((key for key, value in entry.items() if isinstance(value, dict) and KEYS[0] in value), None)
    held = held or next((key for key, value in entry.items() if isinstance(value, str) and KEYS[0] in value), None)
    inner = next((value for value in entry.values() if isinstance(value, dict)), None)
    return (name, held) if name and held else _keys(inner) if inner else None


def _named_syntax(one: str, two: str | None) -> CallSyntax | None:
    place = one.find(NAMES[0])
    after = place + len(NAMES[0])
    begin = one.find("{", after)
    key = one.find(KEYS[0], after)
    if begin < 0 or key < begin:
        return None
    quote = _quote(one[key:])
    cursor = Cursor(one, begin, quote=quote)
    try:
        value = cursor.value()
    except Unreadable:
        return None
    if not isinstance(value, dict) or KEYS[0] not in value:
        return None
    gaps, between = [one[after:begin]], None
    if two is not None and (second := two.find(NAMES[1], cursor.place)) >= 0:
        between = two[cursor.place : second]
        gaps.append(two[second + len(NAMES[1]) : two.find("{", second)])
    syntax = CallSyntax(shape="named", quote=quote, gap=_without(IDS, _common(gaps)), ids=_ids(gaps))
    return _around(syntax, one[:place], one[cursor.place :], between)


def _quote(text: str) -> str:
    """The token that stands around a text in arguments; empty if quotes do."""
    before, _, after = text.partition(VALUES[0])
    found = TOKEN.search(before)
    return found[0] if found and before.endswith(found[0]) and after.startswith(found[0]) else ""


def _tagged_syntax(one: str, two: str | None) -> CallSyntax | None:
    after = one.find(NAMES[0]) + len(NAMES[0])
    places = [one.find(KEYS[0], after), one.find(VALUES[0], after)]
    places += [one.find(KEYS[1], places[1]), one.find("41", places[1])]
    if min(places) < 0 or places != sorted(places):
        return None
    keys, values = places[::2], places[1::2]
    head = one[after : keys[0]]
    tail = _without(KEYS, one[values[0] + len(VALUES[0]) : keys[1]])
    mids = [one[key + len(text) : value] for key, text, value in zip(keys, KEYS, values, strict=True)]
    if not TOKEN.search(head + tail + mids[0]) and not re.search("[<>]", head + tail):
        return _lines_syntax(one, two, head, tail, mids[0]) if "\n" in head and "\n" in tail else None
    key_open = _from_token(_suffix(head, tail))
    value_close, end = tail[: len(tail) - len(key_open)], _without(KEYS, one[values[1] + 2 :])
    if not key_open.strip() or not end.lstrip().startswith(value_close.strip()):
        return None
    rest = end[end.index(value_close.strip()) + len(value_close.strip()) :]
    between, gaps = None, [head[: len(head) - len(key_open)]]
    if two is not None and (second := two.find(NAMES[1], after)) >= 0:
        final = two.rfind("41", 0, second) + 2
        between = _without(KEYS, two[final:second])
        between = between[between.find(value_close.strip()) + len(value_close.strip()) :]
        gaps.append(two[second + len(NAMES[1]) : two.find(KEYS[0], second) - len(key_open)])
    syntax = CallSyntax(
        shape="tagged",
        gap=_without(IDS, _common(gaps)),
        key_open=key_open,
        key_close=_common(mids),
        kinds=tuple(_between(mids)),
        ids=_ids(gaps),
        value_close=value_close,
    )
    return _around(syntax, one[: one.find(NAMES[0])], rest, between)


def _lines_syntax(one: str, two: str | None, head: str, tail: str, mid: str) -> CallSyntax:
    """Where only lines and what stands before and after a key tell arguments apart."""
    second = -1 if two is None else two.find(NAMES[1])
    between = None if two is None or second < 0 else two[two.rfind("41", 0, second) + 2 : second].lstrip("\n")
    gap, _, key_open = head.rpartition("\n")
    syntax = CallSyntax(
        shape="lines",
        gap=f"{gap}\n",
        key_open=key_open,
        key_close=mid.rstrip("\"'"),
        value_close="\n",
        quote=mid[-1:].strip(": =>"),
    )
    return _around(syntax, one[: one.find(NAMES[0])], one[one.rfind("41") + 2 :].lstrip("\n"), between)


def _python_syntax(one: str, two: str | None) -> CallSyntax | None:
    found = re.search(rf"\[?\s*{NAMES[0]}\s*\(\s*{KEYS[0]}\s*=", one)
    end = one.rfind(")")
    if found is None or end < 0:
        return None
    rest = one[end + 1 :]
    rest = rest.lstrip().removeprefix("]") if found[0].startswith("[") else rest
    return CallSyntax(
        shape="python",
        open=one[: found.start()].lstrip(),
        close=rest.rstrip(),
        listed=found[0].startswith("["),
        quote="'" if f"'{VALUES[0]}'" in one else "",
    )


def _around(syntax: CallSyntax, before: str, after: str, between: str | None) -> CallSyntax:
    """With the markers around a call: what stands between two calls tells them from those around all."""
    before, after = _NUMBER.sub("", _without(IDS, before)).lstrip(), _without(IDS, after).rstrip()
    if syntax.several or between is None:
        return _split(replace(syntax, open=before, close=after))
    between = _NUMBER.sub("", _without(IDS, between))
    if not between.strip(" \n,;"):
        syntax = replace(syntax, separator=between)
        if syntax.shape == "json" and not before:
            return replace(syntax, open=before, close=after)
        return replace(syntax, section=before, section_end=after)
    opening = _from_token(_suffix(before, between))
    closing = common_prefix(after, between[: len(between) - len(opening)])
    closing = closing[: boundary(between, len(closing))].rstrip()
    opening = opening or between[len(closing) :].strip(" \n,;")
    section, end = before[: len(before) - len(opening)] if before.endswith(opening) else "", after[len(closing) :]
    separator = between[len(closing) : len(between) - len(opening)]
    section = section if section.strip() else ""
    found = replace(syntax, section=section, section_end=end, open=opening, close=closing, separator=separator)
    return found if found.section else _split(found)


_NUMBER = re.compile(r"(?:\d{1,3}[.):]|[-*])\s\Z")


def _split(syntax: CallSyntax) -> CallSyntax:
    """With a pair of tags around what has a name of its own as a section, which a model may leave out."""
    outer, _, inner = syntax.open.rpartition("\n")
    close, _, end = syntax.close.rpartition("\n")
    if syntax.shape == "tagged" and outer and close and end.strip() == outer.strip().replace("<", "</", 1):
        pair = {"section": f"{outer}\n", "section_end": f"\n{end}"}
        return replace(syntax, open=inner, close=close, each=True, **pair)  # type: ignore[arg-type]
    return syntax


def _suffix(first: str, second: str) -> str:
    return common_prefix(first[::-1], second[::-1])[::-1]


def _from_token(text: str) -> str:
    """From the first token of a text on, so that a part of another one before it is left out."""
    whole = text.lstrip()
    found = re.search(r"\]<\]|[<\[]|(?<=\s)\S", text)
    if whole and (whole.startswith(("<", "[", "]<]")) or not found):
        return whole
    return text[found.start() :] if found else ""


def _common(texts: Sequence[str]) -> str:
    """What texts have in common: where they differ stands `…`."""
    first, second = texts[0], texts[-1]
    if first == second:
        return first
    prefix = common_prefix(first, second)
    suffix = _suffix(first[len(prefix) :], second[len(prefix) :])
    return f"{prefix}{ANY}{suffix}"


def _between(texts: Sequence[str]) -> list[str]:
    """What stands in each text where `…` does in what they have in common."""
    before, found, after = _common(texts).partition(ANY)
    return [text[len(before) : len(text) - len(after)] for text in texts] if found else []


def _ids(gaps: Sequence[str]) -> str:
    """The pattern of what differs from call to call."""
    return INDEX if "".join(_between(gaps)).isdigit() else ID


def _without(words: Sequence[str], text: str) -> str:
    """A text with `…` in place of some words."""
    return functools.reduce(lambda text, each: text.replace(each, ANY), words, text)


_CALL_KEYS = r"name|arguments|parameters|tool_name"
# A marker, then the beginning of a JSON call: `<tool_call>\n{"name"`, `functools[{"name"`.
_JSON = re.compile(
    rf"(?P<open>(?:<[^<>\s/][^<>\s]*>|\[[A-Z_]+\]|(?<![\w.])[a-z_]+(?=\[))+)\s*(?P<list>\[)?\s*\{{\s*[\"'](?P<key>{_CALL_KEYS})[\"']"
)
_PYTHON = re.compile(r"(?P<open>(?:<[^<>\s/][^<>\s]*>)?)\s*\[\w+\(\w+\s*=\s*[^\s,)]+[,)]")
# `Action: the tool`, then `Action Input: …` on the next line.
_LABELS = re.compile(
    r"^(?P<name>(?:Action|Tool|Function)(?: Name)?:).*\n(?P<arguments>[\w ]*(?:Input|Arg|Param)\w*:)",
    re.MULTILINE | re.IGNORECASE,
)
_OF_CALLS = re.compile(r"tool|call|func|fn|action|plugin|invoke", re.IGNORECASE)


def described_calls(template: str) -> CallSyntax | None:
    """The form that a template's instruction shows."""
    text = template.replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'")
    for found in _JSON.finditer(text):
        opening = found["open"]
        if _OF_CALLS.search(opening):
            close = opening.replace("<", "</", 1) if opening.startswith("<") else ""
            return CallSyntax(
                shape="json",
                open=opening,
                close=close if close and close in text else "",
                arguments="parameters" if '"parameters": <' in text else "arguments",
                several=bool(found["list"]),
            )
    labels = _LABELS.search(text)
    if labels is not None:
        return CallSyntax(shape="named", open=labels["name"], gap=f"\n{labels['arguments']}")
    python = _PYTHON.search(text)
    return replace(BARE_PYTHON, open=python["open"]) if python else None


def known_calls(tokens: Collection[str]) -> Iterator[CallSyntax]:
    """The forms whose markers are among the tokens of a vocabulary, or in a template."""
    for syntax in SYNTAXES.values():
        yield from (each for each in syntax.calls if each.begins and all(text in tokens for text in each.begins))
