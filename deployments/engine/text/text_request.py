"""A live request and the text that is made for it."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.core.errors import TroupeError
from deployments.core.events import EngineEvent, FinishReason
from deployments.engine.base.failures import as_error
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.sampling.sample import Sampled
from deployments.engine.sampling.state import SequenceSampler
from deployments.engine.text.output import ChoiceOutput


@dataclass(slots=True, kw_only=True, eq=False)
class TextRequest:
    """Turns the tokens of a request into its events, of which none follows the last.

    Attributes:
        live: where its events go.
        output: makes text of tokens.
        sampler: where the engine samples; None until it is known, and where others sample.
    """

    live: LiveRequest
    output: ChoiceOutput
    sampler: SequenceSampler | None = None

    @property
    def request(self) -> EngineRequest:
        return self.live.request

    @property
    def active(self) -> bool:
        """Whether anything is still to be computed."""
        return self.live.active

    def take(self, sampled: Sampled) -> None:
        """Give out the next token, or the error of this sequence."""
        if sampled.error is not None:
            self.fail(sampled.error)
            return
        if self.request.sampling.max_tokens == 0:
            self.finish("length")  # The prompt alone was asked for, and generate makes one token at least.
        if not self.live.active:
            return
        try:
            delta = self.output.push(sampled)
        except BaseException as error:  # a tokenizer in Rust that panics raises no Exception
            self.fail(as_error(error))
            return
        if delta is not None:
            self.give(delta)

    def give(self, event: EngineEvent) -> None:
        """Give out an event as it is."""
        self.live.give(event)

    def finish(self, reason: FinishReason) -> None:
        """End the text where it is, if it has not ended."""
        if not self.live.active:
            return
        try:
            self.give(self.output.finish(reason))
        except BaseException as error:
            self.fail(as_error(error))

    def fail(self, error: TroupeError) -> None:
        """End with an error."""
        self.live.fail(error)
