"""A view of a model whose generation_config changes nothing by itself.

The policy: the request alone decides how text is sampled. Of a checkpoint's generation_config only what belongs to the
model's format is kept: the ids of bos, pad and decoder start, and the kind of cache. Its sampling settings, penalties
and lengths are recommendations for a request's author, and are left out. A forced first token and suppressed tokens are
left to the sampler (`sampling/format_rules.py`); a last token is not forced, since it would follow max_tokens.
"""

from __future__ import annotations

import copy
import logging
import reprlib
from collections.abc import Sequence
from typing import Any

from deployments.engine.model.cache_argument import take_generate_cache

logger = logging.getLogger(__name__)

_KEPT = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config")

# What changes the greedy texts of `generate`, the value that does not, and the field of a request that does the same.
_LEFT_OUT: dict[str, tuple[Any, str]] = {
    "repetition_penalty": (1.0, "repetition_penalty"),
    "min_length": (0, "min_tokens"),
    "min_new_tokens": (0, "min_tokens"),
    "stop_strings": (None, "stop"),
    "num_beams": (1, "num_beams"),
    "encoder_repetition_penalty": (1.0, ""),
    "no_repeat_ngram_size": (0, ""),
    "encoder_no_repeat_ngram_size": (0, ""),
    "guidance_scale": (1.0, ""),
    **dict.fromkeys(("token_healing", "dola_layers", "penalty_alpha"), (False, "")),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty", "watermarking_config"), (None, "")),
    **dict.fromkeys(("constraints", "force_words_ids", "max_time"), (None, "")),
}
LEFT_OUT = tuple(_LEFT_OUT)
"""Fields of a generation_config that change greedy texts of `generate`, and none of Troupe's."""


def warn_of_left_out(model: Any, name: str) -> None:
    """Log which fields of a model's generation_config would change its greedy texts, and what to send instead.

    Args:
        model: a transformers model; one without a generation_config has none.
        name: of the model, for the log.
    """
    config = getattr(model, "generation_config", None)
    found = {
        key: value for key, (none, _) in _LEFT_OUT.items() if (value := getattr(config, key, None)) and value != none
    }
    if not found:
        return
    fields = {field: None for key in found if (field := _LEFT_OUT[key][1])}
    others = [key for key in found if not _LEFT_OUT[key][1]]
    advice = [f"Send {_listed(list(fields))}, or set models[].api.default_params."] if fields else []
    advice += [f"For {_listed(others)}, set generate_kwargs in a loader."] if others else []
    logger.warning(
        "Model %s: its generation_config has %s, which is not applied: each request says how its text is made. %s",
        name,
        _listed([f"{key}={reprlib.repr(value)}" for key, value in found.items()]),
        " ".join(advice),
    )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def neutral_view(model: Any, never: int) -> Any:
    """A shallow copy of the model, sharing its weights, with a neutral generation_config, that `generate` can run.

    Args:
        model: a transformers model.
        never: an id that no token has. It is the only terminator, so that the engine alone ends a text.
    """
    from transformers import GenerationConfig

    known = GenerationConfig().to_dict().keys()
    config = copy.deepcopy(model.generation_config)
    for name in known:
        if name not in _KEPT and name != "transformers_version":
            setattr(config, name, None)
    config.eos_token_id = never
    if config.pad_token_id is None:
        eos = model.generation_config.eos_token_id
        config.pad_token_id = (eos[0] if isinstance(eos, list) else eos) or 0
    view = copy.copy(model)
    view.generation_config = config
    take_generate_cache(view)
    return view
