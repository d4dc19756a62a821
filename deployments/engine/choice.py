"""Which engine serves a model."""

from __future__ import annotations

from deployments.engine.one_shot import OneShotEngine
from deployments.engine.options import EngineOptions
from deployments.engine.protocol import Engine
from model_loaders.contract import ModelInfo


def build_engine(info: ModelInfo, options: EngineOptions) -> Engine:
    """The engine of a loaded model.

    Raises:
        ModelLoadFailed: no engine can run it.
    """
    if info.engine is not None:
        engine: Engine = info.engine(info, options)
        return engine
    return OneShotEngine(info, options)
