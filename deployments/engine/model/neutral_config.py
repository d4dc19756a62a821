"""A view of a model whose generation_config changes nothing by itself.

The policy: the request alone decides how text is sampled. Of a checkpoint's generation_config only what belongs to the
model's format is kept: the ids of bos, pad and decoder start, and the kind of cache. Its sampling settings, penalties
and lengths are recommendations for a request's author, and are left out. A forced first token and suppressed tokens are
left to the sampler (`sampling/state.py`); a last token is not forced, since it would follow max_tokens.
"""

from __future__ import annotations

import copy
from typing import Any

from deployments.engine.model.cache_argument import take_generate_cache

_KEPT = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config")


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
