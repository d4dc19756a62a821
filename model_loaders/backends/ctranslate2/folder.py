"""The files of a converted model: its kind, vocabulary, tokenizer and prompt format."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.core.errors import ModelLoadFailed, last_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """What bootstrap_config.json says, where it is there.

    Attributes:
        name: of the model.
        params: how many parameters it has.
        quantization: the type to compute with.
        max_tokens: of a prompt, and of a text.
        prompt_fmt: what a prompt becomes, with `{instruction}` in its place.
    """

    name: str | None = None
    params: float | None = None
    quantization: str | None = None
    max_tokens: int | None = None
    prompt_fmt: str | None = None

    @property
    def max_model_len(self) -> int | None:
        return None if self.max_tokens is None else 2 * self.max_tokens


class Folder:
    """A converted model on disk.

    Args:
        path: with at least model.bin and a vocabulary.

    Raises:
        ModelLoadFailed: it is not such a folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "model.bin").is_file():
            raise ModelLoadFailed(
                f"{path} has no model.bin; convert a Hugging Face folder with scripts/convert_ctranslate2."
            )
        self.config = self._json("config.json")
        self.bootstrap = self._bootstrap()

    @property
    def is_translator(self) -> bool:
        """Whether it is an encoder-decoder; a decoder has one file named vocabulary."""
        return self._vocabulary_file("vocabulary") is None

    @cached_property
    def source_tokens(self) -> list[str]:
        """The tokens a prompt is made of, by id."""
        return self._tokens("source_vocabulary" if self._has("source_vocabulary") else self._shared)

    @cached_property
    def target_tokens(self) -> list[str]:
        """The tokens a text is made of, by id."""
        return self._tokens("target_vocabulary" if self._has("target_vocabulary") else self._shared)

    def terminators(self) -> list[int]:
        """Ids of the end token that the conversion wrote down, and of those in generation_config.json."""
        found = self._json("generation_config.json").get("eos_token_id")
        ids = [] if found is None else found if isinstance(found, list) else [found]
        eos = self.config.get("eos_token")
        return [*ids, *([self.target_tokens.index(eos)] if eos in self.target_tokens else [])]

    def tokenizer(self, name: str | None) -> Any:
        """The tokenizer of this name, else the folder's own.

        Raises:
            ModelLoadFailed: there is none.
        """
        if name is not None:
            return AutoTokenizer.from_pretrained(name)
        try:
            return AutoTokenizer.from_pretrained(str(self.path))
        except Exception as error:
            file = self.path / "tokenizer.json"
            if not file.is_file():
                raise ModelLoadFailed(
                    f"{self.path} has no tokenizer ({last_line(error)}); name one with tokenizer_name."
                ) from error
            known = {key: value for key, value in self.config.items() if key in ("bos_token", "eos_token") and value}
            return PreTrainedTokenizerFast(tokenizer_file=str(file), **known)

    def check_vocabulary(self, tokenizer: Any) -> None:
        """Refuse a tokenizer whose ids are not the model's.

        Raises:
            ModelLoadFailed: it names the first token that differs.
        """
        for tokens in (self.source_tokens, self.target_tokens):
            for token, i in tokenizer.get_vocab().items():
                if i >= len(tokens) or tokens[i] != token:
                    here = repr(tokens[i]) if i < len(tokens) else "nothing"
                    raise ModelLoadFailed(
                        f"The tokenizer is not this model's: its token {i} is {token!r}, that of {self.path} is {here}."
                    )

    def open(
        self, device: str, *, compute_type: str | None, intra_threads: int, **settings: Any
    ) -> Callable[[int | None], Any]:
        """Read the weights.

        Returns:
            A function of the number of threads (None: as given here) that gives the library's model.

        Raises:
            ModelLoadFailed: the library is missing or cannot load it.
        """
        library = _library()
        kind, _, index = device.partition(":")
        maker = library.Translator if self.is_translator else library.Generator

        def load(threads: int | None) -> Any:
            try:
                return maker(
                    str(self.path),
                    device=kind,
                    device_index=int(index or 0),
                    compute_type=compute_type or "default",
                    intra_threads=threads or intra_threads,
                    **settings,
                )
            except (RuntimeError, ValueError) as error:
                raise ModelLoadFailed(f"CTranslate2 cannot load {self.path} on {device}: {last_line(error)}") from error

        return load

    @property
    def _shared(self) -> str:
        return "shared_vocabulary" if self._has("shared_vocabulary") else "vocabulary"

    def _has(self, name: str) -> bool:
        return self._vocabulary_file(name) is not None

    def _vocabulary_file(self, name: str) -> Path | None:
        found = [self.path / f"{name}.{ending}" for ending in ("json", "txt")]
        return next((file for file in found if file.is_file()), None)

    def _tokens(self, name: str) -> list[str]:
        file = self._vocabulary_file(name)
        if file is None:
            raise ModelLoadFailed(f"{self.path} has no vocabulary (vocabulary.json or shared_vocabulary.json).")
        text = file.read_text(encoding="utf-8")
        return list(json.loads(text)) if file.suffix == ".json" else text.removesuffix("\n").split("\n")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        if not file.is_file():
            return {}
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelLoadFailed(f"{file} is not JSON: {error}") from error
        if not isinstance(found, dict):
            raise ModelLoadFailed(f"{file} holds no JSON object.")
        return found

    def _bootstrap(self) -> Bootstrap:
        given = self._json("bootstrap_config.json")
        known = [field.name for field in fields(Bootstrap)]
        unknown = [key for key in given if key not in known]
        if unknown:
            raise ModelLoadFailed(
                f"{self.path / 'bootstrap_config.json'}: unknown key {unknown[0]!r} (known: {', '.join(known)})."
            )
        limit = given.get("max_tokens")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ModelLoadFailed(
                f"{self.path / 'bootstrap_config.json'}: max_tokens is {limit!r}, no positive number."
            )
        return Bootstrap(**given)


def instruction_chat(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """A conversation for a model that follows single instructions.

    A lone message of the user is the instruction itself. Of several, the system's stand as they are, then questions
    and answers take turns.
    """
    texts = [(str(message.get("role")), _text(message.get("content"))) for message in messages]
    if [role for role, _ in texts] == ["user"]:
        return texts[0][1]
    names = {"system": "", "developer": "", "assistant": "Assistant: "}
    lines = [names.get(role, "Question: ") + text for role, text in texts]
    return "\n\n".join([*lines, "Assistant:"] if add_generation_prompt else lines)


def _text(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    for part in content:
        if part.get("type") != "text":
            raise ValueError(f"this model reads text only; got a content part of type {part.get('type')!r}")
    return "".join(part["text"] for part in content)


def _library() -> Any:
    try:
        import ctranslate2
    except ImportError as error:
        raise ModelLoadFailed("The ctranslate2 package is missing: pip install 'troupe-serve[ctranslate2]'.") from error
    return ctranslate2
