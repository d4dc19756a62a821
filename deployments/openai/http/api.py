"""What all requests of one API share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.config.api import ApiOptions
from deployments.core.calls import Call
from deployments.core.client import ModelClient
from deployments.core.events import Accepted
from deployments.openai.http.keys import ApiKeys
from deployments.openai.http.recorder import Recorder

_REMEMBERED = 10_000


@dataclass(slots=True)
class Api:
    """The models, the options, and what was learned of the models' tokenizers."""

    client: ModelClient
    options: ApiOptions
    keys: ApiKeys
    recorder: Recorder | None = None
    _texts: dict[tuple[str, int], str] = field(default_factory=dict)

    async def tokenizer_info(self, model: str) -> dict[str, Any]:
        """`ModelClient.tokenizer_info`, asked every time: the model may have been loaded anew from a changed folder."""
        return await self.client.tokenizer_info(model)

    async def first_text(self, call: Call, accepted: Accepted, token_ids: Sequence[int]) -> str:
        """The text of the first of these tokens, remembered because most prompts begin with the same one."""
        key = (accepted.load, token_ids[0])
        if key not in self._texts:
            if len(self._texts) >= _REMEMBERED:
                self._texts.clear()
            self._texts[key] = await self.client.detokenize(call.model, token_ids[:1])
        return self._texts[key]
