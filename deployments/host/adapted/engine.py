"""The engine of a base as an adapter over it has it."""

from __future__ import annotations

from dataclasses import replace

from deployments.core.calls import SamplingParams
from deployments.engine.base.protocol import Emit, Engine, EngineRequest, EngineStats, engine_encodes_prompts


class AdaptedEngine:
    """Gives every request to the base's engine, with the adapter. See `protocol.Engine`.

    Args:
        engine: of the base.
        key: the adapter's version.
        terminators: tokens that end a text with this adapter, beside those of the base.
    """

    def __init__(self, engine: Engine, key: str, terminators: frozenset[int] = frozenset()) -> None:
        self._engine = engine
        self._key = key
        self._terminators = terminators
        self.max_model_len = engine.max_model_len
        self.encodes_prompts = engine_encodes_prompts(engine)
        self.supports = engine.supports

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        """See `protocol.Engine`."""
        self._engine.submit(replace(request, adapter=self._key, sampling=self._sampling(request.sampling)), emit)

    def _sampling(self, params: SamplingParams) -> SamplingParams:
        if not self._terminators or params.ignore_eos:
            return params
        return replace(params, stop_token_ids=(*params.stop_token_ids, *self._terminators))

    def cancel(self, request_id: str) -> None:
        """See `protocol.Engine`."""
        self._engine.cancel(request_id)

    def stats(self) -> EngineStats:
        """Those of the base."""
        return self._engine.stats()

    def check(self) -> None:
        """See `protocol.Engine`."""
        self._engine.check()

    def close(self, timeout: float = 30.0) -> None:
        """Nothing: the engine is the base's."""
