"""Patterns of module names.

`*` stands for any text within one segment of a name, `**` for any number of segments, `{1,5}` and `{0-31}` for one of
several texts or numbers, and `-1` for the last entry of a list of modules.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)-(\d+)")
_MOST = 4096
"""Texts that the braces of one pattern may stand for."""
_MOST_STEPS = 8 * _MOST
"""Texts that are put in place of braces: those of an empty range, such as `{1-0}`, lead to no text of the pattern."""

Tree = dict[str, "Tree"]


class Names:
    """The names of a model's modules, in their order."""

    def __init__(self, names: Iterable[str]) -> None:
        self.all = list(names)
        self._order = {name: place for place, name in enumerate(self.all)}
        self._tree: Tree = {}
        for name in self.all:
            node = self._tree
            for segment in name.split("."):
                node = node.setdefault(segment, {})

    def match(self, pattern: str) -> list[str]:
        """The names that a pattern stands for, in their order; none if there are none, or far too many texts."""
        found: set[str] = set()
        for _, plain in itertools.islice(_alternatives(pattern), _MOST):
            found.update(_walk(self._tree, plain.split("."), (), set()))
        return sorted(found & self._order.keys(), key=self._order.__getitem__)

    def unmatched(self, pattern: str) -> str | None:
        """The first text in braces with which the pattern stands for no name; None if each stands for some."""
        used: dict[tuple[int, str], bool] = {}
        for texts, plain in itertools.islice(_alternatives(pattern), _MOST):
            fits = any(name in self._order for name in _walk(self._tree, plain.split("."), (), set()))
            for place in enumerate(texts):
                used[place] = fits or used.get(place, False)
        return next((text for (_, text), fits in used.items() if not fits), None)

    def nearest(self, name: str) -> list[str]:
        """At most three names that are much like this one."""
        return difflib.get_close_matches(name, self.all, n=3, cutoff=0.3)


def _alternatives(pattern: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each combination of what the braces stand for, and the pattern with these texts in their place."""
    levels: list[Iterator[tuple[tuple[str, ...], str]]] = [iter([((), pattern)])]
    for _ in range(_MOST_STEPS):
        if (found := next(levels[-1], None)) is not None:
            if _BRACES.search(found[1]):
                levels.append(_with_texts(*found))
            else:
                yield found
        elif len(levels) > 1:
            levels.pop()
        else:
            return


def _with_texts(chosen: tuple[str, ...], pattern: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The pattern with each text of its first braces, and these texts after those that were chosen before."""
    match = _BRACES.search(pattern)
    assert match is not None
    for part in match[1].split(","):
        span = _RANGE.fullmatch(part.strip())
        texts: Iterable[str] = map(str, range(int(span[1]), int(span[2]) + 1)) if span else [part.strip()]
        for text in texts:
            yield (*chosen, text), pattern[: match.start()] + text + pattern[match.end() :]


def _walk(node: Tree, segments: list[str], path: tuple[str, ...], seen: set[tuple[int, int]]) -> Iterator[str]:
    """The names below a node that the segments of a pattern stand for.

    Args:
        seen: the nodes and numbers of segments that were walked: several `**` lead to the same place in many ways.
    """
    if not segments:
        yield ".".join(path)
        return
    place = (id(node), len(segments))
    if place in seen:
        return
    seen.add(place)
    first, rest = segments[0], segments[1:]
    if first == "**":
        yield from _walk(node, rest, path, seen)
        for child, below in node.items():
            yield from _walk(below, segments, (*path, child), seen)
        return
    for child in _children(node, first):
        yield from _walk(node[child], rest, (*path, child), seen)


def _children(node: Tree, segment: str) -> list[str]:
    if segment in node:
        return [segment]
    if re.fullmatch(r"-\d+", segment):
        entries = sorted((child for child in node if child.isdecimal()), key=int)
        return entries[int(segment) :][:1] if -int(segment) <= len(entries) else []
    return [child for child in node if "*" in segment and fnmatch.fnmatchcase(child, segment)]
