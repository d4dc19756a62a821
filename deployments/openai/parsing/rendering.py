"""Renders answers with a chat template as transformers does, with calls and without, to see what it writes."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from deployments.core.reasoning import ReasoningMarkers

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


TEXT = "Zqtextzq"
NAMES = ("zq_look", "zq_find")
IDS = ("Aqz7kd0w1", "b4Xyp92Lm")
VALUES = ("qvalue", "wvalue")
KEYS = ("alpha_zq", "beta_zq")
TOKEN = re.compile(r"<[^<>\s]{1,40}>|\[[A-Z_/]{2,40}\]|\[unused\d+\]|\[\|[^\[\]\s|]{1,40}\|\]|◁[^◁▷\s]{1,40}▷")
_EDGE = re.compile(rf"{TOKEN.pattern}|<[^<>\s]{{1,40}} [^<>\n]{{1,80}}>|[>#]{{2,}}\w*")

Message = Mapping[str, Any]


def arguments(index: int) -> dict[str, Any]:
    """The arguments of a rendered call."""
    return {KEYS[0]: VALUES[index], KEYS[1]: 41 + index}


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks.",
            "parameters": {
                "type": "object",
                "properties": {
                    KEYS[0]: {"type": "string", "description": "A text."},
                    KEYS[1]: {"type": "integer", "description": "A number."},
                },
                "required": [KEYS[0]],
            },
        },
    }
    for name in NAMES
]
USER = {"role": "user", "content": "Hello."}
PLAIN = {"role": "assistant", "content": TEXT}


@dataclass(frozen=True, slots=True)
class Form:
    """How a template wants calls in a message: what stands for no content, and whether arguments are JSON text."""

    content: tuple[Any, ...]
    text: bool

    def message(self, count: int, *, ids: Sequence[str] = IDS, turned: bool = False, **more: Any) -> dict[str, Any]:
        """An assistant's message of the first `count` calls, whose arguments may be turned around."""
        message: dict[str, Any] = {"role": "assistant"}
        message |= {"content": self.content[0]} if self.content else {}
        message["tool_calls"] = [
            {
                "id": ids[index],
                "type": "function",
                "function": {
                    "name": NAMES[index],
                    "arguments": json.dumps(held) if self.text else held,
                },
            }
            for index in range(count)
            for held in [dict(sorted(arguments(index).items(), reverse=turned))]
        ]
        return message | more


FORMS = [Form(content, text) for text in (False, True) for content in ((None,), ("",), ())]


_ENDED = re.compile(r"\s\Z|>.*>\Z", re.DOTALL)


def answer_of(template: str, message: Message, *, whole_content: bool = False) -> str | None:
    """What an assistant's message adds to the prompt of the same conversation, its end included.

    Args:
        whole_content: with what stands before any content.
    """
    whole = render(template, [USER, message], tools=TOOLS)
    if whole is None:
        return None
    prompt = render(template, [USER], tools=TOOLS, add_generation_prompt=True)
    other = render(template, [USER, {"role": "assistant", "content": "0" + TEXT}], tools=TOOLS)
    shared = len(common_prefix(whole, prompt or ""))
    if not whole_content:
        # What the prompt opens, this message may not have; what another answer begins with stands in both, but for the
        # beginning of a header that says what follows.
        both = common_prefix(whole, other or "")
        headed = prompt is not None and shared == len(prompt) and not _ENDED.search(both[shared:])
        shared = shared if headed else max(shared, len(both))
    return whole[boundary(whole, shared) :]


@functools.lru_cache(maxsize=64)
def takes_tools(template: str | None) -> bool:
    """Whether a template writes tools, or is not known to leave them out."""
    text = render(template, [USER], tools=TOOLS, add_generation_prompt=True) if template else None
    return NAMES[0] in text if text is not None else "tools" in (template or "")


def boundary(text: str, place: int) -> int:
    """A place moved to the beginning of the token that it is in."""
    inside = next((each.start() for each in _EDGE.finditer(text) if each.start() < place < each.end()), None)
    return place if inside is None else inside


def _without_end(text: str, plain: str) -> tuple[str, str]:
    """An answer without what ends the turn, and that; `plain` is an answer that ends in the same way."""
    text, plain = text.rstrip(), plain.rstrip()
    place = len(text) - len(common_prefix(text[::-1], plain[::-1]))
    token = next((each for each in TOKEN.finditer(text) if each.start() < place < each.end()), None)
    # Tokens that end turns share more than a bracket.
    if token is not None:
        place = token.start() if re.search(r"\w", text[place : token.end()]) else token.end()
    # A token that stands after every marker belongs to the one before it.
    shared = TOKEN.match(text, place)
    place = shared.end() if shared and shared[0] in text[:place] else place
    return text[:place], text[place:]


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a template writes of an answer with one call, and of one with two.

    Attributes:
        end: what ends a turn.
        follows: what it writes between a call and its result.
        form: how the messages were given.
        header: what begins the model's message.
        sorts: it writes the arguments in the order of their names.
        cdata: it writes texts with markup as CDATA.
    """

    one: str
    two: str | None
    end: str
    follows: str
    form: Form
    header: str
    sorts: bool
    cdata: bool


def rendered_calls(template: str) -> Rendered | None:
    """How a template renders calls; None if it does not."""
    plain = answer_of(template, PLAIN) or ""
    ids = (IDS, tuple(f"functions.{name}:{index}" for index, name in enumerate(NAMES)))
    shown = [
        (one, form, each)
        for each in ids
        for form in FORMS
        if (one := answer_of(template, form.message(1, ids=each))) is not None and NAMES[0] in one
    ]
    if not shown:
        return None
    # A form that the template does not expect leaves a `None` in the text.
    one, form, used = min(shown, key=lambda each: (each[1].text, len(each[0])))
    one, end = _without_end(one, plain)
    two = answer_of(template, form.message(2, ids=used))
    # Some templates write the first call alone.
    two = None if two is None or NAMES[1] not in two else _without_end(two, plain)[0]
    wrap = plain.partition(TEXT)[2].removesuffix(end)
    one, two = (text and text.removeprefix(wrap) for text in (one, two))
    follows = _follows(template, form.message(1, ids=used), one or "")
    sorts = one is not None and one in (answer_of(template, form.message(1, ids=used, turned=True)) or "")
    return Rendered(one or "", two, end, follows, form, header(template), sorts, "<![CDATA[" in template)


def _follows(template: str, message: Message, one: str) -> str:
    """What stands between a call and its result."""
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "name": NAMES[0], "content": TEXT}
    whole = render(template, [USER, message, result], tools=TOOLS) or ""
    found = TOKEN.match(whole.partition(one)[2].lstrip())
    return found[0] if found else ""


def calls(count: int) -> list[tuple[str, dict[str, Any]]]:
    """The calls that an answer was rendered with."""
    return [(NAMES[index], arguments(index)) for index in range(count)]


_ANSWER = re.compile(r"</?(answer|response|final_answer|output)>", re.IGNORECASE)
_END = re.compile(r"<\|(?:eo\w+|\w*end\w*)\|>")


def markup(template: str, rendered: Rendered | None, reasoning: ReasoningMarkers | None) -> Iterator[str]:
    """What stands around content, and what ends a turn."""
    before, after = around(template, reasoning)
    end = rendered.end if rendered else after
    beside = (before, after.removesuffix(end.strip()).strip())
    yield from (each for each in beside if is_marker(each) or re.fullmatch(r"[>#]{2,}\w*", each))
    for each in (*end.split(), *(rendered.follows.split() if rendered else ())):
        last = TOKEN.findall(each)
        yield from filter(is_marker, (each, each.removesuffix(last[-1]) if last else "", *last[-1:]))
    names = [name for name in _ANSWER.findall(template) if reasoning or name.lower() != "output"]
    yield from dict.fromkeys((*_END.findall(template), *(f"<{end}{name}>" for name in names for end in ("", "/"))))
    yield from ends(template)


def around(template: str, reasoning: ReasoningMarkers | None) -> tuple[str, str]:
    """What stands before content, after the reasoning, and after it."""
    before, _, after = (answer_of(template, PLAIN, whole_content=True) or "").partition(TEXT)
    before = before.rpartition(reasoning.closing)[2] if reasoning else before
    return before.strip(), after.strip()


def ends(template: str) -> list[str]:
    """The tokens that end an answer without calls."""
    return [each for each in TOKEN.findall((answer_of(template, PLAIN) or "").partition(TEXT)[2]) if is_marker(each)]


def header(template: str) -> str:
    """What begins the model's message."""
    prompts = [render(template, [USER], tools=TOOLS, add_generation_prompt=added) or "" for added in (False, True)]
    return prompts[1][len(common_prefix(*prompts)) :].strip()


def tokens_in(text: str) -> list[str]:
    """What has the form of a marker in a text."""
    return TOKEN.findall(text)


def is_marker(text: str) -> bool:
    """Whether a text has the form of a marker."""
    return TOKEN.search(text) is not None and EOS not in text and BOS not in text


def common_prefix(first: str, second: str) -> str:
    size = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if size is None else size]
