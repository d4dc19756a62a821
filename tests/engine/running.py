"""Running requests through an engine, and what `generate` gives for them alone."""

from __future__ import annotations

import copy
import itertools
import queue
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import TroupeError
from deployments.core.events import Delta, EngineEvent, Failed, PromptScores, is_last
from deployments.core.logprobs import TokenLogprob
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.build import build_engine
from deployments.engine.generate.engine import GenerateEngine
from deployments.engine.model.cache_argument import take_generate_cache
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks

_numbers = itertools.count()

NO_EOS = 1 << 20
"""A terminator that no tiny model has: `generate` then ends by length alone."""


def words(token_ids: torch.Tensor) -> str:
    """A decoder that makes every token visible."""
    return "".join(f"<{i}>" for i in token_ids.tolist())


def model_info(model: Any, **kwargs: Any) -> ModelInfo:
    """A model whose text is its token ids."""
    return ModelInfo(
        model=model, encode=lambda text: {"input_ids": [[int(i) for i in text.split()]]}, decode=words, **kwargs
    )


def batching_engine(model: Any, *, inside: bool = False, **options: Any) -> BatchingEngine:
    """An engine with room for tests.

    Args:
        inside: its modules are measured, for requests that capture states.
    """
    info = model_info(model)
    options = {"memory_gib": 0.25, **options}
    return BatchingEngine(info, Vocabulary(Hooks(info)), EngineOptions(**options), inside=inside)


@contextmanager
def running(model: Any, **options: Any) -> Iterator[BatchingEngine]:
    """A batching engine until the block ends, which then holds nothing."""
    engine = batching_engine(model, **options)
    try:
        yield engine
    finally:
        engine.close(5)
        stats = engine.stats()
        assert (stats.sequences, stats.waiting, stats.cache_bytes, stats.prefix_bytes, stats.prefix_entries) == (0,) * 5


def built_engine(info: ModelInfo, **options: Any) -> Engine:
    """The engine that a loaded model gets."""
    return build_engine(info, EngineOptions(**{"memory_gib": 0.25, **options}), Hooks(info))


def generate_engine(info: ModelInfo, options: EngineOptions | None = None, **kwargs: Any) -> GenerateEngine:
    """The engine of a hook, or of what sequences cannot hold."""
    return GenerateEngine(info, options or EngineOptions(), Vocabulary(Hooks(info)), **kwargs)


def prompt(seed: int, length: int, vocab: int = 150) -> list[int]:
    """Ordinary tokens of a tiny model."""
    chance = random.Random(seed)
    return [chance.randrange(3, vocab) for _ in range(length)]


@dataclass
class Answer:
    """What a request has received.

    Attributes:
        events: those that `next` has not returned yet.
        done: the last event has come.
        on_delta: called in the engine's thread.
    """

    request_id: str
    events: queue.Queue[EngineEvent] = field(default_factory=queue.Queue)
    deltas: list[Delta] = field(default_factory=list)
    scores: PromptScores | None = None
    error: TroupeError | None = None
    done: threading.Event = field(default_factory=threading.Event)
    on_delta: Callable[[Answer], None] | None = None

    def emit(self, event: EngineEvent) -> None:
        if isinstance(event, Failed):
            self.error = event.error
        elif isinstance(event, PromptScores):
            self.scores = event
        else:
            self.deltas.append(event)
        self.events.put(event)
        if isinstance(event, Delta) and self.on_delta is not None:
            self.on_delta(self)
        if is_last(event):
            self.done.set()

    @property
    def ended(self) -> bool:
        return self.done.is_set()

    @property
    def token_ids(self) -> list[int]:
        return [i for delta in self.deltas for i in delta.token_ids]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def entries(self) -> list[TokenLogprob]:
        return [entry for delta in self.deltas for entry in delta.logprobs or ()]

    @property
    def logprobs(self) -> list[float]:
        return [entry.logprob for entry in self.entries]

    @property
    def cached_tokens(self) -> int:
        return sum(delta.cached_tokens for delta in self.deltas)

    @property
    def finish_reason(self) -> str | None:
        return self.deltas[-1].finish_reason

    def next(self, timeout: float = 30.0) -> EngineEvent:
        """The next event, once it has come."""
        return self.events.get(timeout=timeout)

    def end(self, timeout: float = 60.0) -> Answer:
        """Block until the request has ended, well or not."""
        assert self.done.wait(timeout), f"request {self.request_id} has not ended"
        return self

    def wait(self, timeout: float = 60.0) -> Answer:
        """Block until the request has ended; raises its error."""
        self.end(timeout)
        if self.error is not None:
            raise self.error
        return self


def submit(
    engine: Engine,
    ids: Sequence[int],
    max_tokens: int | None,
    *,
    name: str = "",
    inputs: Mapping[str, torch.Tensor] | None = None,
    content_key: str = "",
    adapter: str = "",
    on_delta: Callable[[Answer], None] | None = None,
    answer: Answer | None = None,
    **sampling: Any,
) -> Answer:
    """Send a greedy request of just as many tokens, or one as `sampling` says; `answer` receives its events."""
    answer = answer or Answer(name or f"request-{next(_numbers)}", on_delta=on_delta)
    params = SamplingParams(**{"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    request = EngineRequest(
        request_id=answer.request_id,
        input_ids=list(ids),
        sampling=params,
        model_inputs=inputs or {},
        content_key=content_key,
        adapter=adapter,
    )
    engine.submit(request, answer.emit)
    return answer


def start(engine: Engine, ids: Sequence[int], *, max_tokens: int | None = 16, **asked: Any) -> Answer:
    """Send a greedy request that a terminator ends; `asked` is what `submit` takes."""
    return submit(engine, ids, max_tokens, **{"ignore_eos": False, **asked})


def ask(engine: Engine, ids: Sequence[int], **asked: Any) -> Answer:
    """The same, once it has ended well."""
    return start(engine, ids, **asked).wait()


@dataclass(frozen=True)
class Alone:
    """What `generate` gives: tokens, and their log-probabilities."""

    token_ids: list[int]
    logprobs: list[float]


def generate_alone(
    model: Any, ids: Sequence[int], max_tokens: int, *, generate: Callable[..., Any] | None = None, **inputs: Any
) -> Alone:
    """Greedy `generate` of one request by itself; transformers' own function unless another one is given."""
    given = torch.tensor([list(ids)])
    if model.config.is_encoder_decoder and model.main_input_name in inputs:
        inputs["decoder_input_ids"] = given
    else:
        inputs["input_ids"] = given
        inputs["attention_mask"] = torch.ones_like(given)
    with torch.inference_mode():
        output = (generate or generation(model))(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=NO_EOS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    new = output.sequences[0, -max_tokens:].tolist()
    logprobs = [logits[0].float().log_softmax(-1)[i].item() for logits, i in zip(output.logits, new, strict=True)]
    return Alone(new, logprobs)


def greedy(model: Any, ids: Sequence[int], count: int, **kwargs: Any) -> list[int]:
    """The tokens of the model's own `generate` for one request by itself."""
    return generate_alone(model, ids, count, generate=model.generate, **kwargs).token_ids


def generation(model: Any) -> Callable[..., Any]:
    """`generate` itself; Whisper's own cuts audio into windows, and a checkpoint's code names its cache as it likes."""
    from transformers import GenerationMixin

    view = copy.copy(model)
    take_generate_cache(view)
    return lambda **kwargs: GenerationMixin.generate(view, **kwargs)
