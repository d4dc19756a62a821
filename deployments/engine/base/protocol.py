"""What every engine does: the seam between serving and computing.

An engine belongs to one loaded model. Requests are submitted from any thread; events are emitted from the engine's
own threads, so `emit` must be quick and must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from deployments.core.calls import Capture, SamplingParams, Turn
from deployments.core.events import EngineEvent
from deployments.core.reasoning import ReasoningMarkers

if TYPE_CHECKING:
    import torch

    from deployments.adapters.lora_file import LoraFile
    from deployments.engine.adapters.table import AdapterTable, PlacedAdapter

Emit = Callable[[EngineEvent], None]


@dataclass(slots=True, kw_only=True)
class EngineRequest:
    """One choice to generate.

    Attributes:
        request_id: unique among the requests in flight.
        input_ids: the encoded prompt, at least one token.
        sampling: with `max_tokens` set and the whole fitting in `max_model_len`.
        model_inputs: what the encoder returned beside `input_ids` and `attention_mask` (pixel values, input
            features, token types …), batch dimension 1, passed to the prefill forward or to `generate`.
        content_key: a digest of `model_inputs`, so that prompts with different images never share a prefix.
        prompt_text: the rendered prompt, for engines that take text.
        continues: the prompt is text that the answer goes on from, so that its first token keeps its space; the prompt
            of a chat ends with the template's markup instead.
        reasoning: how the model marks its reasoning; stop strings count only after it.
        reasoning_opened: the prompt has opened it.
        processors: transformers `LogitsProcessor`s of this request, called before the loader's with int64 [1, length]
            and float32 [1, vocab].
        adapter: the version of the adapter that computes it, which the engine has; empty for the base.
        inspect: what the loader's done_callback wants to see of the model's states.
        turn: when it begins.
    """

    request_id: str
    input_ids: list[int]
    sampling: SamplingParams
    model_inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    content_key: str = ""
    prompt_text: str | None = None
    continues: bool = False
    reasoning: ReasoningMarkers | None = None
    reasoning_opened: bool = False
    processors: Sequence[Any] = ()
    adapter: str = ""
    inspect: Capture | None = None
    turn: Turn = field(default_factory=Turn)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Counters of an engine, readable at any time without a lock. Bytes are of KV caches and states."""

    kind: str = ""
    sequences: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefix_entries: int = 0
    cache_bytes: int = 0
    prefix_bytes: int = 0
    budget_bytes: int = 0
    steps: int = 0


class Engine(Protocol):
    """Computes the text of one loaded model.

    Attributes:
        max_model_len: positions of prompt and text together, or of each of the two if `engine_encodes_prompts`.
        supports: names of the `SamplingParams` fields this engine honors.
    """

    max_model_len: int
    supports: frozenset[str]

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        """Queue a request. Its events end with a `Delta` that has a finish_reason, or with `Failed`.

        It looks at every id of the request once: no event loop should call it with long lists.

        Raises:
            TroupeError: the request can never be served (bad ids, larger than the memory budget), or the engine is
                closed. Nothing is emitted then.
        """

    def cancel(self, request_id: str) -> None:
        """Drop a request within one step; nothing is emitted for it afterwards. Unknown ids are ignored."""

    def stats(self) -> EngineStats:
        """Counters at this moment."""

    def check(self) -> None:
        """Raise TroupeError if the engine's thread has died."""

    def close(self, timeout: float = 30.0) -> None:
        """Stop: let what runs end for at most `timeout` seconds, fail the rest as Unavailable, free memory."""


def engine_encodes_prompts(engine: Engine) -> bool:
    """Whether an encoder reads the prompts, which take no positions of the answers then; engines need not say so."""
    return bool(getattr(engine, "encodes_prompts", False))


@runtime_checkable
class AdapterEngine(Engine, Protocol):
    """An engine that computes requests with adapters over its model.

    Attributes:
        adapters: for forwards beside those of the engine, in any thread.
    """

    adapters: AdapterTable

    def add_adapter(self, key: str, file: LoraFile, dtype: torch.dtype = ...) -> PlacedAdapter:
        """Place an adapter beside the model. Blocks until the engine's thread has taken it.

        Args:
            key: its version, as requests name it.
            dtype: of its matrices; float32 if it is left out.

        Raises:
            AdapterRefused: it does not fit the model.
            TroupeError: the engine closes, or its thread has died.
        """

    def remove_adapter(self, key: str) -> None:
        """Drop an adapter that no request has, and what is kept of its computations. Blocks as `add_adapter` does."""
