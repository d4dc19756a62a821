"""One request inside the generate engine, from submit to its last event."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.core.errors import ModelError, TroupeError
from deployments.core.events import Failed, FinishReason, PromptScores
from deployments.engine.base.protocol import Emit, EngineRequest
from deployments.engine.sampling.sample import Sampled
from deployments.engine.sampling.state import SequenceSampler
from deployments.engine.text.output import ChoiceOutput


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """A request, its state and its events. Events never cross a cancellation or follow the last one.

    Attributes:
        sampler: where the engine samples; None until it is known, and where a loader's hook samples.
        on_token: called for every token taken, for the counters.
        begun: it has been run at least once.
        scored: the prompt's log-probabilities have been given out.
    """

    request: EngineRequest
    emit: Emit
    output: ChoiceOutput
    on_token: Callable[[], None]
    sampler: SequenceSampler | None = None
    begun: bool = False
    scored: bool = False
    _ended: bool = False
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def active(self) -> bool:
        """Whether anything is still to be computed."""
        return not self._ended

    def take(self, sampled: Sampled) -> None:
        """Give out the next token, or the error of this row."""
        if sampled.error is not None:
            self.fail(sampled.error)
            return
        with self._lock:
            if self._ended:
                return
            self.on_token()
            try:
                delta = self.output.push(sampled)
            except Exception as error:
                self.fail(_as_error(error))
                return
            self._ended = self.output.finished
            if delta is not None:
                self.emit(delta)

    def give(self, scores: PromptScores) -> None:
        """Give out the prompt's scores."""
        with self._lock:
            self.scored = True
            if not self._ended:
                self.emit(scores)

    def finish(self, reason: FinishReason) -> None:
        """End the text where it is."""
        with self._lock:
            if self._ended:
                return
            try:
                delta = self.output.finish(reason)
            except Exception as error:
                self.fail(_as_error(error))
                return
            self._ended = True
            self.emit(delta)

    def fail(self, error: TroupeError) -> None:
        """End with an error."""
        with self._lock:
            if not self._ended:
                self._ended = True
                self.emit(Failed(error))

    def cancel(self) -> None:
        """End without a word."""
        with self._lock:
            self._ended = True


def _as_error(error: Exception) -> TroupeError:
    """What a decode hook raised, as the request's failure."""
    return error if isinstance(error, TroupeError) else ModelError(f"Hook decode failed: {error}")
