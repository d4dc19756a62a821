"""Texts that cannot fit into a model's context, found by their length before anything encodes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from deployments.core.calls import ChatPrompt, Prompt, TextPrompt
from deployments.core.errors import BadRequest, ContextOverflow
from model_loaders.contract import ModelInfo

LONG_TEXT = 1_000_000
_CHARACTERS_PER_TOKEN = 128
_MANY_MESSAGES = 5000
# Parts of a tokenizer (https://huggingface.co/docs/tokenizers) that keep every character.
_KEEPING_NORMALIZERS = {"Prepend", "Replace", "Sequence", "ByteLevel"}
_KEEPING_SPLITTERS = {"ByteLevel", "Metaspace", "Split", "Digits", "Sequence", "Punctuation"}


class PromptLimits:
    """How long a text may be.

    Args:
        context: tokens of the model.
        most: characters of a prompt; None is 128 for each token of the context, and a million at least.
    """

    def __init__(self, info: ModelInfo, context: int, most: int | None) -> None:
        self._label = info.label
        self._context = context
        self._most = most or max(LONG_TEXT, _CHARACTERS_PER_TOKEN * context)
        self._longest = longest_token(info)

    def check(self, text: str, param: str, *, fits: bool) -> None:
        """Refuse a text that is too long to be encoded.

        Args:
            param: the request field that it comes from.
            fits: all of it has to fit into the context.

        Raises:
            ContextOverflow: it has more tokens than the context, whatever they are.
            BadRequest: it is longer than the server encodes.
        """
        self._check_length(len(text), param, fits)

    def check_chat(self, chat: ChatPrompt, *, fits: bool) -> None:
        """Refuse a conversation whose texts alone are longer than the server encodes, before its template writes it.

        A template may leave out words, so shorter ones are checked once they are written.

        Raises:
            ContextOverflow, BadRequest: as for a text.
        """
        if (length := _length(chat)) > self._most:
            self._check_length(length, "messages", fits)

    def _check_length(self, length: int, param: str, fits: bool) -> None:
        if fits and self._longest is not None and length > self._context * self._longest:
            raise ContextOverflow(self._context, -(-length // self._longest), param=param)
        if length > self._most:
            raise BadRequest(
                f"Invalid {param!r}: the text has {length} characters; model {self._label!r} reads at most "
                f"{self._most} (max_prompt_chars).",
                param=param,
            )


def is_long(prompts: Sequence[Prompt]) -> bool:
    """Whether encoding these prompts takes long enough that others should not wait for it."""
    if any(isinstance(prompt, ChatPrompt) and len(prompt.messages) > _MANY_MESSAGES for prompt in prompts):
        return True
    return sum(map(_length, prompts)) > LONG_TEXT


def _length(prompt: Prompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    return sum(map(_message_length, prompt.messages)) if isinstance(prompt, ChatPrompt) else 0


def _message_length(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    if isinstance(content, str):
        return len(content)
    return sum(len(part.get("text") or "") for part in content or () if isinstance(part, Mapping))


def longest_token(info: ModelInfo) -> int | None:
    """How many characters of a text one token covers at most; None if that cannot be proved.

    It is proved for byte-pair encodings of a tokenizer that drops no character: with a normalizer or a splitter that
    removes something, with unknown tokens, or with added tokens that take white space along, any text may have few
    tokens.
    """
    backend = getattr(info.tokenizer, "backend_tokenizer", None)
    own = not type(info.tokenizer).__module__.startswith("transformers.")
    if info.encode is not None or info.processor is not None or backend is None or own:
        return None
    try:
        parts = json.loads(backend.to_str())
        model, added = parts["model"], parts["added_tokens"]
        if model["type"] != "BPE" or any(token["lstrip"] or token["rstrip"] for token in added):
            return None
        splitters = {part["type"] for part in _flat(parts["pre_tokenizer"], "pretokenizers")}
        if not _has_all_bytes(model, splitters) or not splitters <= _KEEPING_SPLITTERS:
            return None
        normalizers = {part["type"] for part in _flat(parts["normalizer"], "normalizers")}
        if not normalizers <= _KEEPING_NORMALIZERS or _removes(parts):
            return None
        return max(len(token) for token in (*model["vocab"], *(token["content"] for token in added)))
    except (KeyError, TypeError, ValueError):
        return None


def _has_all_bytes(model: Mapping[str, Any], splitters: set[str]) -> bool:
    """Whether every character has tokens: those of its bytes."""
    names = ByteLevel.alphabet() if "ByteLevel" in splitters else [f"<0x{byte:02X}>" for byte in range(256)]
    return ("ByteLevel" in splitters or bool(model.get("byte_fallback"))) and model["vocab"].keys() >= set(names)


def _removes(parts: Mapping[str, Any]) -> bool:
    """Whether a splitter drops what it splits at, or a normalizer replaces several characters by fewer."""
    for splitter in _flat(parts["pre_tokenizer"], "pretokenizers"):
        if splitter.get("behavior") == "Removed":
            return True
    for normalizer in _flat(parts["normalizer"], "normalizers"):
        if normalizer["type"] == "Replace":
            pattern = normalizer["pattern"].get("String")
            if pattern is None or len(pattern) > len(normalizer["content"]):
                return True
    return False


def _flat(part: Any, children: str) -> list[Any]:
    """A part and all parts in it."""
    if part is None:
        return []
    return [part, *(found for child in part.get(children, ()) for found in _flat(child, children))]
