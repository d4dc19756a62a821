"""Calling a stock model for a batch of sequences: the one place that knows which arguments a model's `forward` takes.

Masks, positions and caches are what `generate` would pass for a left-padded batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deployments.engine.adapters.table import AdapterTable
from deployments.engine.cache.cache import AnyCache, EncoderBatchCache, visible_columns
from deployments.engine.library.transformers_internals import generate_cache_name, position_ids
from deployments.engine.model.attention import DecodeAttention, attend_without_plans
from deployments.engine.model.cache_argument import argument_of, cache_argument
from deployments.engine.model.encoder_side import EncoderSide, decoder_prompt, decoder_start
from deployments.engine.model.fresh_state import fresh_state
from deployments.engine.model.positions import SequencePositions
from deployments.engine.model.rotary import SequenceRotary

Offset = tuple[int, ...]
"""What is added to a token's index to give its position, per position dimension (M-RoPE has several)."""

NO_OFFSET: Offset = (0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Logits of a prefill forward, and the position offset of what follows.

    Attributes:
        logits: [rows, kept, vocab]: of the last token, or of all of the chunk.
    """

    logits: Tensor
    offset: Offset = NO_OFFSET


class Forward:
    """One loaded model's forward passes.

    Args:
        model: a transformers model with a language-model head.
        limit: the longest sequence.
        tried: tensors of a prompt to try the model with, if its encoder takes no tokens.

    Attributes:
        rotary: the model's rotary embeddings.
        cache_name: the argument that takes the cache.
        sends_unnamed: positions and masks go into the `**kwargs` of a forward that does not name them.
        recomputes: see `SequenceRotary.recomputes`.
        fresh: the state of its modules before the first forward.
        adapters: of the sequences, which whoever calls a forward applies.

    Raises:
        UnknownRotary: see `SequenceRotary`.
    """

    def __init__(self, model: Any, limit: int = 1 << 17, tried: Mapping[str, Tensor] | None = None) -> None:
        self.model = model
        self.tried = tried or {}
        self.fresh = fresh_state(model)
        self.rotary = SequenceRotary(model, limit)
        self.recomputes = self.rotary.recomputes
        self.device = torch.device(model.get_input_embeddings().weight.device)
        parameters = inspect.signature(model.forward).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self._prefix = "decoder_" if self.is_encoder_decoder else ""
        self.cache_name = cache_argument(model) or generate_cache_name()
        self._names_mask = f"{self._prefix}attention_mask" in parameters
        self._names_positions = f"{self._prefix}position_ids" in parameters
        self.sends_unnamed = open_ended and not (self._names_positions and self._names_mask)
        self._takes_keep = "logits_to_keep" in parameters
        self._common: dict[str, Any] = {"return_dict": True}
        if "use_cache" in parameters or open_ended:
            self._common["use_cache"] = True
        self._media_ids = media_ids(model.config)
        self._encoder = EncoderSide(model, self.device) if self.is_encoder_decoder else None
        attend_without_plans()
        self.decode_attention = DecodeAttention()
        self.adapters = AdapterTable(model)
        self._positions = SequencePositions(model)

    @property
    def takes_positions(self) -> bool:
        """Whether a forward takes the positions of sequences of different lengths."""
        return self._names_positions or self.sends_unnamed

    def decoder_prompt(self, input_ids: Sequence[int], inputs: Mapping[str, Tensor]) -> list[int]:
        """The tokens the decoder begins with: the prompt itself, or for an encoder-decoder model what follows it."""
        if not self.is_encoder_decoder:
            return list(input_ids)
        if self.model.main_input_name in inputs:
            return decoder_prompt(self.model, input_ids)
        given = inputs.get("decoder_input_ids")
        if given is not None:
            return [int(i) for i in given.reshape(-1)]
        return [decoder_start(self.model) or 0]

    def media_end(self, input_ids: Sequence[int], inputs: Mapping[str, Tensor]) -> int:
        """The tokens up to which a prompt depends on its other tensors; 0 if there are none or it is unknown."""
        if not inputs:
            return 0
        places = [i for i, token_id in enumerate(input_ids) if token_id in self._media_ids]
        return places[-1] + 1 if places else 0

    def decode(self, token_ids: Sequence[int], offsets: Sequence[Offset], cache: AnyCache) -> Tensor:
        """Append one token to every sequence.

        Args:
            token_ids: the sequences' last tokens, not yet in the cache.
            offsets: of each sequence, all of the same number of dimensions.
            cache: the sequences' cache; grows by one column.

        Returns:
            Logits [rows, vocab] of the next token.
        """
        lengths = torch.tensor(cache.lengths)
        ids = torch.tensor(token_ids)[:, None].to(self.device, non_blocking=True)
        arguments = self._arguments(ids, cache, lengths + 1, cache.width + 1)
        if self.takes_positions:
            arguments[f"{self._prefix}position_ids"] = next_positions(lengths, offsets).to(self.device)
        rotary = self.rotary.for_lengths(lambda: _lengths(cache, offsets))
        with self.decode_attention, self._positions.for_lengths(cache.lengths), rotary, self._encoded(arguments, cache):
            logits: Tensor = self.model(**arguments).logits[:, -1]
        cache.added([length + 1 for length in cache.lengths])
        return logits

    def prefill(
        self,
        token_ids: Sequence[Sequence[int]],
        cache: AnyCache,
        *,
        offset: Offset = NO_OFFSET,
        all_logits: bool = False,
        wholes: Sequence[int] | None = None,
    ) -> Chunk:
        """Append several tokens to every sequence.

        Args:
            token_ids: the new tokens of each sequence. Sequences may differ in length only while the cache is empty:
                they are padded on the left, as the sequences of a cache are.
            cache: grows by the longest.
            offset: of the only sequence.
            all_logits: return the logits of every token, not of the last alone.
            wholes: tokens of each sequence's whole prompt, which its rotary frequencies may follow; 0 if every token is
                to have those of a text that ends with it, as in decode steps. None: the sequence as it is after this
                forward.
        """
        new = max(len(ids) for ids in token_ids)
        past = cache.lengths or [0] * len(token_ids)
        after = [p + len(ids) for p, ids in zip(past, token_ids, strict=True)]
        padded = [[0] * (new - len(ids)) + list(ids) for ids in token_ids]
        arguments = self._arguments(torch.tensor(padded).to(self.device), cache, torch.tensor(after), cache.width + new)
        if self.takes_positions:
            first = torch.tensor(after) - new
            positions = (first[:, None] + torch.arange(new)).clamp_(min=0) + torch.tensor(offset)[:, None, None]
            arguments[f"{self._prefix}position_ids"] = _squeezed(positions).to(self.device)
        if self._takes_keep and not all_logits:
            arguments["logits_to_keep"] = 1
        rotary = self.rotary.for_lengths(
            lambda: _prompt_lengths(after if wholes is None else wholes, after, new, max(offset))
        )
        with rotary, self._encoded(arguments, cache):
            logits = self.model(**arguments).logits
        cache.added(after)
        return Chunk(logits=logits if all_logits else logits[:, -1:], offset=offset)

    def prefill_media(
        self,
        token_ids: Sequence[int],
        inputs: Mapping[str, Tensor],
        cache: AnyCache,
        *,
        all_logits: bool = False,
        whole: int = 0,
    ) -> Chunk:
        """Prefill one sequence whose prompt has tensors beside its tokens, as the model's own `generate` would.

        Args:
            token_ids: the whole prompt.
            inputs: pixel values and the like, batch dimension 1, floating ones cast to the model's dtype.
            cache: empty.
            whole: tokens of the text that the prompt begins, if it is computed anew.
        """
        ids = torch.tensor([list(token_ids)]).to(self.device)
        extra: dict[str, Any] = {key: self._placed(value) for key, value in inputs.items()}
        if self._names_mask:
            extra["attention_mask"] = torch.ones_like(ids)
        if self._names_positions and "position_ids" not in extra:
            extra["position_ids"] = position_ids(self.model, ids, extra)
        if self._takes_keep and not all_logits:
            extra["logits_to_keep"] = 1
        prepare = self.model.prepare_inputs_for_generation
        extra[argument_of(prepare)] = cache
        arguments = prepare(ids, is_first_iteration=True, use_cache=True, **extra)
        # Its name of the cache need not be that of the forward.
        arguments = {name: value for name, value in arguments.items() if value is not cache}
        arguments[self.cache_name] = cache
        # Its own positions say how long a prompt is: an image may take fewer of them than it has tokens.
        lengths = [[whole] * len(token_ids)] if whole > len(token_ids) else [[]]
        with self.rotary.for_lengths(lambda: lengths):
            logits = self.model(**{**arguments, **self._common}).logits
        cache.added([len(token_ids)])
        positions = arguments.get("position_ids")
        offset = NO_OFFSET
        if positions is not None:
            offset = tuple((positions[..., -1].reshape(-1) + 1 - len(token_ids)).tolist())
        return Chunk(logits=logits if all_logits else logits[:, -1:], offset=offset)

    def encode(
        self,
        token_ids: Sequence[int],
        inputs: Mapping[str, Tensor],
        decoder_ids: Sequence[int],
        cache: EncoderBatchCache,
        *,
        all_logits: bool = False,
    ) -> Chunk:
        """Run the encoder for one sequence and prefill its decoder.

        Args:
            token_ids: the encoder's tokens; unused where `inputs` has the encoder's main input.
            inputs: input features and the like, batch dimension 1.
            decoder_ids: the decoder's prompt, at least its start token.
            cache: empty.
        """
        assert self._encoder is not None
        encoded = self._encoder.encode(token_ids, {key: self._placed(value) for key, value in inputs.items()})
        ids = torch.tensor([list(decoder_ids)]).to(self.device)
        call = {**self._arguments(ids, cache, torch.tensor([len(decoder_ids)]), len(decoder_ids)), **encoded}
        if self.takes_positions:
            call[f"{self._prefix}position_ids"] = torch.arange(len(decoder_ids), device=self.device)[None]
        with self._encoder.hidden_states() as hidden:
            logits = self.model(**call).logits
        cache.added([len(decoder_ids)])
        if hidden and hidden[0]:
            cache.cross_attention_cache.trim(hidden[:1])
        return Chunk(logits=logits if all_logits else logits[:, -1:])

    def _arguments(self, ids: Tensor, cache: AnyCache, lengths: Tensor, width: int) -> dict[str, Any]:
        """Arguments common to all forwards; `lengths` and `width` count the new tokens.

        The mask is left out where no sequence is padded, as `generate` does, and where there are no columns to hide.
        """
        arguments = {f"{self._prefix}input_ids": ids, self.cache_name: cache, **self._common}
        hides = cache.has_columns or not cache.lengths
        if (self._names_mask or self.sends_unnamed) and hides and int(lengths.min()) < width:
            mask = visible_columns(lengths, width).long().to(self.device, non_blocking=True)
            arguments[f"{self._prefix}attention_mask"] = mask
        return arguments

    @contextmanager
    def _encoded(self, arguments: dict[str, Any], cache: AnyCache) -> Iterator[None]:
        """Adds what a decoder is given of its encoder."""
        if not isinstance(cache, EncoderBatchCache) or self._encoder is None:
            yield
            return
        arguments.update(self._encoder.stand_in(cache))
        with self._encoder.masked(cache):
            yield

    def _placed(self, value: Tensor) -> Tensor:
        value = value.to(self.device)
        return value.to(self.model.dtype) if value.is_floating_point() else value


def next_positions(lengths: Tensor, offsets: Sequence[Offset]) -> Tensor:
    """Positions `[rows, 1]`, or `[dims, rows, 1]`, of the tokens that come after sequences of these lengths."""
    return _squeezed((lengths + torch.tensor(offsets).T)[:, :, None])


def _squeezed(positions: Tensor) -> Tensor:
    """Positions `[dims, rows, tokens]`, without the first dimension where there is only one."""
    return positions[0] if positions.shape[0] == 1 else positions


def _lengths(cache: AnyCache, offsets: Sequence[Offset]) -> list[list[int]]:
    """For rotary embeddings: the length of each sequence with the one token that is added."""
    return [[length + max(offset) + 1] for length, offset in zip(cache.lengths, offsets, strict=True)]


def _prompt_lengths(wholes: Sequence[int], after: Sequence[int], new: int, offset: int) -> list[list[int]]:
    """For rotary embeddings: the length that counts for each of the last `new` tokens of each sequence."""
    rows = zip(wholes, after, strict=True)
    return [[max(whole, end) + offset for end in range(last - new + 1, last + 1)] for whole, last in rows]


def media_ids(config: Any) -> frozenset[int]:
    """The ids of tokens that stand for images, videos or sounds."""
    names = [f"{kind}_token_{noun}" for kind in ("image", "video", "audio") for noun in ("id", "index")]
    found = [getattr(config, name, None) for name in names]
    return frozenset(i for i in found if isinstance(i, int))
