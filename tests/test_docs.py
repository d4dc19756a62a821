"""What can be configured, called or met is documented."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import typer

from deployments.cli.main import app
from deployments.cli.serve_options import ServeOptions, flag, keys
from deployments.openai.app import ROUTES
from model_loaders.contract import ModelInfo
from tests.clients import page
from tests.docs.reference import pages as generated

DOCS = Path(__file__).parent.parent / "docs"


def table_keys(page: str) -> set[str]:
    """What stands between backticks in the first cell of a table's rows."""
    rows = re.findall(r"^\| (.+?) \|", (DOCS / page).read_text(), re.MULTILINE)
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row)}


def test_the_generated_parts_of_the_reference_are_fresh() -> None:
    """Every YAML key, and every route with all its fields, as the code has them."""
    for place, text in generated.generated(generated.answers_shown()):
        assert place.shown() == text, f"{place.page} is not what the code says: run {generated.COMMAND}"


def test_every_option_of_the_command_and_its_key() -> None:
    page = (DOCS / "reference/cli.md").read_text()
    options = set(ServeOptions.__dataclass_fields__) - {"model"}
    for name in options:
        assert f"| `{flag(name)}` | {f'`{keys()[name]}`' if name in keys() else ''}" in page, name
    sections = re.findall(r"^## troupe (\S+)$", page, re.MULTILINE)
    commands = typer.main.get_command(app).commands
    assert sections == list(commands)
    for name in sections:
        text = page.partition(f"## troupe {name}\n")[2].partition("\n## ")[0]
        typed = {option for each in commands[name].params for option in each.opts if option.startswith("--")}
        assert {option for option in typed if f"`{option}`" not in text} == set(), name


def test_every_hook_and_field_of_a_loader() -> None:
    documented = table_keys("loaders.md")
    given = {field.name for field in fields(ModelInfo) if field.init and not field.name.endswith("_kwargs")}
    missing = given - documented
    assert missing == set()


def test_every_route() -> None:
    text = (DOCS / "reference" / "api.md").read_text()
    for route in ROUTES:
        path = re.sub(r"\{\w+:path\}", "{id}", route.path)
        assert f"`{route.method} {path}`" in text, route


def test_the_clients_page_is_what_the_clients_tests_run() -> None:
    """tests/clients runs the page's own blocks in environments with the page's own versions; here: none is left out."""
    sections = re.split(r"^## ", (DOCS / "clients.md").read_text(), flags=re.MULTILINE)[1:]
    for client in (section.partition("\n")[0] for section in sections):
        source = (DOCS.parent / "tests" / "clients" / f"test_{client.lower()}.py").read_text()
        pinned = all(re.fullmatch(r"[\w\[\]-]+[=~]=[\d.]+", name) for name in page.requirements(client))
        assert pinned or re.search(
            r"^git clone --branch v[\d.]+ .*\n(.*\n)*?pip install -e", page.section(client), re.MULTILINE
        ), client
        assert f'client_python("{client}"' in source
        for number in range(page.section(client).count("```bash") - (client in ("litellm", "mini_swe_agent"))):
            assert re.search(rf'(block\(\s*"{client}", "bash", |documented\(){number}\b', source), (client, number)
        if "```python" in page.section(client):
            assert f'block("{client}", "python", 0' in source


def test_every_scenario_of_reliability_has_a_test_that_exists() -> None:
    rows = re.findall(
        r"^\| (\d*) ?\| (.+?) \| (`.+?) \| (.+?) \|$", (DOCS / "reliability.md").read_text(), re.MULTILINE
    )
    assert [int(number) for number, *_ in rows if number] == list(range(1, 31))
    for _, scenario, tests, _ in rows:
        for test in re.findall(r"`([^`]+)`", tests):
            file, _, name = test.partition("::")
            text = (DOCS.parent / "tests" / file).read_text()
            assert f"def {name}(" in text or not name, (scenario, test)


def test_every_folder_and_every_file_of_the_structure() -> None:
    page = (DOCS / "structure.md").read_text(encoding="utf-8")
    tree = page.split("```")[1]
    folders = {path.parent for top in ("deployments", "model_loaders") for path in (DOCS.parent / top).rglob("*.py")}
    assert {folder.name for folder in folders if f"{folder.name}/" not in tree} - {"ctranslate2", "triton"} == set()
    for place in re.findall(r"`([\w/]+(?:\.py|/))`", page):
        assert (DOCS.parent / place).exists() or (DOCS.parent / "deployments" / place).exists(), place


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    """Strictly: every page is in the navigation, and every link and anchor leads somewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", "docs/mkdocs.yml", "--site-dir", str(tmp_path)],
        cwd=DOCS.parent,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))  # and a page for 404
    for file in pages:
        loaded = r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//(?!127\.0\.0\.1)[^>]*>"
        assert re.findall(loaded, file.read_text(encoding="utf-8")) == [], file
