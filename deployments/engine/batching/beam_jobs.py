"""Beam searches beside sequences that are batched: each runs whole, between two steps of the others."""

from __future__ import annotations

from typing import Any

from deployments.core.calls import SamplingParams
from deployments.core.errors import UnsupportedParameter
from deployments.engine.adapters.table import AdapterTable
from deployments.engine.base.failures import as_error, raise_if_lost
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.turns import TurnQueue
from deployments.engine.generate.beam_search import BeamSearch, check_beams
from deployments.engine.generate.job import Job
from deployments.engine.generate.model_generate import StockGenerate
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.vocabulary import Vocabulary


class BeamJobs:
    """Requests for beam search of one model, from the queue to their last event.

    Args:
        model: a transformers model with `generate`.
        vocabulary: of the model.
        longest: tokens that a text may have.
    """

    def __init__(self, model: Any, vocabulary: Vocabulary, longest: int) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._longest = longest
        self._waiting: TurnQueue[Job] = TurnQueue()
        self._generate: StockGenerate | None = None
        self._search: BeamSearch | None = None

    def job(self, live: LiveRequest) -> Job:
        """A request's job, which the engine's thread queues; see `check_search`."""
        output = ChoiceOutput.from_request(
            self._vocabulary,
            live.request,
            encoder_decoder=bool(getattr(self._model.config, "is_encoder_decoder", False)),
        )
        return Job(live=live, output=output)

    @property
    def idle(self) -> bool:
        """Whether no search waits for its turn."""
        return not self._waiting

    def queue(self, job: Job) -> None:
        """Let a job wait for its turn."""
        self._waiting.add(job, job.request.turn)

    def run_next(self, adapters: AdapterTable) -> None:
        """Run the search whose turn it is, if one waits, and give out its text. Blocks.

        Args:
            adapters: of the model.
        """
        job = next(iter(self._waiting), None)
        if job is None:
            return
        self._waiting.begin(job)
        if not job.active:
            return
        job.live.running = True
        try:
            if self._generate is None or self._search is None:
                self._generate = StockGenerate(self._model, self._vocabulary, longest=self._longest)
                self._search = BeamSearch(self._generate.call, self._vocabulary, self._generate.width)
            with adapters.applied([job.request.adapter]):
                self._search.run(job, self._generate.inputs(job))
        except Exception as error:
            raise_if_lost(error)
            job.fail(as_error(error))


def check_search(params: SamplingParams) -> None:
    """Refuse what does not go with beams.

    Raises:
        UnsupportedParameter: a setting that does not go with beams.
    """
    check_beams(params)
    if params.prompt_logprobs is not None:
        raise UnsupportedParameter(
            "Beam search cannot honor prompt_logprobs; leave it out, or search without beams.", param="prompt_logprobs"
        )
