"""Regular expressions with word boundaries, as grammars without them.

llguidance's expressions have no assertions within a text. An expression is divided by what a word boundary can see: the
kind of the character before a text and after it, and the kinds of the text's own first and last character. In each part
every boundary either holds or does not. Python's own parser reads the expression, so that it means what `re` matches.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, groupby
from typing import Any

_parser: Any = re._parser  # type: ignore[attr-defined]
_MOST_COPIES = 64
_MOST_TERMINALS = 4096
_START, _WORD, _OTHER, _END = "start", "word", "other", "end"
_KINDS = (_WORD, _OTHER)
_CATEGORIES = {
    "CATEGORY_DIGIT": r"\d",
    "CATEGORY_NOT_DIGIT": r"\D",
    "CATEGORY_SPACE": r"\s",
    "CATEGORY_NOT_SPACE": r"\S",
    "CATEGORY_WORD": r"\w",
    "CATEGORY_NOT_WORD": r"\W",
}
_CLASSES = {_WORD: r"\w", _OTHER: r"\W"}
_BETWEEN = {
    (first, last): f"/{_CLASSES[first]}(?s:.*){_CLASSES[last]}/"
    if first != last
    else f"/{_CLASSES[first]}((?s:.*){_CLASSES[first]})?/"
    for first in _KINDS
    for last in _KINDS
}
"""The texts that begin and end with these kinds of characters."""
_REFUSED = {
    "GROUPREF": "a back reference",
    "GROUPREF_EXISTS": "a conditional group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive quantifier",
    "ASSERT": "a lookaround",
    "ASSERT_NOT": "a lookaround",
}
_Node = tuple[Any, Any]
_Nodes = Sequence[_Node]


def without_boundaries(pattern: str) -> str:
    """A Lark grammar of the texts that `re.fullmatch(pattern, text)` accepts.

    Classes such as `\\w` are those of Rust's regular expressions, which differ from Python's in a few marks.

    Raises:
        ValueError: the pattern is not an expression of Python's, or has something that no such grammar can say.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parsed = _parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"Python's re, which reads what llguidance cannot, says: {error}") from None
    flags = parsed.state.flags
    if flags & (re.ASCII | re.LOCALE | re.MULTILINE):
        raise ValueError("the flags (?a), (?L) and (?m) cannot be followed beside word boundaries")
    return _Translation().grammar(list(parsed), flags)


@dataclass(slots=True)
class _Parts:
    """The texts of an expression between two kinds of characters.

    Attributes:
        empty: whether the empty text is one of them.
        texts: by the kinds of their first and last characters, the terminal of the others; those without texts are
            left out.
    """

    empty: bool = False
    texts: dict[tuple[str, str], str] = field(default_factory=dict)


_Language = Callable[[str, str], _Parts]
"""An expression: the kind of the character before (or the start), and after (or the end), to its texts there."""


class _Translation:
    """The terminals of one grammar."""

    def __init__(self) -> None:
        self._terminals: dict[str, str] = {}

    def grammar(self, nodes: _Nodes, flags: int) -> str:
        parts = self._sequence(nodes, flags)(_START, _END)
        choices = sorted(set(parts.texts.values())) + (['""'] if parts.empty else [])
        if not choices:
            raise ValueError("no text matches it")
        lines = [f"start: {' | '.join(choices)}", *(f"{name}: {body}" for body, name in self._terminals.items())]
        return "\n".join(lines)

    def _name(self, body: str) -> str:
        """The terminal with this body."""
        if len(self._terminals) >= _MOST_TERMINALS:
            raise ValueError("its word boundaries make too many cases; use fewer, or fewer repetitions around them")
        return self._terminals.setdefault(body, f"T{len(self._terminals)}")

    def _any(self, choices: Iterable[str]) -> str:
        found = sorted(set(choices))
        return found[0] if len(found) == 1 else self._name(" | ".join(found))

    def _merge(self, found: Iterable[tuple[tuple[str, str], str]], *, empty: bool) -> _Parts:
        groups: dict[tuple[str, str], list[str]] = {}
        for key, terminal in found:
            groups.setdefault(key, []).append(terminal)
        return _Parts(empty, {key: self._any(choices) for key, choices in groups.items()})

    def _sequence(self, nodes: _Nodes, flags: int) -> _Language:
        """Nodes in a row."""
        language: _Language = self._nothing
        runs = [(plain, list(run)) for plain, run in groupby(nodes, _is_plain)]
        for plain, run in reversed(runs):
            for one in [self._plain(run, flags)] if plain else [self._node(node, flags) for node in reversed(run)]:
                language = one if language == self._nothing else self._then(one, language)
        return language

    def _plain(self, nodes: _Nodes, flags: int) -> _Language:
        """Nodes without assertions: their texts are the same wherever they stand, and are divided by their ends."""
        ends, text = _ends_of(nodes, flags), f"/{_text(nodes, flags)}/"
        if len(ends.pairs) == 1 and not ends.empty:
            return _everywhere(dict.fromkeys(ends.pairs, self._name(text)))
        return _everywhere({pair: self._name(f"{text} & {_BETWEEN[pair]}") for pair in ends.pairs}, empty=ends.empty)

    def _node(self, node: _Node, flags: int) -> _Language:
        """A node that has an assertion, or is one."""
        op, argument = node
        match str(op):
            case "AT":
                return _assertion(str(argument))
            case "BRANCH":
                return self._either([self._sequence(list(branch), flags) for branch in argument[1]])
            case "SUBPATTERN":
                _, added, removed, inner = argument
                return self._sequence(list(inner), (flags | added) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":
                return self._repeat(argument, flags)
        raise ValueError(f"{_REFUSED.get(str(op), str(op))} cannot be followed")

    def _then(self, one: _Language, two: _Language) -> _Language:
        """One expression after the other."""

        def parts(left: str, right: str) -> _Parts:
            alone, rest = one(left, right), two(left, right)
            found: list[tuple[tuple[str, str], str]] = []
            for first in _KINDS:
                ahead = one(left, first)
                if ahead.empty:
                    found += [(key, text) for key, text in rest.texts.items() if key[0] == first]
                for (begins, middle), text in ahead.texts.items():
                    following = two(middle, right).texts.items()
                    found += [((begins, z), self._name(f"{text} {t}")) for (f, z), t in following if f == first]
            found += [(key, text) for key, text in alone.texts.items() if two(key[1], right).empty]
            return self._merge(found, empty=alone.empty and rest.empty)

        return _remembered(parts)

    def _either(self, choices: Sequence[_Language]) -> _Language:
        def parts(left: str, right: str) -> _Parts:
            each = [choice(left, right) for choice in choices]
            texts = [pair for one in each for pair in one.texts.items()]
            return self._merge(texts, empty=any(one.empty for one in each))

        return _remembered(parts)

    def _repeat(self, argument: Any, flags: int) -> _Language:
        low, high, inner = argument
        body = self._sequence(list(inner), flags)
        unlimited = high == _parser.MAXREPEAT
        if low + (0 if unlimited else high - low) > _MOST_COPIES:
            raise ValueError(
                f"more than {_MOST_COPIES} repetitions of a group beside word boundaries cannot be followed"
            )
        language = self._star(body) if unlimited else self._nothing
        for _ in range(0 if unlimited else high - low):
            language = self._either([self._nothing, self._then(body, language)])
        for _ in range(low):
            language = self._then(body, language)
        return language

    @staticmethod
    def _nothing(left: str, right: str) -> _Parts:
        return _Parts(empty=True)

    def _star(self, body: _Language) -> _Language:
        """Any number of texts in a row. A state between two is the last kind of the one and the first of the other."""
        states = [(last, first) for last in _KINDS for first in _KINDS]
        paths: dict[tuple[Any, Any], str] = {}
        for start in states:
            for end in states:
                if (text := body(start[0], end[1]).texts.get((start[1], end[0]))) is not None:
                    paths[start, end] = text
        for via in states:
            paths = self._through(via, states, paths)

        def parts(left: str, right: str) -> _Parts:
            found = list(body(left, right).texts.items())
            for start in states:
                for (first, last), text in body(left, start[1]).texts.items():
                    if last != start[0]:
                        continue
                    for end in states:
                        found += self._ends(first, text, paths.get((start, end)), body(end[0], right), end[1])
                        if start == end:
                            found += self._ends(first, text, "", body(end[0], right), end[1])
            return self._merge(found, empty=True)

        return _remembered(parts)

    def _through(
        self, via: Any, states: Sequence[Any], paths: dict[tuple[Any, Any], str]
    ) -> dict[tuple[Any, Any], str]:
        """Paths that may also pass a state (Kleene's construction)."""
        loop = f"{paths[via, via]}* " if (via, via) in paths else ""
        longer = dict(paths)
        for start in states:
            for end in states:
                if (start, via) in paths and (via, end) in paths:
                    path = self._name(f"{paths[start, via]} {loop}{paths[via, end]}")
                    longer[start, end] = self._any([path, *([paths[start, end]] if (start, end) in paths else [])])
        return longer

    def _ends(
        self, first: str, text: str, path: str | None, body: _Parts, kind: str
    ) -> list[tuple[tuple[str, str], str]]:
        """A first text, a path, and each last text that begins with a kind of character."""
        if path is None:
            return []
        return [
            ((first, last), self._name(f"{text} {path} {final}" if path else f"{text} {final}"))
            for (begins, last), final in body.texts.items()
            if begins == kind
        ]


def _remembered(language: _Language) -> _Language:
    known: dict[tuple[str, str], _Parts] = {}

    def parts(left: str, right: str) -> _Parts:
        if (left, right) not in known:
            known[left, right] = language(left, right)
        return known[left, right]

    return parts


def _everywhere(texts: dict[tuple[str, str], str], *, empty: bool = False) -> _Language:
    """An expression whose texts are the same wherever they stand."""
    parts = _Parts(empty, texts)
    return lambda left, right: parts


def _assertion(name: str) -> _Language:
    def holds(left: str, right: str) -> bool:
        match name:
            case "AT_BOUNDARY":
                return (left == _WORD) != (right == _WORD)
            case "AT_NON_BOUNDARY":
                # Python before 3.14: not in an empty text.
                return (left == _WORD) == (right == _WORD) and (left, right) != (_START, _END)
            case "AT_BEGINNING" | "AT_BEGINNING_STRING":
                return left == _START
            case "AT_END" | "AT_END_STRING":
                return right == _END
        raise ValueError(f"the assertion {name} cannot be followed")

    return lambda left, right: _Parts(empty=holds(left, right))


def _is_plain(node: _Node) -> bool:
    """Whether a node has characters, choices and repetitions of them alone."""
    op, argument = node
    match str(op):
        case "LITERAL" | "NOT_LITERAL" | "ANY" | "IN":
            return True
        case "BRANCH":
            return all(map(_is_plain, chain.from_iterable(argument[1])))
        case "SUBPATTERN":
            return all(map(_is_plain, argument[3]))
        case "MAX_REPEAT" | "MIN_REPEAT":
            return all(map(_is_plain, argument[2]))
    return False


@dataclass(frozen=True, slots=True)
class _Ends:
    """How the texts of plain nodes begin and end.

    Attributes:
        empty: whether the empty text is one of them.
        pairs: the kinds of the first and the last character of the others.
    """

    empty: bool
    pairs: frozenset[tuple[str, str]]

    def then(self, other: _Ends) -> _Ends:
        pairs = {(first, last) for first, _ in self.pairs for _, last in other.pairs}
        pairs |= (other.pairs if self.empty else frozenset()) | (self.pairs if other.empty else frozenset())
        return _Ends(self.empty and other.empty, frozenset(pairs))


def _ends_of(nodes: _Nodes, flags: int) -> _Ends:
    found = _Ends(True, frozenset())
    for node in nodes:
        found = found.then(_ends_of_one(node, flags))
    return found


def _ends_of_one(node: _Node, flags: int) -> _Ends:
    op, argument = node
    match str(op):
        case "BRANCH":
            each = [_ends_of(branch, flags) for branch in argument[1]]
            return _Ends(any(one.empty for one in each), frozenset(chain.from_iterable(one.pairs for one in each)))
        case "SUBPATTERN":
            return _ends_of(argument[3], (flags | argument[1]) & ~argument[2])
        case "MAX_REPEAT" | "MIN_REPEAT":
            low, high, inner = argument
            one = _ends_of(inner, flags)
            # Texts of three and more begin and end as those of two.
            texts = [one.then(one)] if high >= 2 else []
            texts += [one] if low <= 1 <= high else []
            empty = low == 0 or one.empty
            return _Ends(empty, frozenset(chain.from_iterable(text.pairs for text in texts)))
    return _Ends(False, frozenset((kind, kind) for kind in _kinds_of(_text([node], flags))))


@cache
def _kinds_of(character: str) -> tuple[str, ...]:
    """The kinds of the characters of a set."""
    return tuple(kind for kind, letters in zip(_KINDS, _alphabet(), strict=True) if re.search(character, letters))


@cache
def _alphabet() -> tuple[str, str]:
    """All characters of words, and all others."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    return "".join(re.findall(r"\w", every)), "".join(re.findall(r"\W", every))


def _text(nodes: Iterable[_Node], flags: int) -> str:
    """Plain nodes as an expression of Rust's."""
    texts = [_one(op, argument, flags) for op, argument in nodes]
    return f"(?i:{''.join(texts)})" if flags & re.IGNORECASE else "".join(texts)


def _one(op: Any, argument: Any, flags: int) -> str:
    inner = flags & ~re.IGNORECASE
    match str(op):
        case "LITERAL":
            return _character(argument)
        case "NOT_LITERAL":
            return f"[^{_character(argument)}]"
        case "ANY":
            return r"[\U00000000-\U0010ffff]" if flags & re.DOTALL else r"[^\n]"
        case "IN":
            return f"[{''.join(_member(*item) for item in argument)}]"
        case "BRANCH":
            return f"(?:{'|'.join(_text(branch, inner) for branch in argument[1])})"
        case "SUBPATTERN":
            _, added, removed, nodes = argument
            closed = "(?-i:{})" if removed & re.IGNORECASE else "(?:{})"
            return closed.format(_text(nodes, (flags & re.DOTALL | added) & ~removed))
    low, high, nodes = argument
    count = f"{{{low},}}" if high == _parser.MAXREPEAT else f"{{{low},{high}}}"
    return f"(?:{_text(nodes, inner)}){count}"


def _member(op: Any, argument: Any) -> str:
    match str(op):
        case "NEGATE":
            return "^"
        case "LITERAL":
            return _character(argument)
        case "RANGE":
            return f"{_character(argument[0])}-{_character(argument[1])}"
    return _CATEGORIES[str(argument)]


def _character(code: int) -> str:
    return f"\\U{code:08x}"
