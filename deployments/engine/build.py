"""Which engine serves a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from deployments.config.engine import EngineOptions
from deployments.core.errors import ModelLoadFailed
from deployments.core.token_ids import vocab_size
from deployments.engine.base.protocol import Engine
from deployments.engine.base.text_side import TextSide
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.generate.engine import GenerateEngine, is_stock, own_settings
from deployments.engine.generate.model_generate import StockGenerate
from deployments.engine.model.attention import attend_without_plans
from deployments.engine.model.cache_argument import accept_old_fields
from deployments.engine.model.neutral_config import warn_of_left_out
from deployments.engine.model.random_state import TURN_LIMIT_S
from deployments.engine.no_text import NoTextEngine, gives_text
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.capabilities import check_batchable
from deployments.engine.verify.parity import compare_with_generate
from deployments.engine.verify.proofs import PARITY, Proofs
from deployments.engine.verify.refused import Refused
from model_loaders.contract import ModelInfo

logger = logging.getLogger(__name__)


def build_engine(
    info: ModelInfo,
    options: EngineOptions,
    text_side: TextSide,
    *,
    turn_limit_s: float = TURN_LIMIT_S,
    proofs: Proofs | None = None,
    inside: bool = True,
) -> Engine:
    """The engine of a loaded model.

    `auto` takes continuous batching if it can hold the model, the loader has no `generate` hook or kwargs, and a probe
    finds its logits equal to those of `generate`; else the generate engine, with a warning that says why.
    `continuous_batching` leaves the comparison out. A loader's own `engine` always wins. A model without `generate`
    gives embeddings alone.

    Args:
        text_side: of the model.
        turn_limit_s: seconds that a generate hook may keep the random state while others wait, and that a hook of
            interventions may take.
        proofs: notes what is proved of the model.
        inside: requests may capture states of the model, and change them.

    Raises:
        ModelLoadFailed: the engine that was asked for cannot run the model, or it has no such `stop_token_ids`.
    """
    if info.engine is not None:
        engine: Engine = info.engine(info, options)
        return engine
    attend_without_plans()
    if not gives_text(info):
        return NoTextEngine(info, options)
    accept_old_fields(info.model)
    info = _with_generate(info)
    vocabulary = Vocabulary(text_side)
    _check_stop_ids(info, max(len(vocabulary), vocab_size(info.model) or 0))
    hooked = info.generate is not None and not is_stock(info)
    proofs = proofs or Proofs()
    name = info.label or type(info.model).__name__
    _warn_of_more_tokens(info, name)
    if not hooked:
        warn_of_left_out(info.model, name)
    if options.kind == "generate" or (options.kind == "auto" and hooked):
        return GenerateEngine(info, options, vocabulary, turn_limit_s=turn_limit_s, proofs=proofs)
    try:
        proven = _batching_engine if options.kind == "continuous_batching" else _proven
        batching = proven(info, vocabulary, options, proofs, inside=inside)
        batching.hook_watch.limit = turn_limit_s
        return batching
    except Refused as reason:
        if options.kind == "continuous_batching":
            raise ModelLoadFailed(
                f"Model {name} cannot have engine kind 'continuous_batching': {reason}. Use kind 'auto' or 'generate'."
            ) from reason
        logger.warning("Model %s runs in the generate engine, which batches little: %s.", name, reason)
    return GenerateEngine(info, options, vocabulary, turn_limit_s=turn_limit_s, proofs=proofs)


def _check_stop_ids(info: ModelInfo, count: int) -> None:
    """Refuse a loader's stop ids that a model of `count` tokens does not have; 0 if the number is not known."""
    if count and (wrong := [token for token in info.stop_token_ids if token >= count]):
        raise ModelLoadFailed(
            f"The loader of model {info.label!r} returned stop_token_ids with {wrong[0]}, which does not exist; this "
            f"model has ids 0 to {count - 1}."
        )


def _warn_of_more_tokens(info: ModelInfo, name: str) -> None:
    """Log which tokens of the tokenizer the model's embedding lacks: a prompt with one of them is an error."""
    count = vocab_size(info.model)
    words: Mapping[str, int] = getattr(info.tokenizer, "get_vocab", dict)()
    if count and (lacking := sorted((token_id, word) for word, token_id in words.items() if token_id >= count)):
        logger.warning(
            "Model %s has %d tokens, and its tokenizer %d more, such as %r (%d): a prompt with one of them is refused. "
            "Load the tokenizer that the model was saved with, or resize its embeddings.",
            *(name, count, len(lacking), lacking[0][1], lacking[0][0]),
        )


def _with_generate(info: ModelInfo) -> ModelInfo:
    """A model whose loader gives `generate_kwargs` and no hook: they are for its own `generate`."""
    own = getattr(info.model, "generate", None)
    if info.generate is not None or not own_settings(info) or not callable(own):
        return info
    logger.warning(
        "Model %s runs through its own generate, one request at a time, for the sake of generate_kwargs %s. Requests' "
        "own fields and models[].api.default_params do the same in batches.",
        info.label or type(info.model).__name__,
        ", ".join(own_settings(info)),
    )
    return replace(info, generate=own)


def _batching_engine(
    info: ModelInfo, vocabulary: Vocabulary, options: EngineOptions, proofs: Proofs, *, inside: bool
) -> BatchingEngine:
    """Continuous batching, not compared with `generate`.

    Raises:
        Refused: it cannot run the model.
    """
    if info.generate is not None and not is_stock(info):
        raise Refused("its loader has a generate hook, which only the generate engine calls")
    check_batchable(info.model)
    try:
        return BatchingEngine(info, vocabulary, options, proofs, inside=inside)
    except Exception as error:
        raise Refused(f"continuous batching cannot run it: {type(error).__name__}: {error}") from error


def _proven(
    info: ModelInfo, vocabulary: Vocabulary, options: EngineOptions, proofs: Proofs, *, inside: bool
) -> BatchingEngine:
    """Continuous batching whose answers agree with those of `generate`.

    Raises:
        Refused: it cannot run the model, or they do not agree.
    """
    engine = _batching_engine(info, vocabulary, options, proofs, inside=inside)
    if not callable(getattr(info.model, "generate", None)):
        return engine
    try:
        with proofs.of(PARITY) as note:
            count = proofs.recall(PARITY, partial(_compared, info, vocabulary, engine))
            note.found = f"{count} prompts"
    except Exception as error:
        engine.close(timeout=0.0)
        if isinstance(error, Refused):
            raise
        raise Refused(
            f"continuous batching could not be compared with generate: {type(error).__name__}: {error}"
        ) from error
    return engine


def _compared(info: ModelInfo, vocabulary: Vocabulary, engine: BatchingEngine) -> int:
    alone = StockGenerate(info.model, vocabulary).alone
    return compare_with_generate(info.model, vocabulary, engine, alone, engine.capabilities.crossed)
