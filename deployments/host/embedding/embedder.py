"""Vectors of texts: by the loader's `embed` hook, else from the hidden states of the model's last layer.

Texts are computed in batches, padded at their end, if a probe finds that padding does not change the states. Else each
is computed by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from deployments.core.client import EmbedOptions
from deployments.core.errors import (
    BadRequest,
    ModelError,
    ModelLoadFailed,
    OutOfMemory,
    TroupeError,
    UnsupportedParameter,
    last_line,
)
from deployments.core.token_ids import vocab_size
from deployments.engine.base.failures import is_device_lost, is_out_of_memory
from deployments.engine.verify.proofs import EMBEDDING, Proofs
from deployments.host.embedding.hook import hooked
from deployments.host.embedding.padding import is_causal, padding_is_neutral
from deployments.host.embedding.pooling import pool
from deployments.host.embedding.text import EmbeddingText
from model_loaders.contract import ModelInfo
from model_loaders.sentence_format import Normalize, SentenceFormat

_BATCH, _BATCH_TOKENS = 64, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class _Padded:
    """Token ids of a batch, int64 [batch, width], padded at the end, and tensors of the same shape beside them."""

    input_ids: Tensor
    lengths: Tensor
    skipped: Tensor
    extra: dict[str, Tensor]


class Embedder:
    """Makes vectors with a loaded model.

    Args:
        info: the model; its `embed` hook, if it has one, makes the vectors.
        sentence_format: how the model's folder says they are made.
        pooling: replaces the format's; without either, `last` of a decoder and `mean` of an encoder.
        alone: compute every text by itself.
    """

    def __init__(
        self,
        info: ModelInfo,
        sentence_format: SentenceFormat | None,
        *,
        pooling: str | None,
        alone: bool = False,
        proofs: Proofs | None = None,
    ) -> None:
        self._proofs = proofs or Proofs()
        self._info = info
        self._alone = alone
        self._lost: Exception | None = None
        self._steps = [Normalize()] if sentence_format is None else list(sentence_format.steps)
        own = None if sentence_format is None else sentence_format.poolings
        self._poolings = own if pooling is None else (pooling,)

    def probe(self) -> str:
        """Find out now what is else found out when the first texts come. Blocks.

        Returns:
            How texts are computed, in words; nothing if the loader's hook does it.

        Raises:
            ModelLoadFailed: the model makes no states of token ids alone.
        """
        if self._info.embed is not None:
            return ""
        try:
            self._check_model()
            _ = self._pads, self._poolings or self._default_poolings
        except Exception as error:
            raise ModelLoadFailed(
                f"Model {self._info.label!r} is a {type(self._info.model).__name__}: it has no head for text, and "
                f"its forward makes no embeddings of texts ({last_line(error)}). Give its loader an embed hook."
            ) from error
        return "together" if self._pads else "one at a time"

    def check(self) -> None:
        """Raise ModelError if the GPU computes nothing more in this process."""
        if self._lost is not None:
            raise ModelError(f"The GPU computes nothing more in this process: {last_line(self._lost)}")

    def batches(self, texts: Sequence[EmbeddingText]) -> list[list[int]]:
        """Indices of the texts that are computed together. Blocks the first time: it probes the model.

        Raises:
            TroupeError: there is neither a hook nor a model whose hidden states could be pooled.
        """
        if self._info.embed is not None:
            return [list(range(len(texts)))]
        self._check_model()
        if len(texts) == 1 or self._alone or not self._pads:
            return [[i] for i in range(len(texts))]
        batches: list[list[int]] = []
        for i in sorted(range(len(texts)), key=lambda i: len(texts[i].ids)):
            if not batches or not _fits([texts[j] for j in batches[-1]], texts[i]):
                batches.append([])
            batches[-1].append(i)
        return batches

    def vectors(self, texts: Sequence[EmbeddingText], options: EmbedOptions) -> Tensor:
        """One vector for each text. Blocks.

        Returns:
            float32 of shape [len(texts), dimensions], on the CPU.

        Raises:
            BadRequest: more dimensions are asked for than there are.
            ModelError: the hook or the model failed.
            OutOfMemory: the device had no memory for it.
        """
        try:
            with torch.inference_mode():
                if self._info.embed is None:
                    vectors = self._pooled(texts, options)
                else:
                    vectors = hooked(self._info.embed, _texts(self._info, texts))
                return _finished(vectors, options, options.normalize is True)
        except Exception as error:
            if is_device_lost(error):
                self._lost = error
            if isinstance(error, TroupeError):
                raise
            if not is_out_of_memory(error):
                raise ModelError(f"Model {self._info.label!r} failed to embed: {last_line(error)}") from error
        if len(texts) == 1:
            raise OutOfMemory("The device had no memory left for this embedding; try again.")
        half = len(texts) // 2
        return torch.cat([self.vectors(texts[:half], options), self.vectors(texts[half:], options)])

    def _pooled(self, texts: Sequence[EmbeddingText], options: EmbedOptions) -> Tensor:
        batch = _padded(texts, self._pad_id, next(self._inner.parameters()).device)
        states = self._states(batch.input_ids, batch.lengths, batch.extra)
        vectors = pool(states, batch.lengths, batch.skipped, self._poolings or self._default_poolings)
        for step in self._steps:
            if isinstance(step, torch.nn.Module):
                step.to(vectors.device)
            if not (isinstance(step, Normalize) and options.normalize is False):
                vectors = step(vectors)
        return vectors.float().cpu()

    def _states(self, input_ids: Tensor, lengths: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """The last hidden states, [batch, width, dimensions]."""
        mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
        if "use_cache" in inspect.signature(self._inner.forward).parameters:
            extra = {"use_cache": False, **extra}  # type: ignore[dict-item]
        states: Tensor = self._inner(input_ids=input_ids, attention_mask=mask.long(), **extra)[0]
        return states

    @cached_property
    def _inner(self) -> Any:
        """The part of the model whose last hidden states are pooled."""
        model = self._info.model
        has_encoder = getattr(model.config, "is_encoder_decoder", False)
        return model.get_encoder() if has_encoder else getattr(model, "base_model", model)

    @cached_property
    def _default_poolings(self) -> tuple[str, ...]:
        """With causal attention the last token alone has seen the whole text; else every token has."""
        with torch.inference_mode():
            causal = is_causal(self._info.model, self._states_of)
        return ("last" if causal else "mean",)

    @cached_property
    def _pad_id(self) -> int:
        config = self._info.model.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        found = getattr(text, "pad_token_id", None)
        found = getattr(self._info.tokenizer, "pad_token_id", None) if found is None else found
        size = vocab_size(self._info.model)
        return found if isinstance(found, int) and found >= 0 and (size is None or found < size) else 0

    @cached_property
    def _pads(self) -> bool:
        with torch.inference_mode():
            return self._proofs.recall(EMBEDDING, lambda: padding_is_neutral(self._info.model, self._states_of))

    def _states_of(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device = next(self._inner.parameters()).device
        lengths = torch.tensor([len(row) for row in rows], device=device)
        return self._states(_rectangle(rows, self._pad_id).to(device), lengths, {})

    def _check_model(self) -> None:
        model = self._info.model
        if getattr(model, "config", None) is None or not isinstance(model, torch.nn.Module):
            raise UnsupportedParameter("This model gives no embeddings; give its loader an embed hook.", param="input")


def check_ids(model: Any, text: EmbeddingText, param: str) -> None:
    """Refuse ids that no embedding has: on a GPU they would take the whole process down.

    Raises:
        BadRequest: it names the id.
    """
    size, worst = vocab_size(model), max(text.ids)
    if size is not None and worst >= size:
        raise BadRequest(f"Invalid {param!r}: token id {worst} is not below the vocabulary's {size}.", param=param)


def _fits(batch: Sequence[EmbeddingText], text: EmbeddingText) -> bool:
    """Whether a text can join a batch of shorter ones: with little padding, and no image or the like on either side."""
    width, shortest = len(text.ids), len(batch[0].ids)
    return (
        len(batch) < _BATCH
        and (len(batch) + 1) * width <= _BATCH_TOKENS
        and width <= 4 * shortest + 32
        and all(each.is_plain and each.extra.keys() == text.extra.keys() for each in (batch[0], text))
    )


def _padded(texts: Sequence[EmbeddingText], pad_id: int, device: torch.device) -> _Padded:
    ids = _rectangle([text.ids for text in texts], pad_id)
    extra: dict[str, Tensor] = dict(texts[0].extra)
    if len(texts) > 1:
        extra = {key: _rectangle([text.extra[key][0].tolist() for text in texts], 0) for key in extra}
    return _Padded(
        input_ids=ids.to(device),
        lengths=torch.tensor([len(text.ids) for text in texts], device=device),
        skipped=torch.tensor([text.skipped for text in texts], device=device),
        extra={key: value.to(device) for key, value in extra.items()},
    )


def _rectangle(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    """Rows of different lengths as int64 [len(rows), longest]."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *([filler] * (width - len(row)))] for row in rows])


def _texts(info: ModelInfo, texts: Sequence[EmbeddingText]) -> list[str]:
    given = [text.text for text in texts if text.text is not None]
    if len(given) < len(texts):
        raise UnsupportedParameter(f"Model {info.label!r} embeds texts; send no token ids.", param="input")
    return given


def _finished(vectors: Tensor, options: EmbedOptions, normalize: bool) -> Tensor:
    """Vectors of the length and norm that were asked for."""
    length = vectors.shape[1]
    if options.dimensions is not None and options.dimensions > length:
        raise BadRequest(
            f"Invalid 'dimensions': this model's vectors have {length}; got {options.dimensions}.", param="dimensions"
        )
    if options.dimensions is not None and options.dimensions < length:
        vectors, normalize = vectors[:, : options.dimensions], options.normalize is not False
    return torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors
