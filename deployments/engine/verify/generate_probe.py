"""What a model's `generate` does with our logits processor, found by a few steps when the model loads.

Every run is given the same tokens, whatever its logits are, and ends after three steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from deployments.core.errors import ModelLoadFailed
from deployments.engine.base.failures import is_out_of_memory
from deployments.engine.cache.cache import new_cache
from deployments.engine.library.transformers_internals import brings_its_own_cache
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.encoder_inputs import encoder_needs, needed_media
from deployments.engine.verify.prompts import drawn_ids, in_turn
from deployments.engine.verify.proofs import GENERATE, same_distributions

_STEPS = 3
# What models say that get no media: an argument's name, or what came of reading None.
_MEDIA = re.compile(r"pixel|image|video|audio|speech|vision|feature|patches|input_values|'NoneType' object has no attr")

Batch = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], dict[str, Any]]
"""Tensors of prompts, and of what was generated already for each."""


class Generate(Protocol):
    """A model's `generate` with a neutral generation_config, as `engine/generate/call.py` calls it.

    Attributes:
        view: the model.
        plain: transformers' function is called in any case.
    """

    view: Any
    plain: bool

    def __call__(self, *, max_new_tokens: int, **kwargs: Any) -> Any: ...


class GenerateProbe:
    """Finds out how a model's `generate` may be used.

    Args:
        call: of the model. Its `plain` is set if the model's own function never asks our processor.
        batch: makes the tensors.
        vocabulary: of the model.
        longest: tokens that a text may have.

    Attributes:
        width: of the logits.
        needs: what a prompt must have beside text, in words; None if text is enough.

    Raises:
        ModelLoadFailed: the model cannot generate.
    """

    def __init__(self, call: Generate, batch: Batch, vocabulary: Vocabulary, longest: int) -> None:
        self._call = call
        self._batch = batch
        room = max(1, longest - _STEPS)
        ids = drawn_ids(call.view, vocabulary, sum(GENERATE.lengths))
        self._prompts = [prompt[:room] for prompt in in_turn(ids, GENERATE.lengths)]
        self._tokens = ids[:_STEPS]
        self.needs: str | None = None
        self.width = self._measured_width()

    def batches(self) -> bool:
        """Whether prompts of several lengths have the same logits together as alone.

        False for a cache of an unknown kind: what it keeps may change after more steps than are tried here.
        """
        if self.needs or not _kept_columns(self._call.view):
            return False
        try:
            together = self._logits(self._prompts)
            alone = torch.cat([self._logits([prompt]) for prompt in self._prompts], dim=1)
        except Exception:
            return False
        return same_distributions(alone, together, self._dtype)

    def resumable(self) -> float:
        """Up to how many tokens, prompt included, a text can go on after it was stopped, with the same logits.

        0 if it cannot. A cache of a kind that we do not know may keep what a prompt alone puts there, and one with a
        window may hold less than a forward over the whole text sees.
        """
        longest = _kept_columns(self._call.view)
        if self.needs or not longest:
            return 0
        try:
            ahead = [self._logits([prompt]) for prompt in self._prompts]
            again = [self._logits([prompt], begun=self._tokens[:1]) for prompt in self._prompts]
        except Exception:
            return 0
        same = same_distributions(torch.cat(ahead, 1)[1:], torch.cat(again, 1)[:-1], self._dtype)
        return longest if same else 0

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._call.view.dtype
        return dtype

    def _measured_width(self) -> int:
        """The width of the logits, from a run, or from the model's head if it needs more than text to run."""
        try:
            return self._one_width()
        except _NeverAsked:
            self._call.plain = True
        except Exception as error:
            self.needs = _missing_media(self._call.view, error)
            if self.needs is None:
                raise _cannot_generate(error) from error
            return _head_width(self._call.view)
        try:
            return self._one_width()
        except Exception as error:
            raise _cannot_generate(error) from error

    def _one_width(self) -> int:
        return int(self._logits(self._prompts[1:2]).shape[-1])

    def _logits(self, prompts: Sequence[Sequence[int]], begun: Sequence[int] = ()) -> Tensor:
        """Logits of a few steps in which every sequence is given the same tokens; float32 [steps, rows, vocab]."""
        probe = _Forced(self._tokens[len(begun) :])
        with torch.inference_mode():
            self._call(
                **self._batch(prompts, [begun] * len(prompts)),
                max_new_tokens=_STEPS,
                logits_processor=LogitsProcessorList([probe]),
                stopping_criteria=StoppingCriteriaList([_After(_STEPS)]),
            )
        if not probe.seen:
            raise _NeverAsked("its generate never asks for the next token")
        return torch.stack(probe.seen)


class _NeverAsked(RuntimeError):
    """A `generate` that drops the logits processors it is given."""


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Notes the logits and gives every sequence the same next token."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.seen: list[Tensor] = []
        self._tokens = tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token_id = self._tokens[min(len(self.seen), len(self._tokens) - 1)]
        self.seen.append(scores.float().clone())
        return only(scores, [token_id % scores.shape[1]] * len(scores))


class _After(StoppingCriteria):  # type: ignore[misc]
    """Ends after some steps, for a function that reads no limit."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._left -= 1
        return torch.full((len(input_ids),), self._left <= 0, device=input_ids.device)


def only(scores: Tensor, tokens: Sequence[int]) -> Tensor:
    """Scores under which each sequence can only choose its token."""
    forced = torch.full_like(scores, float("-inf"))
    return forced.scatter_(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


def _head_width(model: Any) -> int:
    head = getattr(model.get_output_embeddings(), "weight", None)
    return int(head.shape[0]) if head is not None else int(model.config.get_text_config(decoder=True).vocab_size)


def _kept_columns(model: Any) -> float:
    """Columns that every layer of the model's cache keeps; 0 if the cache is of an unknown kind."""
    if brings_its_own_cache(model):
        return 0
    try:
        cache: Any = new_cache(model)
    except Exception:
        return 0
    layers = getattr(cache, "self_attention_cache", cache).layers
    windows = [keep + 1 for layer in layers if (keep := getattr(layer, "keep", None)) is not None]
    return min(windows, default=float("inf"))


def _missing_media(model: Any, error: Exception) -> str | None:
    """What a model needs beside text, in words; None if its failure with text alone is of another kind."""
    if is_out_of_memory(error):
        return None
    return encoder_needs(model) or (needed_media(model) if _MEDIA.search(str(error)) else None)


def _cannot_generate(error: Exception) -> ModelLoadFailed:
    return ModelLoadFailed(f"The model cannot generate: {type(error).__name__}: {error}")
