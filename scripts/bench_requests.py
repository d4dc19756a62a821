"""Requests to the engine that `bench_engine.py` measures, and who waits for them."""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from bench_baselines import apart

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.events import Delta, EngineEvent, Failed
from deployments.engine.base.protocol import EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.text.vocabulary import Vocabulary
from model_loaders.contract import ModelInfo
from model_loaders.prompts.hooks import Hooks


@dataclass
class Client:
    """Receives one request's events and notes when they came."""

    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)

    def emit(self, event: EngineEvent) -> None:
        if isinstance(event, Failed):
            self.error = str(event.error)
            self.done.set()
        elif isinstance(event, Delta):
            self.times.append(time.perf_counter())
            self.tokens.extend(event.token_ids)
            self.logprobs.extend(entry.logprob for entry in event.logprobs or ())
            self.cached += event.cached_tokens
            if event.finish_reason is not None:
                self.done.set()

    def wait(self) -> Client:
        self.done.wait()
        if self.error:
            raise SystemExit(f"A request failed: {self.error}")
        return self

    @property
    def gaps(self) -> list[float]:
        return [later - sooner for sooner, later in zip(self.times, self.times[1:], strict=False)]


class Engine:
    """The engine under test, by the names of a benchmark."""

    def __init__(self, model: Any, arguments: argparse.Namespace, **options: Any) -> None:
        info = ModelInfo(model=model, encode=lambda text: {"input_ids": [[0]]}, decode=lambda ids: f"{ids.tolist()}")
        info.tokenizer = _tokenizer(model.config.get_text_config().vocab_size)
        info.decode = None
        settings = {
            "max_batch_size": max(arguments.rows),
            "memory_gib": arguments.memory_gib,
            "threads": arguments.threads,
        }
        self.batching_engine = apart(
            lambda: BatchingEngine(info, Vocabulary(Hooks(info)), EngineOptions(**settings | options))
        )
        self._count = 0
        self.steps: list[float] = []

    def start(
        self,
        ids: list[int],
        new: int,
        inputs: Mapping[str, torch.Tensor] | None = None,
        adapter: str = "",
        client: Any = None,
        **sampling: Any,
    ) -> Any:
        client = client or Client()
        self._count += 1
        params = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": new, **sampling})
        # A version without adapters has no such field.
        chosen: dict[str, Any] = {"adapter": adapter} if adapter else {}
        request = EngineRequest(
            request_id=str(self._count), input_ids=ids, sampling=params, model_inputs=inputs or {}, **chosen
        )
        self.batching_engine.submit(request, client.emit)
        return client

    def run(self, prompts: list[list[int]], new: int) -> None:
        clients = [self.start(ids, new) for ids in prompts]
        for client in clients:
            client.wait()
        self.steps = [gap for client in clients for gap in client.gaps[new // 3 :]]

    def close(self) -> None:
        self.batching_engine.close(timeout=0.0)


def _tokenizer(vocab: int) -> Any:
    """A byte-level tokenizer with a text for every id, so that detokenizing costs what it does in earnest."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    words = (f"Ġ{a}{b}{c}{d}" for a in letters for b in letters for c in letters for d in letters)
    vocabulary = {token: i for i, token in zip(range(vocab), [*alphabet, *words], strict=False)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def random_prompts(rng: random.Random, count: int, length: int, vocab: int) -> list[list[int]]:
    return [[rng.randrange(1, vocab) for _ in range(length)] for _ in range(count)]
