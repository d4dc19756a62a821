"""What all requests of one API share."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.batches.client import BatchClient
from deployments.config.api import ApiOptions
from deployments.core.client import ModelClient
from deployments.core.model_card import ModelCard, ModelOptions
from deployments.core.one_version import OneVersion
from deployments.openai.http.keys import ApiKeys
from deployments.openai.parsing import AnswerFormat
from deployments.openai.parsing.format import format_of
from deployments.openai.record.recorder import Recorder

_REMEMBERED = 10_000
_REMEMBERED_FORMATS = 256


@dataclass(slots=True)
class Api:
    """The models, the options, and what was learned of the models' tokenizers.

    Attributes:
        batches: files and batches; None if the server has none.
    """

    client: ModelClient
    options: ApiOptions
    keys: ApiKeys
    recorder: Recorder | None = None
    batches: BatchClient | None = None
    _texts: dict[tuple[str, int], str] = field(default_factory=dict)
    _facts: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)
    _formats: dict[tuple[str, str | None, str | None, str | None], AnswerFormat] = field(default_factory=dict)

    async def tokenizer_facts(self, client: OneVersion, card: ModelCard) -> Mapping[str, Any]:
        """`ModelClient.tokenizer_info` of a model, remembered once its fingerprint is known."""
        key = (card.id, card.fingerprint)
        if key not in self._facts:
            info = await client.tokenizer_info(card.id)
            if len(self._facts) >= _REMEMBERED:
                self._facts.clear()
            self._facts[card.id, str(info["fingerprint"])] = info
            return info
        return self._facts[key]

    async def answer_format(self, info: Mapping[str, Any], template: str | None, options: ModelOptions) -> AnswerFormat:
        """How a model writes its answers, remembered: finding it renders the template some dozen times.

        Args:
            info: its `tokenizer_facts`.
            template: the chat template that writes the prompt.
        """
        key = (str(info["fingerprint"]), template, options.tool_parser, options.reasoning_parser)
        if key not in self._formats:
            # The engine leaves out the special tokens that no marker claims.
            tokens = (*(info.get("special_tokens") or ()), *(info.get("markers") or ()))
            found = await asyncio.to_thread(format_of, options, template, tokens)
            if len(self._formats) >= _REMEMBERED_FORMATS:
                self._formats.clear()
            self._formats[key] = found
        return self._formats[key]

    async def first_text(self, client: OneVersion, model: str, token_id: int) -> str:
        """The text of a prompt's first token, remembered because most prompts begin with the same one.

        Args:
            client: has answered a call already: the token is one of that version's.
        """
        key = (client.fingerprint, token_id)
        if key not in self._texts:
            if len(self._texts) >= _REMEMBERED:
                self._texts.clear()
            self._texts[key] = await client.detokenize(model, [token_id])
        return self._texts[key]
