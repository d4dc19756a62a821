"""Checks of the engine: which one it is and why, and what fits into memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import torch

from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Subject
from deployments.engine.base.admission import context_length
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.batching.memory import weight_bytes
from deployments.engine.verify.proofs import PARITY

_UNITS = ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_NO_WEIGHTS = "The loader's engine does not show its weights."
_REASON = "which batches little: "
"""Begins the reason in what `build_engine` logs."""


async def engine(subject: Subject) -> Finding:
    """The engine, why it is this one, and what was proved of it."""
    engine, options, info = subject.model.engine, subject.entry.engine, subject.info
    kind = engine.stats().kind or type(engine).__name__
    figures: dict[str, Any] = {"kind": kind, "max_model_len": engine.max_model_len, "proofs": list(subject.log.proofs)}
    if isinstance(engine, BatchingEngine):
        found = engine.capabilities
        figures |= {"chunks": found.chunks, "pads": found.pads, "mixes": found.mixes, "crossed": list(found.crossed)}
        if options.kind != "auto":
            text = f"{kind}, because engine.kind says so; not compared with generate."
            return fine(text, *subject.log.proofs, proved=False, **figures)
        limit = PARITY.tolerance.at(info.model.dtype)
        text = f"{kind}: its answers were found to be those of generate when the model was loaded."
        return fine(text, *subject.log.proofs, proved=True, tolerance=limit, **figures)
    reason = next((line.partition(_REASON)[2] for line in subject.log.warnings if _REASON in line), None)
    if reason is not None:
        return fault("not-batched", f"{kind}, because {reason}", reason=reason, **figures)
    return fine(f"{kind}, because {_why(subject)}.", **figures)


async def load_log(subject: Subject) -> Finding:
    """What the server logs as a warning when it loads the model, beside what other checks say."""
    lines = [line for line in subject.log.warnings if _REASON not in line]
    if not lines:
        return fine("The server logs no warning when it loads the model.", warnings=[])
    return fault("load-warnings", f"{len(lines)} warnings; the first: {lines[0]}", *lines[1:], warnings=lines)


async def memory(subject: Subject) -> Finding:
    """What the weights take, and how many sequences the caches hold."""
    figures = _weights(subject.info.model)
    if not figures["parameters"]:
        raise NotApplicable(_NO_WEIGHTS)
    dtypes = ", ".join(figures["dtypes"]) or "no dtype"
    texts = [f"{figures['parameters']:,} parameters, {size(figures['weight_bytes'])}, {dtypes}"]
    engine = subject.model.engine
    if not isinstance(engine, BatchingEngine):
        return fine(f"{texts[0]}.", **figures)
    budget, held = engine.stats().budget_bytes, engine.capabilities.sequence_bytes
    longest = engine.max_model_len
    whole = held.of_sequence(longest)
    figures |= {
        "cache_bytes_per_token": held.read(1),
        "state_bytes": held.states,
        "cache_budget_bytes": budget,
        "max_model_len": longest,
        "full_sequences": budget // whole if whole else None,
    }
    texts += [f"{size(held.read(1))} of cache per token"] if held.columns else []
    texts += [f"{size(held.states)} of states per sequence"] if held.states else []
    texts.append(f"{size(budget)} hold {figures['full_sequences']} sequences of {longest} tokens")
    context = context_length(subject.info, subject.entry.engine)
    if longest < context:
        return fault("context-cut", f"{'; '.join(texts)}. The model's context has {context} tokens.", **figures)
    return fine(f"{'; '.join(texts)}.", **figures)


async def weights(subject: Subject) -> Finding:
    """Whether every weight is a finite number."""
    named = list(getattr(subject.info.model, "named_parameters", list)())
    if not named:
        raise NotApplicable(_NO_WEIGHTS)
    wrong = await asyncio.to_thread(lambda: [name for name, weight in named if not _is_finite(weight)])
    if not wrong:
        return fine(f"The {len(named)} tensors of weights are finite numbers.", not_finite=[])
    text = f"{len(wrong)} of {len(named)} tensors of weights have NaN or infinity: {', '.join(wrong[:3])}"
    return fault("weights-not-finite", f"{text}{' …' if len(wrong) > 3 else '.'}", not_finite=wrong)


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit, name in _UNITS:
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def _why(subject: Subject) -> str:
    """Why the server chose an engine without trying another one."""
    if subject.info.engine is not None:
        return "the loader brings its own engine"
    if subject.entry.engine.kind == "generate":
        return "engine.kind says so"
    if subject.info.generate is not None:
        return "the loader has a generate hook"
    if not subject.gives_text and subject.model.speech is None:
        return "the model has no head for text"
    return "the loader has generate_kwargs"


def _weights(model: Any) -> dict[str, Any]:
    """Number, bytes and dtypes of a model's parameters."""
    parameters = list(getattr(model, "parameters", list)())
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[_dtype(parameter.dtype)] += parameter.numel()
    return {"parameters": sum(counts.values()), "weight_bytes": weight_bytes(model), "dtypes": dict(counts)}


def _is_finite(weight: torch.Tensor) -> bool:
    """Whether a tensor has finite numbers only, as far as torch can tell for its dtype."""
    if weight.is_meta or not weight.is_floating_point():
        return True
    try:
        return bool(torch.isfinite(weight).all())
    except (NotImplementedError, RuntimeError):
        return True


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
