"""What a model's forward gets right, measured with a few tokens when it loads.

Every claim is tested against one forward over the whole prompt: computing a prompt in two forwards, two prompts
padded together, and two rows of different lengths decoding together.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.engine.forward import NO_OFFSET, Forward
from deployments.engine.kv_cache import AnyRowsCache, EncoderRowsCache, UnknownLayer, new_cache
from deployments.engine.memory import RowBytes

_LONG, _SHORT = 9, 4


class Unfaithful(RuntimeError):
    """A model computes something else with rows than by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What rows of a model may do.

    Attributes:
        row_bytes: what they cost.
        logits_width: of the model's logits.
        chunks: a prompt may be computed in several forwards.
        pads: prompts of different lengths may be computed together.
        mixes: rows of different lengths may decode together.
    """

    row_bytes: RowBytes
    logits_width: int
    chunks: bool
    pads: bool
    mixes: bool

    @classmethod
    def of(cls, forward: Forward) -> Capabilities:
        """Measured with the model's own forward.

        Raises:
            Unfaithful: the model's forward with a cache differs from the one without.
            Exception: the model's forward does not run on our caches; whatever it raised.
        """
        probe = _Probe(forward)
        cache, logits = probe.alone(probe.long)
        if not probe.decodes():
            raise Unfaithful("its forward with a cache is not what it is without")
        return cls(
            row_bytes=RowBytes.of(cache),
            logits_width=logits.shape[-1],
            chunks=_holds(probe.chunks),
            pads=not forward.is_encoder_decoder and _holds(probe.pads),
            mixes=_holds(probe.mixes),
        )


def rows_can_hold(model: Any) -> str | None:
    """Why rows cannot hold a model, or None if nothing speaks against trying; costs no forward."""
    if getattr(model, "config", None) is None or not hasattr(model, "get_input_embeddings"):
        return "it is no transformers model"
    parameters = inspect.signature(model.forward).parameters
    if not {"past_key_values", "cache_params"} & parameters.keys():
        return "its forward takes no cache"
    if getattr(model.config.get_text_config(decoder=True), "cross_attention_layers", None):
        return "some of its layers keep the columns of images, which are not as many as the text's"
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    if supports is not None and not supports():
        return "it brings a cache class of its own"
    try:
        new_cache(model)
    except UnknownLayer as error:
        return f"rows cannot hold its {error}"
    except Exception as error:
        return f"its cache cannot be built: {type(error).__name__}: {error}"
    return None


class _Probe:
    """Prompts of arbitrary tokens, and the logits of what follows them."""

    def __init__(self, forward: Forward) -> None:
        self.forward = forward
        ids = _ordinary_ids(forward.model, 2 * _LONG)
        self.long, self.short = ids[:_LONG], ids[-_SHORT:]

    def alone(self, ids: Sequence[int]) -> tuple[AnyRowsCache, Tensor]:
        """The cache and the last logits [vocab] of one forward over a prompt."""
        cache = new_cache(self.forward.model)
        if isinstance(cache, EncoderRowsCache):
            inputs = _encoder_inputs(self.forward.model)
            chunk = self.forward.encode(self.long, inputs, ids, cache)
        else:
            chunk = self.forward.prefill([ids], cache)
        return cache, chunk.logits[0, -1]

    def decodes(self) -> bool:
        """A row by itself, with another prompt computed in between: nothing of it may be kept outside its cache."""
        cache, _ = self.alone(self.long[:-1])
        self.alone(self.short)
        logits = self.forward.decode([self.long[-1]], [NO_OFFSET], cache)
        return close(logits[0], self.alone(self.long)[1])

    def chunks(self) -> bool:
        half = _LONG // 2
        cache, _ = self.alone(self.long[:half])
        chunk = self.forward.prefill([self.long[half:]], cache)
        return close(chunk.logits[0, -1], self.alone(self.long)[1])

    def pads(self) -> bool:
        chunk = self.forward.prefill([self.long, self.short], new_cache(self.forward.model))
        return close(chunk.logits[0, -1], self.alone(self.long)[1]) and close(
            chunk.logits[1, -1], self.alone(self.short)[1]
        )

    def mixes(self) -> bool:
        cache, _ = self.alone(self.long[:-1])
        cache.append(self.alone(self.short[:-1])[0], 0)
        last = [self.long[-1], self.short[-1]]
        logits = self.forward.decode(last, [NO_OFFSET, NO_OFFSET], cache)
        return close(logits[0], self.alone(self.long)[1]) and close(logits[1], self.alone(self.short)[1])


def _holds(claim: Any) -> bool:
    try:
        return bool(claim())
    except Exception:
        return False


def close(logits: Tensor, expected: Tensor) -> bool:
    """Whether two rows of logits differ by no more than rounding."""
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.2
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean()).norm()
    return bool((logits - expected).norm() <= tolerance * spread)


def _ordinary_ids(model: Any, count: int) -> list[int]:
    """Arbitrary token ids that no field of the model's config gives a meaning to."""
    size = int(model.get_input_embeddings().weight.shape[0])
    special: set[int] = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        named = [v for k, v in config.to_dict().items() if k.endswith(("_token_id", "_token_index"))]
        special.update(i for value in named for i in (value if isinstance(value, list) else [value]) if i is not None)
    ids = [i for i in (7919 * n % size for n in range(1, size)) if i not in special]
    return (ids * count)[:count]


def _encoder_inputs(model: Any) -> dict[str, Tensor]:
    """Input of an encoder that takes no tokens: a spectrogram as long as the encoder asks for.

    Raises:
        Unfaithful: the encoder takes something else.
    """
    if model.main_input_name == "input_ids":
        return {}
    bins, frames = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    if model.main_input_name != "input_features" or bins is None or frames is None:
        raise Unfaithful(f"it cannot be tried: its encoder takes {model.main_input_name}")
    return {"input_features": torch.randn((1, bins, 2 * frames), generator=torch.Generator().manual_seed(0))}
