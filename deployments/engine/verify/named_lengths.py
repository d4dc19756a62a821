"""Lengths at which a model may begin to compute differently, as its config names them.

Windows, chunks, original lengths, thresholds: a probe that stays below all of them proves little. A config of
transformers' own has names for them; in the config of a checkpoint with code of its own, every number that does not say
how wide or how many something is may be one.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

logger = logging.getLogger(__name__)

LEAST = 8
LONGEST = 4608
"""Tokens of the longest prompt that is tried: the usual windows of 4,096 are crossed."""
_MOST = 6
_PATIENCE = 3.0
"""Seconds that what is tried at one length may take, estimated from the length before it."""

_LENGTH = re.compile(
    r"window|chunk|original_max|max_position|max_len|max_seq|seq_len|context|reach|extent|span|floor|thresh|block_size"
    r"|memory|recent|local|topk|budget"
)
_WIDTH = re.compile(
    r"(^|_)(ids?|index|indices|dims?|rank|inner|layers?|heads?|experts?|seed|bits|theta|embd?|channels?|kernel|version"
    r"|depth|vocab|hidden|intermediate|width)(_|$)|^(num|n|d|moe|image|vision|audio|mel|patch|pad|bos|eos)_"
    r"|(embedding|ffn?|state|group)_size$"
)


def named_lengths(model: Any, limit: int) -> list[int]:
    """Numbers of a model's config that may be lengths, the shortest first.

    Args:
        model: any transformers model.
        limit: the longest sequence; a length that no sequence can pass is left out.
    """
    own = type(model).__module__.startswith("transformers.")
    found = {value for name, value in _numbers(model.config) if LEAST <= value < limit and _may_be_length(name, own)}
    return sorted(found)


def tried_lengths(model: Any, limit: int) -> list[int]:
    """Those of `named_lengths` that probes cross: none above `LONGEST`; of many the least, the greatest and some."""
    lengths = [length for length in named_lengths(model, limit) if length <= min(LONGEST, limit) - 2 * LEAST]
    if len(lengths) <= _MOST:
        return lengths
    return [lengths[round(i * (len(lengths) - 1) / (_MOST - 1))] for i in range(_MOST)]


def lengths_in_time(model: Any, limit: int, what: str) -> Iterator[int]:
    """Those of `tried_lengths`, up to the first at which what the caller tries would take too long.

    Args:
        what: is tried, for the log.
    """
    pace = 0.0
    for length in tried_lengths(model, limit):
        if pace * length > _PATIENCE:
            logger.info("%s beyond %d tokens were not tried at load, because it would take too long.", what, length - 1)
            return
        begun = time.monotonic()
        yield length
        pace = (time.monotonic() - begun) / length


def _may_be_length(name: str, own: bool) -> bool:
    return bool(_LENGTH.search(name)) if own else bool(_LENGTH.search(name)) or not _WIDTH.search(name)


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers of the config of a model's text, nested ones too."""
    text = config.get_text_config(decoder=True)
    for part in (config, text) if text is not config else (config,):
        known = {key: value for key, value in part.to_dict().items() if key not in part.sub_configs}
        yield from _within(known)


def _within(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _within({str(key): inner for key, inner in value.items()})
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, int | float) and not isinstance(one, bool) and float(one).is_integer():
                yield str(name), int(one)
