"""What an engine can take: the length of a model's context, and the check of a request before it is queued."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import BadRequest, ContextOverflow, UnsupportedParameter
from deployments.engine.base.protocol import EngineRequest
from model_loaders.contract import ModelInfo

_LENGTHS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "max_sequence_length")
_UNLIMITED = 131072
_ORIGINAL = "original_max_position_embeddings"
# llama3 is not among them: its configs give the stretched length, its factor concerns single frequencies.
_STRETCHING = frozenset({"linear", "dynamic", "yarn", "longrope", "su"})
ALWAYS = frozenset({"max_tokens", "skip_special_tokens", "markers"})


def context_length(info: ModelInfo, options: EngineOptions) -> int:
    """Positions a request may use, prompt and text together.

    The option, else the loader's `max_model_len`, else the positions the model's config names or those its rope scaling
    stretches them to, else what the tokenizer says; a model without any limit (recurrent, relative positions) gets
    131072.
    """
    for given in (options.max_model_len, info.max_model_len):
        if given is not None:
            return given
    config: Any = getattr(info.model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    for name in _LENGTHS:
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return max(length, _stretched(text, length))
    length = getattr(info.tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 0 < length <= 10 * _UNLIMITED else _UNLIMITED


def _stretched(config: Any, length: int) -> int:
    """The length that rope scaling stretches the original one to; 0 if there is none.

    The original length is the one that the scaling names, or else the config's. A config that names none and scales
    some of its layer types only, as Gemma 3's, gives the stretched length already, unless the scaling is dynamic: that
    one begins at the config's length.
    """
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(given, dict):
        return 0
    entries = [value for value in given.values() if isinstance(value, dict)] or [given]
    scaled = [entry for entry in entries if _rope_factor(entry) > 1]
    whole = len(scaled) == len(entries)
    counted = [entry for entry in scaled if whole or _ORIGINAL in entry or _rope_type(entry) == "dynamic"]
    known = getattr(config, _ORIGINAL, None) or length
    return max((int(_rope_factor(entry) * (entry.get(_ORIGINAL) or known)) for entry in counted), default=0)


def _rope_factor(entry: Mapping[str, Any]) -> float:
    """By how much a rope scaling stretches the original length; 1 for types whose configs are stretched already."""
    factor = entry.get("factor")
    counts = _rope_type(entry) in _STRETCHING and isinstance(factor, int | float)
    return float(factor) if counts and factor is not None else 1.0


def _rope_type(entry: Mapping[str, Any]) -> Any:
    return entry.get("rope_type", entry.get("type"))


def encodes_prompts(model: Any) -> bool:
    """Whether an encoder reads the prompt: it takes none of the positions of the answer, which the decoder has."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False)) and (
        getattr(model, "main_input_name", "") == "input_ids"
    )


def room_after(prompt: int, context: int, *, encoded: bool) -> int:
    """How many tokens may follow a prompt of some length.

    Args:
        context: positions of the model.
        encoded: see `encodes_prompts`.
    """
    return context if encoded else context - prompt


def check_request(
    request: EngineRequest, *, max_model_len: int, supports: frozenset[str], vocab: int | None, encoded: bool = False
) -> None:
    """Refuse what can never be served.

    Args:
        max_model_len: positions of the model.
        supports: what its engine honors.
        vocab: how many token ids it has.
        encoded: see `encodes_prompts`.

    Raises:
        BadRequest: no tokens, or ids the model does not have, in the prompt or in a parameter.
        ContextOverflow: the prompt, or prompt and `max_tokens`, are longer than the context.
        UnsupportedParameter: a parameter that differs from its default is not among `supports`.
    """
    if not request.input_ids:
        raise BadRequest("The prompt is empty; send at least one token.", param="prompt")
    known = f"does not exist; this model has ids 0 to {(vocab or 1) - 1}."
    wrong = _wrong(request.input_ids, sys.maxsize if vocab is None else vocab)
    if wrong is not None:
        raise BadRequest(f"Token id {wrong} {known}", param="prompt")
    params = request.sampling
    for name in ("logit_bias", "allowed_token_ids", "logprob_token_ids", "stop_token_ids"):
        wrong = None if vocab is None else _wrong(getattr(params, name), vocab)
        if wrong is not None:
            raise BadRequest(f"Invalid {name!r}: token id {wrong} {known}", param=name)
    length, answer = len(request.input_ids), params.max_tokens or 1
    asked = max(length, answer) if encoded else length + answer
    if asked > max_model_len:
        raise ContextOverflow(max_model_len, asked, param="prompt")
    check_supported(params, supports)


def _wrong(ids: Collection[int] | None, vocab: int) -> int | None:
    """The first id that is not in the vocabulary; there may be a million, so that only a wrong one is looked for."""
    if not ids or (min(ids) >= 0 and max(ids) < vocab):
        return None
    return next(i for i in ids if not 0 <= i < vocab)


def check_media(request: EngineRequest, needs: str | None) -> None:
    """Refuse text alone for a model that reads it only beside something else.

    Args:
        needs: what the model needs, in words; None if text is enough.

    Raises:
        BadRequest: the prompt has nothing but text.
    """
    if needs is not None and not request.model_inputs:
        raise BadRequest(f"This model needs {needs}; send one with the prompt.", param="prompt")


def check_supported(params: SamplingParams, supports: frozenset[str]) -> None:
    """Refuse parameters an engine cannot honor.

    Raises:
        UnsupportedParameter: it names the first one.
    """
    for field, value in params.given().items():
        if field not in supports and field not in ALWAYS:
            if field == "beam_rank":
                raise UnsupportedParameter("This model gives one text of a beam search; send n=1.", param="n")
            name = request_field(field, params)
            shown = f"{name}={value!r}" if isinstance(value, int | float) else name
            raise UnsupportedParameter(f"This model cannot honor {shown}; leave it out.", param=name)


def request_field(name: str, params: SamplingParams) -> str:
    """What a client called a field of its `SamplingParams`."""
    if name == "grammar" and params.grammar is not None:
        return params.grammar.param
    return "generate_kwargs" if name == "extra" else name


INSIDE_PARAMS = frozenset({"capture", "interventions"})
"""Parameters of the states of a model that the engine itself calls."""

# Arguments for a hook are for engines that have one.
ALL_PARAMS: frozenset[str] = frozenset(field.name for field in fields(SamplingParams)) - {"extra"} - INSIDE_PARAMS
