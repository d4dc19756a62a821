"""The names that `tool_parser` and `reasoning_parser` may have."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from deployments.core.errors import ConfigError
from deployments.core.model_card import ModelCard
from deployments.openai.parsing import response_template
from deployments.openai.parsing.families import FAMILIES
from deployments.openai.parsing.reasoning import MARKERS

TOOL_PARSERS = (*FAMILIES, response_template.NAME)
REASONING_PARSERS = (*MARKERS, response_template.NAME)


def check_parsers(cards: Iterable[ModelCard]) -> None:
    """Refuse parsers that do not exist.

    Raises:
        ConfigError: with the model's id, the name and the known ones.
    """
    for card in cards:
        for key, chosen, known in (
            ("tool_parser", card.options.tool_parser, TOOL_PARSERS),
            ("reasoning_parser", card.options.reasoning_parser, REASONING_PARSERS),
        ):
            if chosen is not None and chosen not in known:
                close = difflib.get_close_matches(chosen, known, n=1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                raise ConfigError(f"Model {card.id!r} has {key}: {chosen!r}{meant}; known ones: {', '.join(known)}.")
