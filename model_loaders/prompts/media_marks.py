"""Tokens that stand for images and recordings in a prompt, and texts that happen to contain one.

A processor puts an image wherever its token stands, so `In HTML, <image> does not exist.` would count as one.
transformers can encode such a token as plain text (its `sanitize_control_tokens`); texts that cannot be encoded that
way are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from deployments.core.calls import ChatPrompt
from deployments.core.errors import RAISED_BY_HOOKS, BadRequest, TemplateFailed, TroupeError
from deployments.engine.library.transformers_internals import mark_control_tokens
from model_loaders.contract import ModelInfo
from model_loaders.prompts.encoded import Encoded

# The characters that mark_control_tokens puts around a token, found by marking one.
_BEGIN, _END = mark_control_tokens("x", re.compile("x")).split("x")
_KINDS = ("image", "audio")
_TOKEN = re.compile(r"<[^<>\s]+>|\[[A-Z_]+\]")

Encode = Callable[[str, bool], Encoded]


class MediaMarks:
    """The tokens of one model that stand for media.

    Args:
        render: writes the prompt of a conversation.
        kinds: of media that the model takes.
    """

    def __init__(self, info: ModelInfo, render: Callable[[ChatPrompt], str], kinds: Sequence[str]) -> None:
        self._info = info
        self._render = render
        self._kinds = kinds

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every such token, longest first; () for a model that takes texts alone."""
        if not self._kinds:
            return ()
        own = {token for kind in ("image", "video", "audio") if (token := self._own(kind))}
        return tuple(sorted(own.union(*self._written.values()), key=len, reverse=True))

    def find(self, chat: ChatPrompt) -> str | None:
        """The request field of the first text that contains a token; None if there is none."""
        if not self.tokens:
            return None
        for index, message in enumerate(chat.messages):
            for field in ("content", "reasoning_content", "tool_calls"):
                if self.are_in(message.get(field)):
                    return f"messages[{index}].{field}"
        if self.are_in(chat.tools):
            return "tools"
        return "chat_template_kwargs" if self.are_in(chat.template_kwargs) else None

    def are_in(self, value: Any) -> bool:
        """Whether a text in a value of JSON contains a token."""
        return any(token in text for text in _texts(value) for token in self.tokens)

    def marked(self, value: Any) -> Any:
        """A value of JSON with its tokens marked as text."""
        pattern = re.compile("|".join(map(re.escape, self.tokens)))
        return mark_control_tokens(value, pattern)

    def marked_chat(self, chat: ChatPrompt) -> ChatPrompt:
        """A conversation with the tokens in its texts marked."""
        kwargs = self.marked(dict(chat.template_kwargs))
        tools = None if chat.tools is None else self.marked(list(chat.tools))
        return replace(chat, messages=self.marked(list(chat.messages)), tools=tools, template_kwargs=kwargs)

    def unmarked(self, text: str) -> str:
        """A text without the marks of its tokens."""
        return text.replace(_BEGIN, "").replace(_END, "") if self.tokens else text

    def encode(self, text: str, place: str, encode: Encode, *, media: bool = False) -> tuple[str, Encoded]:
        """A prompt whose marked tokens are text: without the marks, and encoded.

        Args:
            place: the request field with the text, for the error.
            encode: encodes a text, whose tokens are marked if the second argument says so.
            media: the prompt has media as well.

        Raises:
            BadRequest: the encoder cannot, or counts the token as a medium.
        """
        plain = self.unmarked(text)
        try:
            encoded = encode(text, True)
            without = encode(re.sub(f"{_BEGIN}.*?{_END}", "", text), False)
            counts = self._count(encoded)
            exact = _BEGIN in text and counts == self._count(without) and (media or not any(counts))
        except (TroupeError, NotImplementedError):
            exact = False
        if not exact:
            raise BadRequest(
                f"Invalid '{place}': it contains {self._first(plain)!r}, which stands for an image or a recording in "
                f"prompts of model {self._info.label!r}, and its encoder cannot read it as text. Write it "
                "differently.",
                param=place,
            )
        return plain, encoded

    def check_places(self, text: str, chat: ChatPrompt) -> None:
        """Refuse a conversation with media to which the template gives no place.

        Raises:
            TemplateFailed: `param` is the message, if it can be told.
        """
        for kind in self._kinds:
            places = [i for i, message in enumerate(chat.messages) for _ in range(_count_parts(message, kind))]
            token = self._own(kind)
            if token and places and text.count(token) < self._written[kind].get(token, 0) * len(places):
                unusual = (i for i in places if chat.messages[i].get("role") != "user")
                index = next(unusual, None)
                place = "messages" if index is None else f"messages[{index}]"
                raise TemplateFailed(
                    f"The chat template of model {self._info.label!r} has no place for each {kind} of {place}.",
                    param=place,
                )

    def _own(self, kind: str) -> str | None:
        """The token in whose place the processor puts a medium."""
        token = getattr(self._info.processor, f"{kind}_token", None)
        return token if isinstance(token, str) and token else None

    @cached_property
    def _written(self) -> dict[str, dict[str, int]]:
        """By kind: the tokens that the template writes for one medium, and how many of each."""
        return {kind: self._tokens_for(kind) for kind in self._kinds}

    def _tokens_for(self, kind: str) -> dict[str, int]:
        text: dict[str, Any] = {"type": "text", "text": "Well?"}
        try:
            without, written = (
                self._render(ChatPrompt(messages=[{"role": "user", "content": parts}]))
                for parts in ([text], [{"type": kind}, text])
            )
        except RAISED_BY_HOOKS:
            return {}
        added = getattr(self._info.tokenizer, "added_tokens_encoder", None) or _TOKEN.findall(written)
        more = {token: written.count(token) - without.count(token) for token in added}
        return {token: count for token, count in more.items() if count > 0}

    def _count(self, encoded: Encoded) -> list[int]:
        known = getattr(self._info.tokenizer, "added_tokens_encoder", {})
        return [encoded.input_ids.count(known[token]) for token in self.tokens if token in known]

    def _first(self, text: str) -> str:
        return next((token for token in self.tokens if token in text), self.tokens[0])


def _count_parts(message: Mapping[str, Any], kind: str) -> int:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return sum(isinstance(part, Mapping) and part.get("type") == kind for part in parts)


def _texts(value: Any) -> Iterable[str]:
    """Every text in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _texts(item)
