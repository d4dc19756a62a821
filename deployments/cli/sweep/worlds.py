"""The benchmark `agent:worlds`: episodes in which the model walks a small generated world by text."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from deployments.cli.endpoint.server import Endpoint
from deployments.cli.sweep.models import resume_headers
from deployments.cli.sweep.results import Score, wilson
from deployments.core.errors import ConfigError
from model_loaders.demo.worlds import make_world

if TYPE_CHECKING:
    from httpx2 import Client, Response

NAME = "agent:worlds"
_MAX_TOKENS = 64
_TRIES = 6
_RETRIED = (408, 409, 429, 500, 502, 503, 504)
_TIMEOUT_S = 600.0


def play(
    server: Endpoint,
    model: str,
    *,
    episodes: int,
    workers: int,
    seed: int,
    show: Callable[[int], None] = lambda _: None,
) -> list[Score]:
    """The share of worlds whose code the model finds, and of answers that are an action of the world.

    Every model gets the same worlds. Requests are greedy, and a server with a record answers from it what it has
    answered before.

    Args:
        show: called with the number of episodes that have ended.

    Raises:
        ConfigError: the server refuses a request, or goes on failing.
    """
    import httpx2

    headers = {**server.authorization, **resume_headers(server, model)}
    limits = httpx2.Limits(max_connections=None)
    pool = ThreadPoolExecutor(workers)
    with httpx2.Client(base_url=server.url, headers=headers, timeout=_TIMEOUT_S, limits=limits) as client:
        player = _Player(client, model)
        tasks = [pool.submit(player.episode, random.Random(f"{seed} {number}")) for number in range(episodes)]
        found = []
        try:
            for task in tasks:
                found.append(task.result())
                show(len(found))
        finally:
            player.leave()
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C, no episode is played to its end
    won = sum(score for score, _, _ in found)
    steps, errors = sum(steps for _, steps, _ in found), sum(errors for _, _, errors in found)
    return [_share("score", won, episodes), _share("valid actions", steps - errors, steps)]


def _share(metric: str, successes: float, samples: int) -> Score:
    low, high = wilson(successes, samples)
    return Score(task=NAME, metric=metric, value=successes / max(1, samples), low=low, high=high, samples=samples)


class _Player:
    """Plays episodes, until `leave`."""

    def __init__(self, client: Client, model: str) -> None:
        self._client = client
        self._model = model
        self._left = threading.Event()

    def leave(self) -> None:
        """Ask nothing more: running episodes fail."""
        self._left.set()

    def episode(self, chance: random.Random) -> tuple[float, int, int]:
        """The score of an episode, its answers, and how many of these were errors."""
        world = make_world(chance)
        messages: list[dict[str, Any]] = [dict(message) for message in world.reset()]
        while True:
            text = self._answer(messages)
            step = world.step(text)
            if step.observation is None:
                # Beyond the last step, the world does not say whether it has understood.
                return step.score, min(world.steps, world.max_steps - 1), world.errors
            messages += [{"role": "assistant", "content": text}, dict(step.observation)]

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        import httpx2

        body = {"model": self._model, "messages": messages, "temperature": 0, "max_tokens": _MAX_TOKENS}
        said = ""
        for attempt in range(_TRIES):
            if self._left.wait(min(30.0, 0.5 * 2**attempt) if attempt else 0):
                said = "the run has ended"
                break
            try:
                response = self._client.post("/v1/chat/completions", json=body)
            except httpx2.TransportError as error:
                said = f"{type(error).__name__}: {error}"
                continue
            if response.status_code == 200:
                return str(response.json()["choices"][0]["message"]["content"] or "")
            said = f"status {response.status_code}: {_message(response)}"
            if response.status_code == 400 and "context_length_exceeded" in response.text:
                return ""  # the episode is lost, and not the run
            if response.status_code not in _RETRIED:
                break
        raise ConfigError(f"{self._model}: {said}")


def _message(response: Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]
