"""What all requests of one API share."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.config.api import ApiOptions
from deployments.core.client import ModelClient
from deployments.core.one_version import OneVersion
from deployments.openai.http.keys import ApiKeys
from deployments.openai.record.recorder import Recorder

_REMEMBERED = 10_000


@dataclass(slots=True)
class Api:
    """The models, the options, and what was learned of the models' tokenizers."""

    client: ModelClient
    options: ApiOptions
    keys: ApiKeys
    recorder: Recorder | None = None
    _texts: dict[tuple[str, int], str] = field(default_factory=dict)

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
