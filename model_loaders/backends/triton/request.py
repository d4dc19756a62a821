"""Converts a request to TensorRT-LLM's tensors. Names and meanings are those of its Triton backend, old and new.

https://github.com/triton-inference-server/tensorrtllm_backend/blob/main/docs/model_config.md
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.engine.base.protocol import EngineRequest
from model_loaders.backends.triton.server import Interface
from model_loaders.backends.triton.words import Words, word_list

# What each parameter may be called; it is supported where the served model has one of the names.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "temperature": ("temperature",),
    "top_k": ("runtime_top_k", "top_k"),
    "top_p": ("runtime_top_p", "top_p"),
    "min_p": ("runtime_min_p", "min_p"),
    "repetition_penalty": ("repetition_penalty",),
    "presence_penalty": ("presence_penalty",),
    "frequency_penalty": ("frequency_penalty",),
    "min_tokens": ("min_tokens", "min_length"),
    "seed": ("seed", "random_seed"),
    "num_beams": ("beam_width",),
    "bad_words": ("bad_words_list", "bad_words"),
    "ignore_eos": ("end_id",),
    "logprobs": ("return_log_probs",),
}
_EXTRA: Mapping[str, tuple[str, ...]] = {
    "length_penalty": ("len_penalty", "length_penalty"),
    "early_stopping": ("early_stopping",),
    "beam_search_diversity_rate": ("beam_search_diversity_rate",),
    "runtime_top_p_min": ("runtime_top_p_min",),
    "runtime_top_p_decay": ("runtime_top_p_decay",),
    "lora_task_id": ("lora_task_id",),
}
_ALWAYS = frozenset({"max_tokens", "stop", "include_stop_str_in_output", "extra"})
_WITH_IDS = frozenset({"stop_token_ids", "skip_special_tokens"})
_DEFAULTS = SamplingParams()


def supported(interface: Interface | None) -> frozenset[str]:
    """The sampling parameters that the served model honors; all that any can, while it is not known."""
    if interface is None:
        return _ALWAYS | _WITH_IDS | frozenset(_NAMES)
    named = {field for field, names in _NAMES.items() if interface.first(*names)}
    if interface.text:
        return frozenset(_ALWAYS | named - {"logprobs"})
    return frozenset(_ALWAYS | _WITH_IDS | named)


def with_defaults(params: SamplingParams, generation_config: Mapping[str, Any]) -> SamplingParams:
    """The parameters, those that change nothing replaced by what generation_config.json says."""
    names = {field.name for field in fields(SamplingParams)} & set(_NAMES) - {"seed", "num_beams", "logprobs"}
    found = {
        name: value
        for name, value in generation_config.items()
        if name in names and value is not None and getattr(params, name) == getattr(_DEFAULTS, name)
    }
    if generation_config.get("do_sample") is False and params.temperature == _DEFAULTS.temperature:
        found["temperature"] = 0.0
    return replace(params, **found)


def tensors(
    request: EngineRequest, params: SamplingParams, interface: Interface, words: Words
) -> dict[str, npt.NDArray[Any]]:
    """The request's tensors by name, without the batch dimension.

    Raises:
        BadRequest: an option that the served model does not have.
        UnsupportedParameter: an image for a model that takes none, or a text model that is given ids.
    """
    given: dict[str, Any] = _prompt(request, interface)
    given[interface.first("max_tokens", "request_output_len") or "request_output_len"] = [params.max_tokens]
    for name, value in _sampling(params).items():
        if (tensor := interface.first(*_NAMES[name])) is not None:
            given[tensor] = [value]
    # The server would stop within the reasoning too.
    ends = params if request.reasoning is None else replace(params, stop=())
    given.update(_ends(ends, interface, words))
    if (bad := interface.first(*_NAMES["bad_words"])) is not None and any(params.bad_words):
        given[bad] = _bad_words(params.bad_words, interface, words)
    for name in ("streaming", "stream"):
        if name in interface.inputs:
            given[name] = [interface.decoupled and params.num_beams == 1]
    for name in ("exclude_input_in_output", "return_num_output_tokens"):
        if name in interface.inputs:
            given[name] = [True]
    given.update(_extra(params.extra, interface))
    given.update(_images(request, interface))
    return {name: np.asarray(value, dtype=object if _is_text(value) else None) for name, value in given.items()}


def _prompt(request: EngineRequest, interface: Interface) -> dict[str, Any]:
    if not interface.text:
        found: dict[str, Any] = {"input_ids": request.input_ids}
        return found | ({"input_lengths": [len(request.input_ids)]} if "input_lengths" in interface.inputs else {})
    if request.prompt_text is None:
        raise UnsupportedParameter("This model takes texts, no token ids; send the prompt as a string.", param="prompt")
    return {"text_input": [request.prompt_text.encode()]}


def _sampling(params: SamplingParams) -> dict[str, Any]:
    greedy = params.temperature <= 0 or params.top_p <= 0
    # Neither limit set would mean greedy there, so both are always sent.
    found: dict[str, Any] = {
        "temperature": 1.0 if greedy else params.temperature,
        "top_k": 1 if greedy else params.top_k,
        "top_p": 1.0 if greedy else params.top_p,
        "num_beams": params.num_beams,
    }
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"):
        if getattr(params, name) != getattr(_DEFAULTS, name):
            found[name] = getattr(params, name)
    if params.seed is not None:
        found["seed"] = params.seed % 2**64
    if params.logprobs is not None:
        found["logprobs"] = True
    return found


def _ends(params: SamplingParams, interface: Interface, words: Words) -> dict[str, Any]:
    """The end token, and what else the server can stop at by itself. All of it is checked again on our side."""
    eos = words.eos_id
    found: dict[str, Any] = {}
    if "end_id" in interface.inputs:
        found["end_id"] = [-1 if params.ignore_eos or eos is None else eos]
    if "pad_id" in interface.inputs and words.pad_id is not None:
        found["pad_id"] = [words.pad_id]
    if params.min_tokens:
        return found
    if "stop_words" in interface.inputs and params.stop:
        found["stop_words"] = [stop.encode() for stop in params.stop]
    if "stop_words_list" in interface.inputs:
        others = set(params.stop_token_ids) | (set() if params.ignore_eos else words.eos_ids - {eos})
        listed = [[token_id] for token_id in sorted(others)]
        listed += [ids for stop in params.stop if stop in words.text(ids := words.ids(stop))]
        if listed:
            found["stop_words_list"] = word_list(listed)
    return found


def _bad_words(given: Sequence[str], interface: Interface, words: Words) -> Any:
    """As texts, or as token ids: each word as it is written at the start of a text and after a space."""
    texts = [word for word in given if word]
    if interface.text:
        return [word.encode() for word in texts]
    listed = {tuple(words.ids(form)) for word in texts for form in (word, " " + word)}
    return word_list([list(ids) for ids in sorted(listed) if ids])


def _extra(given: Mapping[str, Any], interface: Interface) -> dict[str, Any]:
    found = {}
    for name, value in given.items():
        tensor = interface.first(*_EXTRA.get(name, ()))
        if tensor is None:
            known = [each for each, names in _EXTRA.items() if interface.first(*names)]
            raise BadRequest(
                f"Invalid 'generate_kwargs': the served model has no {name!r}; it has {', '.join(known) or 'none'}.",
                param="generate_kwargs",
            )
        if not isinstance(value, int | float):
            raise BadRequest(
                f"Invalid 'generate_kwargs': {name} is {value!r}; expected a number.", param="generate_kwargs"
            )
        found[tensor] = [value]
    return found


def _images(request: EngineRequest, interface: Interface) -> dict[str, Any]:
    """What the processor made of images, under the tensor's name there; other tensors only if the model has them."""
    found: dict[str, Any] = {}
    for name, value in request.model_inputs.items():
        tensor = interface.first("image_input" if name == "pixel_values" else name)
        if tensor is not None:
            found[tensor] = value[0].numpy()
        elif name == "pixel_values":
            raise UnsupportedParameter("The served model takes no images.", param="messages", code="images_unsupported")
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], bytes)
