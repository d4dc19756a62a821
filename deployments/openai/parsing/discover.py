"""Finds how a model writes from what its chat template renders: conversations that differ in one thing differ in its
markers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.cursor import ANY, QUOTES, Cursor, Unreadable
from deployments.openai.parsing.rendering import BOS, EOS, render
from deployments.openai.parsing.syntax import CallSyntax

TEXT = "Zqtextzq"
_NAMES = ("zq_look", "zq_find")
_IDS = ("Aqz7kd0w1", "b4Xyp92Lm")
_VALUES = ("qvalue", "wvalue")
_KEYS = ("alpha_zq", "beta_zq")
TOKEN = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z_/]{2,40}\]|\[unused\d+\]|\[\|[^\[\]\s|]{1,40}\|\]|◁[^◁▷\s]{1,40}▷")
_EDGE = re.compile(rf"{TOKEN.pattern}|[>#]{{2,}}\w*")

Message = Mapping[str, Any]


def arguments(index: int) -> dict[str, Any]:
    """The arguments of a rendered call."""
    return {_KEYS[0]: _VALUES[index], _KEYS[1]: 41 + index}


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {
                    _KEYS[0]: {"type": "string", "description": "A text."},
                    _KEYS[1]: {"type": "integer", "description": "A number."},
                },
                "required": [_KEYS[0]],
            },
        },
    }
    for name in _NAMES
]
USER = {"role": "user", "content": "Hello."}
PLAIN = {"role": "assistant", "content": TEXT}


@dataclass(frozen=True, slots=True)
class Form:
    """How a template wants calls in a message: what stands for no content, and whether arguments are JSON text."""

    content: tuple[Any, ...]
    text: bool

    def message(self, count: int, *, ids: Sequence[str] = _IDS, **more: Any) -> dict[str, Any]:
        """An assistant's message of the first `count` calls."""
        message: dict[str, Any] = {"role": "assistant"}
        message |= {"content": self.content[0]} if self.content else {}
        message["tool_calls"] = [
            {
                "id": ids[index],
                "type": "function",
                "function": {
                    "name": _NAMES[index],
                    "arguments": json.dumps(arguments(index)) if self.text else arguments(index),
                },
            }
            for index in range(count)
        ]
        return message | more


FORMS = [Form(content, text) for text in (False, True) for content in ((None,), ("",), ())]


def answer_of(template: str, message: Message, *, whole_content: bool = False) -> str | None:
    """What an assistant's message adds to the prompt of the same conversation, its end included.

    Args:
        whole_content: with what stands before any content.
    """
    whole = render(template, [USER, message], tools=TOOLS)
    if whole is None:
        return None
    prompt = render(template, [USER], tools=TOOLS, add_generation_prompt=True)
    other = render(template, [USER, {"role": "assistant", "content": "0" + TEXT}], tools=TOOLS)
    # What the prompt opens, this message may not have; what another answer begins with stands in both.
    others = (prompt,) if whole_content else (prompt, other)
    shared = max(len(common_prefix(whole, text or "")) for text in others)
    return whole[boundary(whole, shared) :]


def boundary(text: str, place: int) -> int:
    """A place moved to the beginning of the token that it is in."""
    inside = next((each.start() for each in _EDGE.finditer(text) if each.start() < place < each.end()), None)
    return place if inside is None else inside


def _without_end(text: str, plain: str) -> tuple[str, str]:
    """An answer without what ends the turn, and that; `plain` is an answer that ends in the same way."""
    place = len(text) - len(common_prefix(text[::-1], plain[::-1]))
    token = next((each for each in TOKEN.finditer(text) if each.start() < place < each.end()), None)
    # Tokens that end turns share more than a bracket.
    if token is not None:
        place = token.start() if re.search(r"\w", text[place : token.end()]) else token.end()
    # A token that stands after every marker belongs to the one before it.
    shared = TOKEN.match(text, place)
    place = shared.end() if shared and shared[0] in text[:place] else place
    return text[:place], text[place:]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template writes of an answer with one call, and of one with two.

    Attributes:
        end: what ends a turn.
        follows: what it writes between a call and its result.
        form: how the messages were given.
    """

    one: str
    two: str | None
    end: str
    follows: str
    form: Form


def rendered_calls(template: str) -> Rendered | None:
    """How a template renders calls; None if it does not."""
    plain = answer_of(template, PLAIN) or ""
    ids = (_IDS, tuple(f"functions.{name}:{index}" for index, name in enumerate(_NAMES)))
    shown = [
        (one, form, each)
        for each in ids
        for form in FORMS
        if (one := answer_of(template, form.message(1, ids=each))) is not None and _NAMES[0] in one
    ]
    if not shown:
        return None
    # A form that the template does not expect leaves a `None` in the text.
    one, form, used = min(shown, key=lambda each: (each[1].text, len(each[0])))
    one, end = _without_end(one, plain)
    two = answer_of(template, form.message(2, ids=used))
    # Some templates write the first call alone.
    two = None if two is None or _NAMES[1] not in two else _without_end(two, plain)[0]
    wrap = plain.partition(TEXT)[2].removesuffix(end)
    one, two = (text and text.removeprefix(wrap) for text in (one, two))
    return Rendered(one or "", two, end, _follows(template, form.message(1, ids=used), one or ""), form)


def _follows(template: str, message: Message, one: str) -> str:
    """What stands between a call and its result."""
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "name": _NAMES[0], "content": TEXT}
    whole = render(template, [USER, message, result], tools=TOOLS) or ""
    found = TOKEN.match(whole.partition(one)[2].lstrip())
    return found[0] if found else ""


def syntax_of(rendered: Rendered, reasoning: ReasoningMarkers | None) -> CallSyntax | None:
    """The declaration of what a template renders."""
    one, two = (None if text is None else _past(text, reasoning) for text in (rendered.one, rendered.two))
    assert one is not None
    for find in (_json_syntax, _named_syntax, _tagged_syntax, _python_syntax):
        if (syntax := find(one, two)) is not None:
            return syntax
    return None


def _past(text: str, reasoning: ReasoningMarkers | None) -> str:
    """The text after an empty reasoning."""
    if reasoning is not None and reasoning.closing in text:
        return text.rpartition(reasoning.closing)[2]
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
    place = one.find(_NAMES[0])
    found = next(((a, b, v) for a, b, v in _values(one, place) if b > place), None)
    if found is None:
        return None
    begin, end, value = found
    keys = _keys(value[0] if isinstance(value, list) else value)
    if keys is None:
        return None
    syntax = CallSyntax(shape="json", name=keys[0], arguments=keys[1], several=isinstance(value, list))
    second = next(((a, b) for a, b, v in _values(two or "", (two or "").find(_NAMES[1])) if a >= end and v), None)
    between = None if syntax.several or two is None or second is None else two[end : second[0]]
    return _around(syntax, one[:begin], one[end:], between)


def _keys(entry: Any) -> tuple[str, str] | None:
    """The keys of a call's name and arguments."""
    if not isinstance(entry, dict):
        return None
    if _NAMES[0] in entry:
        return "", ""
    listed = next((value for value in entry.values() if isinstance(value, list) and value), None)
    if listed is not None:
        return _keys(listed[0])
    name = next((key for key, value in entry.items() if value == _NAMES[0]), None)
    held = next((key for key, value in entry.items() if isinstance(value, dict) and _KEYS[0] in value), None)
    held = held or next((key for key, value in entry.items() if isinstance(value, str) and _KEYS[0] in value), None)
    inner = next((value for value in entry.values() if isinstance(value, dict)), None)
    return (name, held) if name and held else _keys(inner) if inner else None


def _named_syntax(one: str, two: str | None) -> CallSyntax | None:
    place = one.find(_NAMES[0])
    after = place + len(_NAMES[0])
    begin = one.find("{", after)
    key = one.find(_KEYS[0], after)
    if begin < 0 or key < begin:
        return None
    cursor, quote = Cursor(one, begin), _quote(one[key:])
    cursor.quotes = (quote, *QUOTES) if quote else QUOTES
    try:
        value = cursor.value()
    except Unreadable:
        return None
    if not isinstance(value, dict) or _KEYS[0] not in value:
        return None
    gaps, between = [one[after:begin]], None
    if two is not None and (second := two.find(_NAMES[1], cursor.place)) >= 0:
        between = two[cursor.place : second]
        gaps.append(two[second + len(_NAMES[1]) : two.find("{", second)])
    syntax = CallSyntax(shape="named", quote=quote, gap=_without_ids(_common(gaps)))
    return _around(syntax, one[:place], one[cursor.place :], between)


def _quote(text: str) -> str:
    """The token that stands around a text in arguments; empty if quotes do."""
    before, _, after = text.partition(_VALUES[0])
    found = TOKEN.search(before)
    return found[0] if found and before.endswith(found[0]) and after.startswith(found[0]) else ""


def _tagged_syntax(one: str, two: str | None) -> CallSyntax | None:
    after = one.find(_NAMES[0]) + len(_NAMES[0])
    places = [one.find(_KEYS[0], after), one.find(_VALUES[0], after)]
    places += [one.find(_KEYS[1], places[1]), one.find("41", places[1])]
    if min(places) < 0 or places != sorted(places):
        return None
    keys, values = places[::2], places[1::2]
    head = one[after : keys[0]]
    tail = _without_keys(one[values[0] + len(_VALUES[0]) : keys[1]])
    mids = [one[key + len(text) : value] for key, text, value in zip(keys, _KEYS, values, strict=True)]
    if not TOKEN.search(head + tail + mids[0]) and not re.search("[<>]", head + tail):
        return None
    key_open = _from_token(_suffix(head, tail))
    value_close, end = tail[: len(tail) - len(key_open)], _without_keys(one[values[1] + 2 :])
    if not key_open.strip() or not end.lstrip().startswith(value_close.strip()):
        return None
    rest = end[end.index(value_close.strip()) + len(value_close.strip()) :]
    between, gaps = None, [head[: len(head) - len(key_open)]]
    if two is not None and (second := two.find(_NAMES[1], after)) >= 0:
        final = two.rfind("41", 0, second) + 2
        between = _without_keys(two[final:second])
        between = between[between.find(value_close.strip()) + len(value_close.strip()) :]
        gaps.append(two[second + len(_NAMES[1]) : two.find(_KEYS[0], second) - len(key_open)])
    syntax = CallSyntax(
        shape="tagged",
        gap=_without_ids(_common(gaps)),
        key_open=key_open,
        key_close=_common(mids),
        value_close=value_close,
    )
    return _around(syntax, one[: one.find(_NAMES[0])], rest, between)


def _python_syntax(one: str, two: str | None) -> CallSyntax | None:
    found = re.search(rf"\[?\s*{_NAMES[0]}\s*\(\s*{_KEYS[0]}\s*=", one)
    end = one.rfind(")")
    if found is None or end < 0:
        return None
    rest = one[end + 1 :]
    rest = rest.lstrip().removeprefix("]") if found[0].startswith("[") else rest
    return CallSyntax(
        shape="python", open=one[: found.start()].lstrip(), close=rest.rstrip(), listed=found[0].startswith("[")
    )


def _around(syntax: CallSyntax, before: str, after: str, between: str | None) -> CallSyntax:
    """With the markers around a call: what stands between two calls tells them from those around all."""
    before, after = _NUMBER.sub("", _without_ids(before)).lstrip(), _without_ids(after).rstrip()
    if syntax.several or between is None:
        return _split(replace(syntax, open=before, close=after))
    between = _NUMBER.sub("", _without_ids(between))
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


def common_prefix(first: str, second: str) -> str:
    size = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if size is None else size]


def _suffix(first: str, second: str) -> str:
    return common_prefix(first[::-1], second[::-1])[::-1]


def _from_token(text: str) -> str:
    """From the first token of a text on, so that a part of another one before it is left out."""
    whole = text.lstrip()
    found = re.search(r"[<\[]|(?<=\s)\S", text)
    if whole and (whole[0] in "<[" or not found):
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


def _without_ids(text: str) -> str:
    return functools.reduce(lambda text, each: text.replace(each, ANY), _IDS, text)


def _without_keys(text: str) -> str:
    return functools.reduce(lambda text, each: text.replace(each, ANY), _KEYS, text)


_ANSWER = re.compile(r"</?(?:answer|response|final_answer)>")
_END = re.compile(r"<\|(?:eo\w+|\w*end\w*)\|>")


def markup(template: str, rendered: Rendered | None, reasoning: ReasoningMarkers | None) -> Iterator[str]:
    """What stands around content, and what ends a turn."""
    plain = answer_of(template, PLAIN, whole_content=True) or ""
    before, _, after = plain.partition(TEXT)
    before = before.rpartition(reasoning.closing)[2] if reasoning else before
    end = rendered.end if rendered else after
    around = (before.strip(), after.removesuffix(end).strip())
    yield from (each for each in around if is_marker(each) or re.fullmatch(r"[>#]{2,}\w*", each))
    for each in (*end.split(), *(rendered.follows.split() if rendered else ())):
        last = TOKEN.findall(each)
        yield from filter(is_marker, (each, each.removesuffix(last[-1]) if last else "", *last[-1:]))
    yield from dict.fromkeys((*_END.findall(template), *_ANSWER.findall(template)))
    yield from ends(template)


def ends(template: str) -> list[str]:
    """The tokens that end an answer without calls."""
    return [each for each in TOKEN.findall((answer_of(template, PLAIN) or "").partition(TEXT)[2]) if is_marker(each)]


def tokens_in(text: str) -> list[str]:
    """What has the form of a marker in a text."""
    return TOKEN.findall(text)


def is_marker(text: str) -> bool:
    """Whether a text has the form of a marker."""
    return TOKEN.search(text) is not None and EOS not in text and BOS not in text


def calls(count: int) -> list[tuple[str, dict[str, Any]]]:
    """The calls that an answer was rendered with."""
    return [(_NAMES[index], arguments(index)) for index in range(count)]
