"""How a model's answers are read: found from its template and tokenizer, then proved on what the template renders."""

from __future__ import annotations

import difflib
import functools
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.core.model_card import ModelOptions
from deployments.core.reasoning import ReasoningMarkers
from deployments.openai.parsing import rendering, response_template
from deployments.openai.parsing.cursor import ANY
from deployments.openai.parsing.discover import described_calls, known_calls, syntax_of
from deployments.openai.parsing.discover_reasoning import closings, described_reasoning, rendered_reasoning
from deployments.openai.parsing.harmony import HarmonySplitter
from deployments.openai.parsing.parts import Call, Content, Reasoning, Splitter
from deployments.openai.parsing.reader import OPENED, Reader
from deployments.openai.parsing.syntax import BARE, BARE_PYTHON, MARKERS, SYNTAXES, UNDECLARED, AnswerSyntax, CallSyntax
from deployments.openai.parsing.typed import Schemas

logger = logging.getLogger(__name__)

TOOL_PARSERS = (*SYNTAXES, response_template.NAME)
REASONING_PARSERS = (*MARKERS, response_template.NAME)
_HARMONY = ("<|channel|>", "<|message|>")
_SOURCES = {
    "tool_parser": "tool_parser names it",
    "template": "the template renders it",
    "instruction": "the template tells the model so",
    "vocabulary": "the vocabulary has its markers",
    "default": "nothing shows the format; this is the most common one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How a model's answers are read.

    Attributes:
        syntax: how it writes.
        source: how that was found: `tool_parser`, `template` (rendered), `instruction`, `vocabulary`, or `default`.
        proved, tried: the number of rendered answers that were read back exactly, and of those rendered.
    """

    syntax: AnswerSyntax
    source: str
    proved: int = 0
    tried: int = 0

    @property
    def is_proved(self) -> bool:
        """Whether every rendered answer was read back."""
        return 0 < self.tried == self.proved

    @property
    def calls(self) -> str | None:
        """How a call is written; None for a format of channels."""
        return None if self.syntax.harmony or not self.syntax.calls else self.syntax.calls[0].sketch

    def card(self) -> dict[str, Any]:
        """What was found and how, as JSON values."""
        marks = self.syntax.reasoning
        return {
            "tool_calls": "harmony" if self.syntax.harmony else self.calls,
            "reasoning": None if marks is None else f"{marks.opening}{ANY}{marks.closing}",
            "found_by": self.source,
            "proved": self.is_proved,
            "read_back": [self.proved, self.tried],
        }

    def describe(self) -> str:
        """The same as a sentence or two."""
        card = self.card()
        proof = f"{self.proved} of {self.tried} rendered answers are read back" if self.tried else "not proved"
        found = f"Tool calls are read as {card['tool_calls']} ({_SOURCES[self.source]}; {proof})."
        return found + (f" Reasoning is read between {card['reasoning']}." if card["reasoning"] else "")

    def reader(
        self, tools: Sequence[Mapping[str, Any]] | None, prompt_end: str | None, *, continued: bool = False
    ) -> Splitter:
        """What reads the text of one choice.

        Args:
            tools: OpenAI tool definitions; None reads no calls.
            prompt_end: the rendered prompt or its end, which may have opened the reasoning.
            continued: the prompt ends within a message.
        """
        return self.splitter(None if tools is None else schemas_of(tools), prompt_end, continued=continued)

    def splitter(
        self,
        schemas: Schemas | None,
        prompt_end: str | None,
        *,
        continued: bool = False,
        constrained: bool = False,
        least: int | None = None,
    ) -> Splitter:
        """`reader`, given the schemas of the tools' arguments by name.

        Args:
            constrained: the content follows a grammar.
            least: of `Reader`.
        """
        if self.syntax.harmony:
            return HarmonySplitter(calls=schemas is not None, only_final=constrained)
        marks = self.syntax.reasoning or MARKERS["think"]
        opened, syntax = marks.opened_by(prompt_end, continued=continued), self.syntax
        if not opened and (tag := OPENED.search(prompt_end or "")) is not None:
            # One of several kinds of reasoning.
            opened, marks = True, ReasoningMarkers(f"<{tag[1]}>", f"</{tag[1]}>")
            syntax = replace(syntax, reasoning=marks)
        reasons = not marks.closed_by(prompt_end, continued=continued)
        begun = marks.opening if opened else self._begun_by(prompt_end)
        return Reader(syntax, schemas, reasons=reasons, begun=begun, least=least)

    def _begun_by(self, prompt_end: str | None) -> str:
        """The marker of calls that a prompt ends with, where one stands before texts as well."""
        openings = (call.open.strip() for call in self.syntax.calls)
        before_text = [each for each in openings if each and any(text.startswith(each) for text in self.syntax.dropped)]
        return next((each for each in before_text if (prompt_end or "").rstrip().endswith(each)), "")


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The JSON schemas of tools' arguments, by name."""
    functions = [tool.get("function", tool) for tool in tools]
    return {each["name"]: each.get("parameters") or {} for each in functions}


def answer_format(
    template: str | None,
    special_tokens: Collection[str] = (),
    vocabulary: Collection[str] | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> AnswerFormat:
    """How a model writes its answers.

    Args:
        template: its chat template.
        special_tokens: texts of the tokenizer's special tokens.
        vocabulary: texts of its tokens.
        tool_parser, reasoning_parser: names of declarations, which win over what is found.
    """
    known = frozenset(filter(rendering.is_marker, vocabulary or ()))
    return _answer_format(template or "", frozenset(special_tokens), known, tool_parser, reasoning_parser)


@functools.lru_cache(maxsize=64)
def _answer_format(
    template: str,
    special: frozenset[str],
    known: frozenset[str],
    tool_parser: str | None,
    reasoning_parser: str | None,
) -> AnswerFormat:
    rendered = rendering.rendered_calls(template)
    if "harmony" in (tool_parser, reasoning_parser) or (tool_parser is None and all(s in template for s in _HARMONY)):
        syntax = replace(SYNTAXES["harmony"], reasoning=MARKERS["harmony"])
        proved, tried = _proof(syntax, rendered)
        named = "harmony" in (tool_parser, reasoning_parser)
        source = "tool_parser" if named else "template"
        return AnswerFormat(syntax=syntax, source=source, proved=proved, tried=tried)
    form = rendered.form if rendered else None
    marks = MARKERS.get(reasoning_parser or "") or rendered_reasoning(template, form)
    marks = marks or described_reasoning(template) or described_reasoning(" ".join(special | known))
    source, calls = _calls(template, special | known, rendered, marks, tool_parser)
    syntax = AnswerSyntax(calls=calls, reasoning=marks)
    claimed = " ".join(syntax.markers(calls=True))
    markup = (*rendering.markup(template, rendered, marks), *sorted(special))
    # What ends a call may also end a text, so that it stands there alone.
    free = {text.strip() for call in calls for text in (call.close, call.section_end)} & {*rendering.ends(template)}
    # An answer of several messages has what stands between its reasoning and its text before a call as well.
    header = rendering.header(template)
    if marks is not None and header and marks.closing.endswith(header):
        free |= {header, marks.closing.removesuffix(header).strip()}
    between = next((call.separator for call in calls if header and header in call.separator), "")
    if between:
        free |= {header, *map(str.strip, between.partition(header)), *rendering.around(template, marks)} - {""}
    openings = [text for call in calls for text in rendering.tokens_in(call.section + call.open)]
    mirrors = [text for each in openings for text in closings(each) if text in template]
    mirrors += [] if marks is None else closings(marks.closing)
    markup = (*markup, *free, *mirrors)
    dropped = tuple(dict.fromkeys(each for each in markup if each.strip() and (each in free or each not in claimed)))
    syntax = replace(syntax, dropped=dropped, short_ids="[TOOL_CALLS]" in claimed)
    proved, tried = _proof(syntax, rendered)
    return AnswerFormat(syntax=syntax, source=source, proved=0 if source == "instruction" else proved, tried=tried)


def _calls(
    template: str,
    tokens: frozenset[str],
    rendered: rendering.Rendered | None,
    marks: ReasoningMarkers | None,
    tool_parser: str | None,
) -> tuple[str, tuple[CallSyntax, ...]]:
    """The forms of calls, and how they were found."""
    if tool_parser is not None:
        return "tool_parser", SYNTAXES[tool_parser].calls
    found = None if rendered is None else syntax_of(rendered, marks)
    told = described_calls(template)
    if found is not None and (found.begins or told is None or not told.begins):
        # A model that marks no calls may leave out a fence, or write them as it learned before.
        unmarked = found.shape == "json" and not (found.section + found.open).strip("` \njson")
        return "template", (found, *((BARE, BARE_PYTHON) if unmarked else ()))
    if told is not None:
        return "instruction", (told, *((found,) if found is not None else ()), UNDECLARED)
    known = tuple(known_calls({*tokens, *rendering.tokens_in(template)}))
    if known:
        return "vocabulary", (*known, UNDECLARED)
    return "default", (*SYNTAXES["hermes"].calls, BARE, BARE_PYTHON)


def _proof(syntax: AnswerSyntax, rendered: rendering.Rendered | None) -> tuple[int, int]:
    """How many of the rendered answers are read back exactly, and how many there are."""
    answers = [] if rendered is None else [text for text in (rendered.one, rendered.two) if text is not None]
    return sum(_reads_back(syntax, text, count) for count, text in enumerate(answers, 1)), len(answers)


def _reads_back(syntax: AnswerSyntax, text: str, count: int) -> bool:
    reader = AnswerFormat(syntax=syntax, source="").reader(rendering.TOOLS, None)
    parts = [*reader.feed(text), *reader.finish()]
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Call)]
    others = "".join(part.text for part in parts if isinstance(part, Content | Reasoning))
    return not others.strip() and calls == rendering.calls(count)


def format_of(options: ModelOptions, template: str | None, tokens: Collection[str]) -> AnswerFormat:
    """How a model writes.

    Args:
        options: name parsers, which win over what is found.
        template: its chat template.
        tokens: the special tokens of its tokenizer, and those that were added for markers.
    """
    chosen = (options.tool_parser, options.reasoning_parser)
    parsers = [None if name == response_template.NAME else name for name in chosen]
    return answer_format(template, (), tokens, *parsers)


def answers_of(
    model: str, options: ModelOptions, template: str | None, tokens: Collection[str], described: object
) -> Mapping[str, Any] | None:
    """The same for the model's card; None if the model has no chat template. The log has it as well.

    Args:
        described: the tokenizer's `response_template`.
    """
    if not template:
        return None
    chosen = (options.tool_parser, options.reasoning_parser)
    if response_template.NAME in chosen or (described and chosen == (None, None)):
        return {"found_by": response_template.NAME}
    found = format_of(options, template, tokens)
    logger.info("%s: %s", model, found.describe())
    return found.card()


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
