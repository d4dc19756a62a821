"""The reference has everything that can be configured, called or met, as the code has it now."""

from __future__ import annotations

import re

import pytest

from deployments.core import errors
from deployments.openai.parsing.format import REASONING_PARSERS, TOOL_PARSERS
from deployments.openai.parsing.harmony import HarmonySplitter
from deployments.openai.parsing.parts import Call, Content, Part, Reasoning, Splitter
from deployments.openai.parsing.reader import Reader
from deployments.openai.parsing.syntax import MARKERS, SYNTAXES, AnswerSyntax
from tests.docs.pages import DOCS, ROOT
from tests.docs.reference import keys, pages, routes
from tests.openai.conftest import Serve

REFERENCE = DOCS / "reference"


def test_the_examples_are_answered_as_shown(serve: Serve) -> None:
    shown = pages.answers_shown()
    found = routes.examples(serve([{"id": "demo", "loader": "model_loaders.demo:load_model"}], **routes.SERVER).url)
    assert shown.keys() == found.keys()
    for name, answer in found.items():
        assert routes.same(shown[name], routes.shortened(answer), name), (name, routes.shortened(answer))


@pytest.mark.parametrize("section", keys.SECTIONS)
def test_every_key_is_described(section: str) -> None:
    rows = list(keys.rows(pages.Place("configuration.md", f"keys of {section}").shown()))
    assert rows
    assert [row[0] for row in rows if not row[3]] == []


def test_every_field_of_a_request_is_described() -> None:
    for route in routes.ROUTES:
        for name, field in (route.body.model_fields if route.body is not None else {}).items():
            assert field.description, (route.name, name)


def test_every_error_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\w+) \| (\w+) \| .+ \|$", (REFERENCE / "errors.md").read_text(), re.MULTILINE)
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.TroupeError)]
    for kind in classes:
        assert kind.code is None or (str(kind.status), kind.type, kind.code) in rows, kind
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "deployments").rglob("*.py"))
    named = set(re.findall(r"code=\"(\w+)\"", source))
    assert named - {code for *_, code in rows} == set()
    assert [code for *_, code in rows if f'"{code}"' not in source and "_" + code.partition("_")[2] not in source] == []


BASH = [Call("bash", '{"command": "ls"}')]


def examples(heading: str) -> dict[str, list[str]]:
    """The texts that each parser of a section of parsers.md reads, by the parser's name."""
    section = (REFERENCE / "parsers.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    items = re.findall(r"^- (.+(?:\n  .+)*)", section, re.MULTILINE)
    codes = [re.findall(r"`([^`]+)`", item) for item in items]
    return {name: texts for name, *texts in codes}


def test_every_tool_parser_reads_what_its_line_shows() -> None:
    shown = examples("Tool parsers")
    assert tuple(shown) == TOOL_PARSERS
    for name, syntax in SYNTAXES.items():
        texts = [text for text in shown[name] if "ls" in text]
        assert texts, name
        for text in texts:
            splitter: Splitter = Reader(syntax, {"bash": {}}, reasons=False)
            assert parts_of(HarmonySplitter() if name == "harmony" else splitter, text) == BASH, text


def test_every_reasoning_parser_reads_what_its_line_shows() -> None:
    shown = examples("Reasoning parsers")
    assert tuple(shown) == REASONING_PARSERS
    for name, markers in MARKERS.items():
        text = shown[name][0]
        reader = Reader(AnswerSyntax(reasoning=markers), None, reasons=True)
        splitter: Splitter = HarmonySplitter() if name == "harmony" else reader
        assert parts_of(splitter, text) == [Reasoning("think"), Content("4")], text


def parts_of(splitter: Splitter, text: str) -> list[Part]:
    return [*splitter.feed(text), *splitter.finish()]
