"""From a request's texts to the token ids that are embedded: prompts before them, truncation, limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deployments.core.calls import Prompt, TextPrompt
from deployments.core.client import EmbedOptions
from deployments.core.errors import BadRequest, ContextOverflow, UnsupportedParameter
from model_loaders.contract import ModelInfo
from model_loaders.prompts.encoded import Encoded
from model_loaders.sentence_format import SentenceFormat, lowercase

_LARGEST = 1_000_000  # Of tokenizers that have no limit, `model_max_length` is far above.
Encode = Callable[[Prompt], tuple[str | None, Encoded]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingText:
    """A text to be embedded.

    Attributes:
        text: as the encoder got it; None for token ids.
        ids: its token ids.
        skipped: tokens at its beginning that are not pooled.
        extra: tensors that belong to it, batch dimension 1.
    """

    text: str | None
    ids: list[int]
    skipped: int = 0
    extra: Mapping[str, Tensor]

    @property
    def is_plain(self) -> bool:
        """Whether nothing belongs to it but one whole number for each token, such as a token type."""
        shape = (1, len(self.ids))
        return all(value.shape == shape and not value.is_floating_point() for value in self.extra.values())


class EmbeddingTexts:
    """Encodes what one model is to embed.

    Args:
        encode: the text and encoding of a prompt, by the model's hooks.
        sentence_format: of the model's folder.
        limit: tokens of a text at most.
    """

    def __init__(self, info: ModelInfo, encode: Encode, sentence_format: SentenceFormat | None, *, limit: int) -> None:
        self._info = info
        self._encode = encode
        self._format = sentence_format or SentenceFormat()
        self.limit = min(limit, self._format.max_seq_length or limit, _encoder_limit(info) or limit)
        if self._format.lowercases:
            lowercase(info.tokenizer)

    def encoded(self, prompt: Prompt, options: EmbedOptions) -> EmbeddingText:
        """A prompt as it is embedded.

        Raises:
            BadRequest: it is empty, or `prompt_name` is unknown.
            ContextOverflow: it is longer than the model takes.
        """
        named = self._named_prompt(options.prompt_name)
        if isinstance(prompt, TextPrompt):
            prompt = replace(prompt, text=named + prompt.text)
        elif options.prompt_name is not None:
            raise UnsupportedParameter("Only texts have a 'prompt_name'; leave it out.", param="prompt_name")
        text, encoded = self._encode(prompt)
        skipped = 0
        if named and isinstance(prompt, TextPrompt) and not self._format.include_prompt:
            skipped = self._prompt_length(replace(prompt, text=named))
        found = EmbeddingText(text=text, ids=encoded.input_ids, skipped=skipped, extra=encoded.model_inputs)
        if options.truncate is not None:
            found = self._truncated(found, prompt, options)
        return self._checked(found, options.param)

    def _checked(self, text: EmbeddingText, param: str) -> EmbeddingText:
        if not text.ids:
            raise BadRequest("An input is empty: nothing to embed.", param=param)
        if len(text.ids) > self.limit:
            raise ContextOverflow(self.limit, len(text.ids), param=param)
        return text

    def _named_prompt(self, name: str | None) -> str:
        prompts = self._format.prompts
        if name is not None and name not in prompts:
            known = f"it has {', '.join(sorted(prompts))}" if prompts else "it has none"
            raise BadRequest(
                f"Invalid 'prompt_name': model {self._info.label!r} has no prompt {name!r}; {known}.",
                param="prompt_name",
            )
        return prompts.get(name or self._format.default_prompt or "", "") or ""

    def _prompt_length(self, prompt: TextPrompt) -> int:
        """Tokens of a prompt alone, without a token that ends a text."""
        ids = self._encode(prompt)[1].input_ids
        special = getattr(self._info.tokenizer, "all_special_ids", ())
        return len(ids) - 1 if ids and ids[-1] in special else len(ids)

    def _truncated(self, text: EmbeddingText, prompt: Prompt, options: EmbedOptions) -> EmbeddingText:
        """A text's first or last tokens, within the special tokens that its tokenizer puts around it."""
        assert options.truncate is not None
        if self._info.embed is not None:
            raise UnsupportedParameter(
                f"Model {self._info.label!r} embeds texts by a hook of its own, which gets them whole; leave "
                "'truncate_prompt_tokens' out.",
                param="truncate_prompt_tokens",
            )
        most = self.limit if options.truncate < 0 else options.truncate
        cut = len(text.ids) - most
        if cut <= 0:
            return text
        if not text.is_plain:
            raise UnsupportedParameter(
                "Only a prompt of nothing but text can be truncated; leave 'truncate_prompt_tokens' out.",
                param="truncate_prompt_tokens",
            )
        before, after = self._around(text, prompt)
        if before + after > most:
            raise BadRequest(
                f"Invalid 'truncate_prompt_tokens': the model's special tokens alone are {before + after}; got {most}.",
                param="truncate_prompt_tokens",
            )
        side = options.truncation_side or getattr(self._info.tokenizer, "truncation_side", "right")
        first = before if side == "left" else len(text.ids) - after - cut
        kept = [*range(first), *range(first + cut, len(text.ids))]
        skipped = sum(i < text.skipped for i in kept)
        extra = {key: value[:, kept] for key, value in text.extra.items()}
        return EmbeddingText(text=text.text, ids=[text.ids[i] for i in kept], skipped=skipped, extra=extra)

    def _around(self, text: EmbeddingText, prompt: Prompt) -> tuple[int, int]:
        """How many special tokens the tokenizer has put before a text and after it."""
        if not isinstance(prompt, TextPrompt) or not prompt.add_special_tokens:
            return 0, 0
        bare = self._encode(replace(prompt, add_special_tokens=False))[1].input_ids
        for before in range(len(text.ids) - len(bare) + 1):
            if text.ids[before : before + len(bare)] == bare:
                return before, len(text.ids) - len(bare) - before
        return 0, 0


def _encoder_limit(info: ModelInfo) -> int | None:
    """Tokens that a model without a head can take: its positions may begin after its padding id, as RoBERTa's do."""
    if callable(getattr(info.model, "generate", None)) or not hasattr(info.model, "modules"):
        return None
    found: list[Any] = [getattr(info.tokenizer, "model_max_length", None)]
    for module in info.model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, torch.nn.Embedding) and positions.padding_idx is not None:
            found.append(positions.num_embeddings - positions.padding_idx - 1)
    return min((int(each) for each in found if isinstance(each, int | float) and 0 < each < _LARGEST), default=None)
