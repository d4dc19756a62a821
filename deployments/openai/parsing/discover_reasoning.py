"""Finds the markers of a model's reasoning in what its template renders, in its source, or in a vocabulary."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing.rendering import (
    NAMES,
    TEXT,
    TOKEN,
    TOOLS,
    USER,
    Form,
    Message,
    boundary,
    common_prefix,
    header,
    render,
)

_THOUGHT = "Zqthoughtzq"
_THINKING = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts")
_THOUGHT_WORDS = "think|thought|reason|inner|analysis|channel"
_TURNED = (
    ("/", ""),
    ("close", "open"),
    ("END", "START"),
    ("END", "BEGIN"),
    ("end", "start"),
    ("end", "begin"),
    ("suffix", "prefix"),
)
_THOUGHT_TOKEN = re.compile("think|thought|reason|inner_", re.IGNORECASE)
# An instruction: thoughts after some words, and the answer after others.
_WORDS = re.compile(
    r"(?:thoughts?|reasoning)\s+after\s+'([^'\n]{5,60})'[^']{1,80}(?:response|answer)\s+after\s+'([^'\n]{5,60})'"
)


def rendered_reasoning(template: str, form: Form | None) -> ReasoningMarkers | None:
    """The markers of the reasoning that a template renders; None if it renders none."""
    for key in _THINKING:
        kinds = ({"content": TEXT}, {"content": ""}, *([form.message(1)] if form else []))
        texts = [_rendered(template, [USER, {"role": "assistant", **kind, key: _THOUGHT}]) for kind in kinds]
        shown = [text for text in texts if text is not None and 0 <= text.find(_THOUGHT) < text.find(TEXT) % (1 << 30)]
        if not shown:
            continue
        rests, head = [text.partition(_THOUGHT)[2] for text in shown], header(template)
        # What follows the reasoning may be a message of its own, if there is anything.
        followed = [rest for rest in rests if TEXT in rest or NAMES[0] in rest]
        rests = followed if followed and all(head in rest.partition(TEXT)[0] for rest in followed) else rests
        close = _close([rest.partition(TEXT)[0] for rest in rests], head)
        opening = _opening(template, shown[0].partition(_THOUGHT)[0], close) if close else ""
        close = next((text for text in closings(opening) if close.startswith(text)), close)
        if opening:
            # If it ends with the header of a message, so does every prompt.
            begun = head and close.endswith(head)
            return ReasoningMarkers(opening, close, closed=opening + close if begun else "")
    return None


def _rendered(template: str, messages: Sequence[Message], **more: Any) -> str | None:
    """A conversation in which the model thinks."""
    return render(template, messages, tools=TOOLS, enable_thinking=True, thinking=True, **more)


def _close(ends: Sequence[str], head: str) -> str:
    shared = functools.reduce(common_prefix, ends).strip()
    if head and head in shared:
        return shared[: shared.index(head) + len(head)]
    found = re.match(r"(?:(?:<[^<>\s]+>|\[[A-Z ]+\]|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷)[\w.]*)+", shared)
    text = found[0] if found else ""
    token = TOKEN.match(text)
    # One token is enough, if it says what it ends.
    return token[0] if token and re.search(_THOUGHT_WORDS, token[0], re.IGNORECASE) else text


def _opening(template: str, before: str, close: str) -> str:
    """The marker that opens what `close` ends, as it stands before the reasoning."""
    text = before.rstrip()
    for old, new in _TURNED:
        if old in close and text.endswith(turned := close.replace(old, new, 1)):
            return turned
    prompt = (_rendered(template, [USER], add_generation_prompt=True) or "").rstrip()
    shared = common_prefix(prompt, text)
    if len(shared) < len(text):
        opening = text[boundary(text, len(shared)) :].strip()
        if prompt and shared == prompt:
            return opening
        token = TOKEN.search(opening)
        # A role that the prompt calls otherwise stands before it.
        return opening[token.start() :] if token and opening.endswith(token[0]) else opening
    # The prompt has words for it, which the model does not repeat.
    begun = prompt[len(shared) :].strip() or "".join(re.findall(r"\w+ [^\n<>\[\]|]*\Z", text))
    if re.search(_THOUGHT_WORDS, begun, re.IGNORECASE):
        return begun
    found = re.search(r"(?:<[^<>\s]+>|\[[A-Z_]+\]|◁[^◁▷\s]+▷)[\w.]*\Z|(?:<[^<>\s]+>)\w+(?:<[^<>\s]+>)\Z", text)
    return found[0] if found else ""


def closings(opening: str) -> list[str]:
    """What may end what a marker opens."""
    return [opening.replace(new, old, 1) for old, new in _TURNED if new and new in opening]


def described_reasoning(text: str) -> ReasoningMarkers | None:
    """A pair of markers of reasoning of which a text holds one: a template's source, or a vocabulary."""
    tokens = [token for token in dict.fromkeys(TOKEN.findall(text)) if _THOUGHT_TOKEN.search(token)]
    for token in tokens:
        for old, new in _TURNED:
            opening = token.replace(old, new, 1)
            if opening != token and (old == "/" or opening in text):
                return ReasoningMarkers(opening, token)
    plain = next((token for token in tokens if re.fullmatch(r"[<\[]\w+[>\]]", token)), None)
    if plain is None:
        words = _WORDS.search(text.replace("\\'", "'"))
        return ReasoningMarkers(words[1], words[2]) if words else None
    return ReasoningMarkers(plain, f"{plain[0]}/{plain[1:]}")
