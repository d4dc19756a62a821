"""Making the state of new requests, beside the thread that computes and the one that submits."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from deployments.core.calls import SamplingParams
from deployments.engine.base.live_request import LiveRequest
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.sequence import Sequence
from deployments.engine.inside.inspected import Inspected
from deployments.engine.model.forward import Forward
from deployments.engine.text.output import ChoiceOutput
from deployments.engine.text.prompt_logprobs import PromptScorer
from deployments.engine.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class SequenceBuilder:
    """Makes the sequences of one model, in the order in which they are asked for, in a thread of its own.

    What needs a table of the whole vocabulary waits in a second thread until the table is there, and others pass it.

    Args:
        forward: the model's forward passes.
        vocabulary: of the model.
        width: of the logits.
    """

    def __init__(self, forward: Forward, vocabulary: Vocabulary, width: int) -> None:
        self._forward = forward
        self._vocabulary = vocabulary
        self._width = width
        self._sequences = _Thread("sequence-builder")
        self._tables = _Thread("vocabulary-tables")

    def run(self, params: SamplingParams, build: Callable[[], None]) -> None:
        """Call a function that makes a sequence with such parameters, when its turn comes; it must not raise."""
        if not self._vocabulary.lacks_tables(params):
            self._sequences.put(build)
            return

        def after_tables() -> None:
            try:
                self._vocabulary.build_tables(params, self._width)
            finally:
                # If the table cannot be built, the sequence cannot either, and its request fails with the reason.
                self._sequences.put(build)

        self._tables.put(after_tables)

    def close(self) -> None:
        """End the threads after what they are at."""
        self._tables.stop()
        self._sequences.stop()

    def sequence(self, live: LiveRequest, inspected: Inspected | None = None) -> Sequence:
        """The state of a new request."""
        request = live.request
        params, vocabulary = request.sampling, self._vocabulary
        ids = self._forward.decoder_prompt(request.input_ids, request.model_inputs)
        scorer = None
        if params.prompt_logprobs is not None:
            scorer = PromptScorer(vocabulary, ids, params.prompt_logprobs, params.logprob_token_ids)
        return Sequence(
            live=live,
            sampler=vocabulary.sampler(
                params, ids, vocab_size=self._width, device=self._forward.device, processors=request.processors
            ),
            output=ChoiceOutput.from_request(vocabulary, request, encoder_decoder=self._forward.is_encoder_decoder),
            ids=ids,
            prompt_length=len(ids),
            frequencies=self._forward.rotary.frequencies(len(ids)),
            encoded_length=len(request.input_ids) if self._forward.is_encoder_decoder else 0,
            media_end=self._forward.media_end(request.input_ids, request.model_inputs),
            scorer=scorer,
            inspected=inspected,
        )

    def lengths(self, request: EngineRequest) -> tuple[int, int]:
        """Tokens of the sequence that a request will be, and of its encoder; without making the sequence."""
        if not self._forward.is_encoder_decoder:
            return len(request.input_ids), 0
        return len(self._forward.decoder_prompt(request.input_ids, request.model_inputs)), len(request.input_ids)


class _Thread:
    """A daemon thread that calls functions in order."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def stop(self) -> None:
        self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                logger.exception("A job of thread %s failed.", threading.current_thread().name)
            # While the thread waits it must not keep alive what the last job had.
            del job
