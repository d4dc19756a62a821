"""Renders a chat template as transformers does, to see what it writes."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

BOS, EOS = "<|zq-bos|>", "<|zq-eos|>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant writes; here it only is what it holds."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime(2026, 1, 1).strftime(form)
    return environment.from_string(template)


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str | None:
    """The prompt of a conversation; None if the template cannot render it."""
    try:
        return _compiled(template).render(messages=messages, bos_token=BOS, eos_token=EOS, **variables)
    except Exception:
        # A template is someone's program: it may raise anything, and recurse without end.
        return None


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
