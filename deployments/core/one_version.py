"""Several calls for one request, answered by one version of the model."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from deployments.core.calls import Call, ChatPrompt, Prompt
from deployments.core.client import Embeddings, EmbedOptions, ModelClient, Rendered, TokenPiece
from deployments.core.events import Accepted, Event
from deployments.core.fingerprint import check_expected, weights_of
from deployments.core.transcript import TranscriptionStarted


class OneVersion:
    """Asks every call of the weights that answered the first.

    Args:
        client: answers the calls.
        expect: the weights that the client's request asks for, `w<12>`; empty takes those that answer first.

    Attributes:
        fingerprint: of the model that has answered; empty until then.
    """

    def __init__(self, client: ModelClient, expect: str = "") -> None:
        self._client = client
        self._asked = expect
        self._expect = expect
        self.fingerprint = ""

    def begin_again(self) -> bool:
        """Forget which version has answered; False if the request itself asks for one."""
        self._expect, self.fingerprint = self._asked, ""
        return not self._asked

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """`ModelClient.generate`."""
        async with aclosing(self._client.generate(replace(call, expect=self._expect))) as events:
            async for event in events:
                if isinstance(event, Accepted | TranscriptionStarted):
                    self._learn(call.model, event.fingerprint)
                yield event

    async def render(self, model: str, prompt: Prompt) -> Rendered:
        """`ModelClient.render`."""
        rendered = await self._client.render(model, prompt, expect=self._expect)
        self._learn(model, rendered.fingerprint)
        return rendered

    async def chat_texts(self, model: str, prompts: Sequence[ChatPrompt]) -> tuple[str, ...]:
        """`ModelClient.chat_texts`."""
        found = await self._client.chat_texts(model, prompts, expect=self._expect)
        self._learn(model, found.fingerprint)
        return found.texts

    async def detokenize(self, model: str, token_ids: Sequence[int]) -> str:
        """`ModelClient.detokenize`."""
        return await self._client.detokenize(model, token_ids, expect=self._expect)

    async def spell(self, model: str, token_ids: Sequence[int]) -> tuple[str, ...]:
        """`ModelClient.spell`."""
        return await self._client.spell(model, token_ids, expect=self._expect)

    async def pieces(self, model: str, token_ids: Sequence[int]) -> tuple[TokenPiece, ...]:
        """`ModelClient.pieces`."""
        return await self._client.pieces(model, token_ids, expect=self._expect)

    async def embed(self, model: str, prompts: Sequence[Prompt], options: EmbedOptions) -> Embeddings:
        """`ModelClient.embed`."""
        found = await self._client.embed(model, prompts, options, expect=self._expect)
        self._learn(model, found.fingerprint)
        return found

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """`ModelClient.tokenizer_info`."""
        info = await self._client.tokenizer_info(model, expect=self._expect)
        self._learn(model, str(info["fingerprint"]))
        return info

    async def fingerprint_parts(self, model: str) -> dict[str, Any]:
        """`ModelClient.fingerprint_parts`."""
        parts = await self._client.fingerprint_parts(model, expect=self._expect)
        self._learn(model, str(parts["fingerprint"]))
        return parts

    def _learn(self, model: str, fingerprint: str) -> None:
        # Calls at once may have been answered before either was known.
        check_expected(model, fingerprint, self._expect)
        self.fingerprint, self._expect = fingerprint, weights_of(fingerprint)
