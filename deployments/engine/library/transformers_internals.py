"""All that differs between versions of transformers, and all of its private parts that Troupe uses.

Nothing follows from a version's number: names are looked up in the installed version. If it lacks a class, no object
is an instance of it. If it lacks a function, the probe at load fails that calls it, and the model gets another engine.
`deployments.engine.library.tested_versions` names the newest version that the tests run with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import transformers
from torch import Tensor
from transformers import AttentionInterface as AttentionInterface
from transformers import Cache as Cache
from transformers import DynamicCache as DynamicCache
from transformers import EncoderDecoderCache as EncoderDecoderCache
from transformers import (
    GenerationMixin,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    cache_utils,
    initialization,
)

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Names of a forward's cache, the newest first: of versions from 5.24 on, of those before, of Mamba before."""

HOOKING_MODULES = ("transformers.utils.output_capturing",)
"""Where the hooks come from that transformers itself installs on a model, to collect hidden states."""

HOOKED_FLAGS = frozenset({"_output_capturing_hooks_installed"})
"""Attributes that say that these hooks are installed."""

# The argument of a position embedding that says how many tokens come before, as in `CACHE_NAMES`.
_LENGTH_NAMES = ("cache_length", "past_key_values_length")
_ENCODER_FUNCTIONS = ("_maybe_prepare_encoder_kwargs_for_generation", "_prepare_encoder_decoder_kwargs_for_generation")
_MARKS = "\U000f0000", "\U000f0001"


# Caches.


def _layer(name: str, example: Any = None) -> Any:
    """A class of layers by its name; if there is none, that of the cache of an example's config."""
    found = getattr(cache_utils, name, None)
    if found is None and example is not None:
        layers = DynamicCache(config=example).layers
        found = type(layers[0]) if layers else None
    return found or type(name, (), {})


DynamicLayer = _layer("DynamicLayer", LlamaConfig(num_hidden_layers=1))
DynamicSlidingWindowLayer = _layer("DynamicSlidingWindowLayer", MistralConfig(num_hidden_layers=1, sliding_window=4))
DynamicIndexedLayer = _layer("DynamicIndexedLayer")
DummyLayer = _layer("DummyLayer")
LinearAttentionLayer = _layer("LinearAttentionLayer", MambaConfig(num_hidden_layers=1))
LinearAttentionAndFullAttentionLayer = _layer("LinearAttentionAndFullAttentionLayer")
LinearAttentionAndSlidingWindowAttentionLayer = _layer("LinearAttentionAndSlidingWindowAttentionLayer")


def is_library_class(kind: type) -> bool:
    """Whether a class is transformers' own, and not a checkpoint's or a loader's."""
    return kind.__module__.startswith("transformers.")


@cache
def generate_cache_name() -> str:
    """The name under which the installed `generate` hands a model its cache."""
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    typed = [name for name, parameter in parameters.items() if "Cache" in str(parameter.annotation)]
    return next((name for name in (*typed, *CACHE_NAMES) if name in parameters), CACHE_NAMES[0])


def brings_its_own_cache(model: Any) -> bool:
    """Whether `generate` leaves it to a model to make its cache."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return supports is not None and not supports()


def length_name(signature: inspect.Signature) -> str | None:
    """The argument of a position embedding that says how many tokens come before; None if it has none."""
    return next((name for name in _LENGTH_NAMES if name in signature.parameters), None) or next(
        (
            name
            for name, parameter in signature.parameters.items()
            if type(parameter.default) is int and parameter.default == 0 and re.search("length|past|offset", name)
        ),
        None,
    )


# Attention.

sdpa_attention_forward: Callable[..., Any] = AttentionInterface()["sdpa"]
"""What computes `sdpa` attention before Troupe registers its own."""

SDPA_EXTRAS = {"softcap", "output_attentions", *inspect.signature(sdpa_attention_forward).parameters} - {
    *("module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs")
}
"""What the installed `sdpa` reads beside query, key, value, mask, dropout, scaling and causality."""


# Loading.


@cache
def make_models_in_turn() -> None:
    """Let threads load models at once: each makes its model alone, and they read weights side by side.

    While `from_pretrained` makes a model, it changes torch's default dtype and replaces functions of the whole process,
    and then puts back what it has found: of two at once, the second would put back what belongs to the first. That the
    weights are not tied meanwhile would also hold for a model of another thread, which has its weights already.
    """
    making, untied = threading.RLock(), threading.local()
    contexts, tie_weights = PreTrainedModel.get_init_context.__func__, PreTrainedModel.tie_weights

    def one_at_a_time(kind: type, *args: Any, **kwargs: Any) -> list[Any]:
        return [making, *contexts(kind, *args, **kwargs)]

    @contextlib.contextmanager
    def no_tie_weights() -> Iterator[None]:
        untied.here = True
        try:
            yield
        finally:
            untied.here = False

    @functools.wraps(tie_weights)
    def tie(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if not getattr(untied, "here", False):
            tie_weights(model, *args, **kwargs)

    PreTrainedModel.get_init_context = classmethod(functools.wraps(contexts)(one_at_a_time))
    PreTrainedModel.tie_weights = tie
    initialization.no_tie_weights = no_tie_weights


# Generation.


def position_ids(model: Any, ids: Tensor, known: Mapping[str, Any]) -> Any:
    """The positions that `generate` gives a prompt [1, tokens] with these tensors; None in an older version."""
    prepare = getattr(model, "_prepare_position_ids_for_generation", None)
    return None if prepare is None else prepare(ids, dict(known))


def encoded(model: Any, tensor: Tensor, given: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments that `generate` makes of an encoder's input, `encoder_outputs` among them."""
    prepare = next(function for name in _ENCODER_FUNCTIONS if (function := getattr(model, name, None)) is not None)
    found: Mapping[str, Any] = prepare(tensor, given, model.main_input_name, model.generation_config)
    return found


def decoder_ids(model: Any, given: dict[str, Any], start_id: Tensor) -> Tensor:
    """`decoder_input_ids` [1, tokens] with the start token that `generate` puts first."""
    found: Tensor
    found, _ = model._prepare_decoder_input_ids_for_generation(1, model.main_input_name, given, start_id, "cpu")
    return found


def fill_defaults(config: Any) -> None:
    """Give what a generation config leaves open the values that `generate` takes."""
    defaults: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
    config.update(**defaults, defaults_only=True)


# Whisper.


def token_times(model: Any, ids: Tensor, attentions: Any, heads: Any, *, frames: int, prompt: int) -> Tensor:
    """When each token has been said, seconds [1, tokens]: Whisper's alignment of its cross-attention.

    Args:
        ids: [1, tokens].
        attentions: the cross-attentions of one forward over all of them.
        heads: the attention heads that follow the recording.
        frames: of sound.
        prompt: how many of the tokens are the prompt.
    """
    kind = importlib.import_module("transformers.generation.utils").GenerateEncoderDecoderOutput
    outputs = kind(sequences=ids, cross_attentions=(attentions,))
    times: Tensor = model._extract_token_timestamps(outputs, heads, num_frames=frames, num_input_ids=prompt)
    return times


def words_of_tokens(tokenizer: Any, ids: list[int], language: str) -> tuple[list[str], list[list[int]]]:
    """Whisper's words, and the places of each one's tokens."""
    module = importlib.import_module("transformers.models.whisper.tokenization_whisper")
    texts, _, places = module._combine_tokens_into_words(tokenizer, ids, language)
    return texts, places


# Chat templates.


def mark_control_tokens(value: Any, pattern: re.Pattern[str]) -> Any:
    """A value of JSON with the tokens in its texts between marks, which the tokenizer then reads as text.

    A version that cannot has marks as well. Its tokenizers read them as characters, which the caller finds out.
    """
    own = getattr(transformers.utils.chat_template_utils, "mark_control_tokens", None)
    if own is not None:
        return own(value, pattern)
    if isinstance(value, str):
        return pattern.sub(f"{_MARKS[0]}\\g<0>{_MARKS[1]}", re.sub("|".join(_MARKS), "", value))
    if isinstance(value, dict):
        return {key: mark_control_tokens(each, pattern) for key, each in value.items()}
    return [mark_control_tokens(each, pattern) for each in value] if isinstance(value, (list, tuple)) else value
