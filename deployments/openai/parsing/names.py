"""The names that `tool_parser` and `reasoning_parser` may have."""

from __future__ import annotations

import difflib

from deployments.core.model_card import ModelOptions
from deployments.openai.parsing import response_template
from deployments.openai.parsing.syntax import MARKERS, SYNTAXES

TOOL_PARSERS = (*SYNTAXES, response_template.NAME)
REASONING_PARSERS = (*MARKERS, response_template.NAME)


def parser_faults(options: ModelOptions) -> list[str]:
    """What is wrong with the parsers that a model's `api` section names."""
    faults = []
    for key, chosen, known in (
        ("tool_parser", options.tool_parser, TOOL_PARSERS),
        ("reasoning_parser", options.reasoning_parser, REASONING_PARSERS),
    ):
        if chosen is not None and chosen not in known:
            close = difflib.get_close_matches(chosen, known, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            faults.append(f"{key}: there is no parser {chosen!r}{meant}; known: {', '.join(known)}")
    return faults
