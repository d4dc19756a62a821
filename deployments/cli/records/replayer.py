"""Sends recorded calls again and compares the answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import replace
from typing import Any

import httpx2

from deployments.cli.records.calls import COMPLETIONS, RecordedCall
from deployments.cli.records.comparison import Difference, Outcome, first_difference
from deployments.core.errors import ConfigError

_HEADERS = {"x-troupe-resume": "false"}
_RETRIES = 3


class Replayer:
    """Asks a server what it was asked before.

    Args:
        client: of the server, its base URL ending with /v1.
        model: asked in place of the recorded one; None keeps it.
        at_once: requests at the same time.
    """

    def __init__(self, client: httpx2.AsyncClient, *, model: str | None = None, at_once: int = 16) -> None:
        self._client = client
        self._model = model
        self._at_once = at_once

    async def outcomes(self, calls: Iterable[RecordedCall]) -> AsyncGenerator[Outcome, None]:
        """What comes of each call, in their order.

        Raises:
            ConfigError: nobody answers at the URL.
        """
        waiting: list[asyncio.Task[Outcome]] = []
        source = iter(calls)
        try:
            while True:
                self._fill(waiting, source)
                if not waiting:
                    return
                yield await waiting.pop(0)
        finally:
            for task in waiting:
                task.cancel()

    def _fill(self, waiting: list[asyncio.Task[Outcome]], source: Iterator[RecordedCall]) -> None:
        while len(waiting) < self._at_once and (call := next(source, None)) is not None:
            waiting.append(asyncio.create_task(self._outcome(call)))

    async def _outcome(self, call: RecordedCall) -> Outcome:
        if call.skipped is not None:
            return Outcome(call=call, result="skipped", why=call.skipped)
        if self._model is not None and call.variant is not None:
            why = "of a variant, whose default fields the asked model does not have"
            return Outcome(call=call, result="skipped", why=why)
        response = await self._post(str(call.route), call.body(self._model))
        if response.status_code != 200:
            return Outcome(call=call, result="failed", why=_message(response))
        fingerprint = response.headers.get("x-troupe-fingerprint", "")
        try:
            found = first_difference(call, response.json())
        except (KeyError, IndexError, TypeError, ValueError):
            why = "the answer has no token ids, as a server of Troupe gives them with return_token_ids"
            return Outcome(call=call, result="failed", why=why)
        if found is None:
            return Outcome(call=call, result="equal", fingerprint=fingerprint)
        found = await self._with_probabilities(call, found)
        return Outcome(call=call, result="differs", difference=found, fingerprint=fingerprint)

    async def _with_probabilities(self, call: RecordedCall, found: Difference) -> Difference:
        """The difference, with the probabilities of both tokens after what the answers have in common."""
        wanted = [token for token in (found.recorded, found.now) if token is not None]
        prompts = call.line["prompts"]
        # The positions of interventions count from the end of a prompt, which is another one here.
        if found.choice is None or call.has_media or call.steered or not wanted or not prompts:
            return found
        per_prompt = max(1, len(call.line["choices"]) // len(prompts))
        tokens = next(each["token_ids"] for each in call.line["choices"] if each["index"] == found.choice)
        body = {
            "model": call.asked(self._model),
            "prompt": [*prompts[found.choice // per_prompt]["token_ids"], *tokens[: found.position]],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 0,
            "logprob_token_ids": wanted,
            "return_tokens_as_token_ids": True,
        }
        response = await self._post(COMPLETIONS, body)
        if response.status_code != 200:
            return found
        top: dict[str, float] = response.json()["choices"][0]["logprobs"]["top_logprobs"][0]
        return replace(found, probabilities=(_probability(top, found.recorded), _probability(top, found.now)))

    async def _post(self, route: str, body: dict[str, Any]) -> httpx2.Response:
        for attempt in range(_RETRIES):
            try:
                response = await self._client.post(route, json=body, headers=_HEADERS)
            except httpx2.TransportError as error:
                if attempt == _RETRIES - 1:
                    raise ConfigError(f"{self._client.base_url} does not answer: {error}.") from None
            else:
                if response.status_code not in (429, 503) or attempt == _RETRIES - 1:
                    return response
                await asyncio.sleep(min(30.0, float(response.headers.get("retry-after", "1"))))
        raise AssertionError("unreachable")


def _probability(top: dict[str, float], token: int | None) -> float | None:
    logprob = None if token is None else top.get(f"token_id:{token}")
    return None if logprob is None else math.exp(logprob)


def _message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
