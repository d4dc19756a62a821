"""Rules for the markers of tool calls: a text is a string, but for the special tokens in it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from deployments.engine.grammar.grammar_tokens import GrammarTokens
from deployments.engine.text.vocabulary import Vocabulary

_TEXT = r"/(.|\n)*/"


def with_parts(source: str, special: Mapping[str, int]) -> str:
    """A Lark grammar with the rules of its parts.

    Args:
        source: JSON of the grammar and its parts, each with its kind: `marker`, the text; `close`, the same at the end
            of a value or a call; `text`, any text up to the marker, and it; `free`, any text without the marker.
        special: the texts of the special tokens, and their ids.
    """
    given = json.loads(source)
    rules = [_rule(name, kind, text, special) for name, (kind, text) in given["parts"].items()]
    return "\n".join(["%llguidance {}", given["lark"], *rules])


def closers_of(source: str, tokens: GrammarTokens, vocabulary: Vocabulary) -> list[list[int]]:
    """The tokens that end the bare values of a grammar."""
    special = vocabulary.special_contents
    texts = [text for kind, text in json.loads(source)["parts"].values() if kind in ("text", "close")]
    return [[id for piece in _split(text, special) for id in _ids(piece, tokens, special)] for text in texts]


def _ids(piece: str, tokens: GrammarTokens, special: Mapping[str, int]) -> list[int]:
    if piece in special:
        return [special[piece]]
    return [tokens.single[byte] for byte in piece.encode() if byte in tokens.single]


def _rule(name: str, kind: str, text: str, special: Mapping[str, int]) -> str:
    pieces = _pieces(text, special)
    if kind in ("marker", "close"):
        return f"{name}: {' '.join(pieces)}"
    certain = any(piece.startswith("<[") for piece in pieces)
    if certain or not text:
        # A special token cannot stand inside a text.
        return f"{name}: {_TEXT} {' '.join(pieces)}" if kind == "text" else f"{name}: {_TEXT}"
    if kind == "text":
        return f"{name}[suffix={json.dumps(text)}]: {_TEXT}"
    quoted = re.escape(text).replace("/", r"\/")
    return f"{name}: {name.upper()}\n{name.upper()}: {_TEXT} & ~/(.|\\n)*{quoted}(.|\\n)*/"


def _pieces(text: str, special: Mapping[str, int]) -> list[str]:
    """A text as strings and special tokens."""
    pieces = _split(text, special)
    return [f"<[{special[piece]}]>" if piece in special else json.dumps(piece) for piece in pieces]


def _split(text: str, special: Mapping[str, int]) -> list[str]:
    """A text in pieces, each special token one of them."""
    found = [each for each in special if each and each in text]
    if not found:
        return [text] if text else []
    pattern = "|".join(map(re.escape, sorted(found, key=len, reverse=True)))
    return [piece for piece in re.split(f"({pattern})", text) if piece]
