"""What a Whisper writes for one window, while its engine decodes it."""

from __future__ import annotations

from deployments.core.events import Delta, Failed, PromptScores
from deployments.core.logprobs import TokenLogprob
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.engine.base.running_requests import Interval, RunningRequests


class WindowAnswer:
    """The answer of an engine to one prompt, as far as it has come.

    Args:
        request: is queued at once.
        interval: gives the seconds between two looks at it, the first excepted; None looks once, when it is complete.

    Attributes:
        logprobs: of each of `token_ids`.
        scores: of the prompt, if the request asks for them.
    """

    def __init__(self, engine: Engine, request: EngineRequest, *, interval: Interval | None) -> None:
        self.prompt = request.input_ids
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.scores: PromptScores | None = None
        self._running = RunningRequests(engine, interval=interval)
        self._running.submit([request])

    @property
    def complete(self) -> bool:
        """Nothing follows."""
        return not self._running

    async def more(self) -> None:
        """Wait for more.

        Raises:
            TroupeError: the model failed.
        """
        for _, event in await self._running.take():
            match event:
                case Failed():
                    raise event.error
                case PromptScores():
                    self.scores = event
                case Delta():
                    self.token_ids.extend(event.token_ids)
                    self.logprobs.extend(event.logprobs or ())

    async def all(self) -> None:
        """Wait for the end."""
        while not self.complete:
            await self.more()

    def close(self) -> None:
        """Cancel what has not ended."""
        self._running.close()
