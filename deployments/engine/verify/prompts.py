"""Token ids that proofs compute: arbitrary ones that mean nothing special."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Any

from deployments.core.token_ids import vocab_size
from deployments.engine.text.vocabulary import Vocabulary

_SAFE_IDS = 100


def ordinary_ids(model: Any, count: int) -> list[int]:
    """Arbitrary token ids that no field of the model's config gives a meaning to."""
    size = vocab_size(model) or 1
    special = {i for config in (model.config, model.config.get_text_config(decoder=True)) for i in _named(config)}
    ordinary = (i for i in (7919 * n % size for n in range(1, size)) if i not in special)
    ids = list(itertools.islice(ordinary, count)) or [0]
    return (ids * count)[:count]


def drawn_ids(model: Any, vocabulary: Vocabulary, count: int) -> list[int]:
    """Arbitrary token ids that are neither special tokens nor placeholders of the model's config."""
    size = min(len(vocabulary) or _SAFE_IDS, vocab_size(model) or _SAFE_IDS)
    avoided = {*vocabulary.special_ids, *vocabulary.eos_ids, *_named(model.config)}
    return random.Random(0).choices([i for i in range(size) if i not in avoided] or [0], k=count)


def in_turn(ids: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Prompts of some lengths, one after the other out of `ids`."""
    left = iter(ids)
    return [list(itertools.islice(left, length)) for length in lengths]


def _named(config: Any) -> Iterator[int]:
    """The token ids that a config names."""
    for key, value in config.to_dict().items():
        if key.endswith(("_token_id", "_token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if i is not None)
