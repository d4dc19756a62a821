"""One request inside the one-shot engine, from submit to its last event."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.engine.output import ChoiceOutput
from deployments.engine.protocol import Emit, EngineRequest
from deployments.engine.row_sampler import RowSampler
from deployments.engine.sampling import Sampled
from deployments.errors import TroupeError
from deployments.messages import Failed, FinishReason


@dataclass(slots=True, kw_only=True)
class Job:
    """A request, its state and its events.

    Attributes:
        sampler: where the engine samples; None where a loader's hook does.
        cancelled: set from any thread; nothing is emitted from then on.
        done: nothing more is to be computed.
        on_token: called for every token taken, for the counters.
    """

    request: EngineRequest
    emit: Emit
    output: ChoiceOutput
    sampler: RowSampler | None
    on_token: Callable[[], None]
    cancelled: bool = False
    done: bool = False

    @property
    def active(self) -> bool:
        return not (self.cancelled or self.done)

    def take(self, sampled: Sampled) -> None:
        """Give out the next token, or the error of this row."""
        if not self.active:
            return
        if sampled.error is not None:
            self.fail(sampled.error)
            return
        self.on_token()
        delta = self.output.push(sampled)
        self.done = self.output.finished
        if delta is not None:
            self.emit(delta)

    def finish(self, reason: FinishReason) -> None:
        """End the text where it is."""
        if self.active:
            self.done = True
            self.emit(self.output.finish(reason))

    def fail(self, error: TroupeError) -> None:
        if self.active:
            self.done = True
            self.emit(Failed(error))
