"""Finds how a model writes calls from what its template tells it, or from the tokens that it has for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import replace

from deployments.openai.parsing.syntax import BARE_PYTHON, SYNTAXES, CallSyntax

_KEYS = r"name|arguments|parameters|tool_name"
# A marker, then the beginning of a JSON call: `<tool_call>\n{"name"`, `functools[{"name"`.
_JSON = re.compile(
    rf"(?P<open>(?:<[^<>\s/][^<>\s]*>|\[[A-Z_]+\]|(?<![\w.])[a-z_]+(?=\[))+)\s*(?P<list>\[)?\s*\{{\s*[\"'](?P<key>{_KEYS})[\"']"
)
_PYTHON = re.compile(r"(?P<open>(?:<[^<>\s/][^<>\s]*>)?)\s*\[\w+\(\w+\s*=\s*[^\s,)]+[,)]")
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
    python = _PYTHON.search(text)
    return replace(BARE_PYTHON, open=python["open"]) if python else None


def known_calls(tokens: Collection[str]) -> Iterator[CallSyntax]:
    """The forms whose markers are among the tokens of a vocabulary, or in a template."""
    for syntax in SYNTAXES.values():
        yield from (each for each in syntax.calls if each.begins and all(text in tokens for text in each.begins))
