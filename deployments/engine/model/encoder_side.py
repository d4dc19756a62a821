"""What the decoder of an encoder-decoder model is given of its encoder.

A prompt is encoded as `generate` encodes it. Later forwards get a stand-in of the same class and shape: the
cross-attention cache has its substance.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from deployments.engine.cache.cache import EncoderBatchCache, visible_columns
from deployments.engine.library import transformers_internals

_MASK = "encoder_attention_mask"


class EncoderSide:
    """The encoder of one model.

    Args:
        model: an encoder-decoder model.
        device: of its inputs.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._reads_text = model.main_input_name == "input_ids"
        self._takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
        decoder = model.get_decoder()
        masks = decoder is not None and _MASK in inspect.signature(decoder.forward).parameters
        self._decoder = decoder if masks and not self._reads_text else None
        self._output: type[Any] = BaseModelOutput
        self._width = 0

    def encode(self, token_ids: Sequence[int], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the first forward of a decoder: what the encoder gives for one prompt, and its mask.

        Args:
            token_ids: the encoder's tokens; unused if `inputs` has the encoder's main input.
            inputs: input features and the like, batch dimension 1, floating ones in the model's dtype.
        """
        model, main = self._model, self._model.main_input_name
        given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
        if self._reads_text:
            given["input_ids"] = torch.tensor([list(token_ids)]).to(self._device)
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        tensor = given.pop(main)
        encoded = transformers_internals.encoded(model, tensor, given)
        outputs = encoded["encoder_outputs"]
        self._output, self._width = type(outputs), outputs[0].shape[-1]
        arguments = {"encoder_outputs": outputs}
        if self._takes_mask and encoded.get("attention_mask") is not None:
            arguments["attention_mask"] = encoded["attention_mask"]
        return arguments

    def stand_in(self, cache: EncoderBatchCache) -> dict[str, Any]:
        """Arguments of a later forward."""
        cross = cache.cross_attention_cache
        hidden = torch.zeros((), dtype=self._model.dtype, device=self._device)
        hidden = hidden.expand(len(cross.lengths), cross.width, self._width)
        arguments: dict[str, Any] = {"encoder_outputs": self._output(last_hidden_state=hidden)}
        if self._reads_text and self._takes_mask:
            arguments["attention_mask"] = self._mask(cache)
        return arguments

    @contextmanager
    def masked(self, cache: EncoderBatchCache) -> Iterator[None]:
        """Hide the padding of sequences with fewer states from a decoder; a text's mask is one of the arguments
        already.

        Raises:
            RuntimeError: the decoder takes no such mask.
        """
        cross = cache.cross_attention_cache
        if self._reads_text or min(cross.lengths) == cross.width:
            yield
            return
        if self._decoder is None:
            raise RuntimeError("the decoder takes no mask of what is encoded")
        mask = self._mask(cache)
        with self._decoder.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, _MASK: mask}), with_kwargs=True
        ):
            yield

    @contextmanager
    def hidden_states(self) -> Iterator[list[int]]:
        """How many of the last encoded states a decoder does not see, noted when it is called."""
        hidden: list[int] = []
        if self._decoder is None:
            yield hidden
            return

        def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            mask = kwargs.get(_MASK)
            if mask is not None and mask.dim() == 2:
                seen = mask[0].bool()
                length = int(seen.sum())
                if not bool(seen[:length].all()):
                    raise ValueError("the encoder's mask hides states before others that it shows")
                hidden.append(len(seen) - length)

        with self._decoder.register_forward_pre_hook(note, with_kwargs=True):
            yield hidden

    def _mask(self, cache: EncoderBatchCache) -> Tensor:
        """[rows, states]: of sequences that end in the same column."""
        cross = cache.cross_attention_cache
        return visible_columns(torch.tensor(cross.lengths), cross.width).long().to(self._device)


def decoder_prompt(model: Any, token_ids: Sequence[int]) -> list[int]:
    """The tokens that a decoder begins with if a prompt's tokens are for it: `generate` puts a start token first."""
    start = decoder_start(model)
    if start is None or not token_ids:
        return [*token_ids] if token_ids else [start or 0]
    given = {"decoder_input_ids": torch.tensor([list(token_ids)])}
    found: list[int] = transformers_internals.decoder_ids(model, given, torch.tensor([start]))[0].tolist()
    return found


def decoder_start(model: Any) -> int | None:
    """The token that begins a decoder's text."""
    configs = (model.generation_config, model.config)
    names = ("decoder_start_token_id", "bos_token_id")
    found = (getattr(config, name, None) for name in names for config in configs)
    return next((int(i) for i in found if i is not None), None)
