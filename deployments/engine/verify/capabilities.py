"""What a model's forward gets right, measured when it loads.

A few tokens show most; beyond every length that the config names, all of it is measured again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deployments.engine.cache.cache import UnknownLayer, new_cache
from deployments.engine.cache.sequence_bytes import SequenceBytes
from deployments.engine.library.transformers_internals import brings_its_own_cache
from deployments.engine.model.cache_argument import cache_argument
from deployments.engine.model.forward import Forward
from deployments.engine.verify.length_probe import Claims, LengthProbe
from deployments.engine.verify.named_lengths import lengths_in_time
from deployments.engine.verify.proofs import FORWARD, Proofs
from deployments.engine.verify.refused import Refused, Unfaithful


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a batch of a model may do.

    Attributes:
        sequence_bytes: what they cost.
        logits_width: of the model's logits.
        chunks: a prompt may be computed in several forwards.
        pads: prompts of different lengths may be computed together, and decode together.
        mixes: sequences of different lengths may decode together.
        crossed: the lengths that the model's config names and that this was tried beyond.
        sample: logits [2, vocab] after two fixed prompts, on the CPU.
    """

    sequence_bytes: SequenceBytes
    logits_width: int
    chunks: bool
    pads: bool
    mixes: bool
    crossed: tuple[int, ...] = ()
    sample: Tensor = field(default_factory=lambda: torch.empty(0), compare=False, repr=False)

    def __str__(self) -> str:
        """What holds, in words."""
        names = [name for name in ("chunks", "pads", "mixes") if getattr(self, name)]
        beyond = [f"beyond {', '.join(map(str, self.crossed))} tokens"] if self.crossed else []
        return " ".join([", ".join(names) or "one at a time", *beyond])

    @classmethod
    def measure(cls, forward: Forward, limit: int = 0) -> Capabilities:
        """Measured with the model's own forward.

        Args:
            limit: the longest sequence; lengths below it that the config names are crossed.

        Raises:
            Unfaithful: the model's forward with a cache differs from the one without, or depends on what else was
                computed.
            Exception: the model's forward does not run on our caches; whatever it raised.
        """
        if not forward.sends_unnamed:
            return cls._measured(forward, limit)
        try:
            with_all = cls._measured(forward, limit)
        except Exception:
            forward.sends_unnamed = False
            return cls._measured(forward, limit)
        if with_all.mixes:
            return with_all
        forward.sends_unnamed = False
        return cls._measured(forward, limit)

    @classmethod
    def known(cls, forward: Forward, limit: int, proofs: Proofs) -> Capabilities:
        """Those of another model of the same kind, if there was one and the sample shows nothing else; else measured.

        Raises:
            Exception: see `measure`.
        """

        def prove() -> tuple[Capabilities, bool]:
            return cls.measure(forward, limit), forward.sends_unnamed

        found, forward.sends_unnamed = proofs.recall(FORWARD, prove)
        if not proofs.recalls(FORWARD):
            return found
        sample = _sample(LengthProbe(forward, *FORWARD.lengths))
        forward.fresh.reset()
        if sample.shape[-1] == found.logits_width and not bool(sample.isnan().any()):
            return replace(found, sample=sample)
        proofs.forget(FORWARD)
        found, forward.sends_unnamed = proofs.recall(FORWARD, prove)
        return found

    @classmethod
    def _measured(cls, forward: Forward, limit: int) -> Capabilities:
        probe = LengthProbe(forward, *FORWARD.lengths)
        cache, logits = probe.alone(probe.long)
        if not probe.decodes_like_a_prompt():
            raise Unfaithful("its forward gives other results with a cache than without")
        near = probe.claims()
        beyond = _beyond(forward, limit)
        if not (near.decodes and all(found.decodes for found in beyond.values())):
            raise Unfaithful("its forward depends on what was computed before")
        found = [near, *beyond.values()]
        mixes = all(each.mixes for each in found)
        return cls(
            sequence_bytes=SequenceBytes.from_cache(cache),
            logits_width=logits.shape[-1],
            chunks=all(each.chunks for each in found),
            pads=mixes and all(each.pads for each in found),
            mixes=mixes,
            crossed=tuple(beyond),
            sample=_sample(probe),
        )


def _sample(probe: LengthProbe) -> Tensor:
    return torch.stack(probe.wholes).clone().cpu()


def _beyond(forward: Forward, limit: int) -> dict[int, Claims]:
    """What holds beyond each length that the config names."""
    if forward.is_encoder_decoder:
        return {}
    lengths = lengths_in_time(forward.model, limit, "Prompts")
    return {length: LengthProbe(forward, length + 5, max(4, length // 2)).claims() for length in lengths}


def check_batchable(model: Any) -> None:
    """Look at a model, without a forward, for what continuous batching cannot hold.

    Raises:
        Refused: it cannot hold the model.
    """
    if getattr(model, "config", None) is None or not hasattr(model, "get_input_embeddings"):
        raise Refused("it is not a transformers model")
    if cache_argument(model) is None:
        raise Refused("its forward takes no cache")
    if getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None):
        raise Refused("some of its layers keep columns for images, whose number differs from the text's")
    if brings_its_own_cache(model):
        raise Refused("it has its own cache class")
    try:
        new_cache(model)
    except UnknownLayer as error:
        raise Refused(f"continuous batching cannot hold its {error}") from error
    except Exception as error:
        raise Refused(f"its cache cannot be built: {type(error).__name__}: {error}") from error
