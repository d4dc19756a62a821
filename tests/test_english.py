"""Phrases that are hard to read do not come back, in code, messages and documentation."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A phrase and what to write in its place. A space stands for any white space, also for a line break in a comment.
PHRASES = {
    r"so many (?!that\b)\w+": "the number, or the name of the argument",
    r"(?<!\S)(?!\W*there )\S+ (is|are) no (?!longer\b)\w+": "is not a …, are not …",
    r"in vain": "what was tried, and that it failed",
    r"for want of": "without, or if … runs out",
    r"behind (it|its|each|that)\b": "after",
    r"likeliest so": "the n most likely",
    r"(to be|not) had from": "has, does not have",
    r"\bnought\b": "0",
    r"never done unasked": "what is done",
    r"(hon|neighb|fav|behavi|col)our": "American spelling",
    r"(recogn|initial|normal|optim|serial|token|organ)is(e|es|ed|ing|ation)\b": "American spelling",
    r"\blicence": "American spelling",
}
COMMENT_BREAK = r"(?:[ \t]+|[ \t]*\n[ \t]*(?:#[ \t]*)?)"


def texts() -> list[Path]:
    """Every file of the repository that people read, except this one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    names = [name for name in listed if name.endswith((".py", ".md", ".yaml")) or name.startswith("scripts/")]
    found = [ROOT / name for name in names] or [*ROOT.glob("*.md"), *ROOT.glob("[dmst]*/**/*.py")]
    return [path for path in found if path.is_file() and path != Path(__file__)]


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_does_not_come_back(phrase: str) -> None:
    pattern = re.compile(re.sub(" ", lambda _: COMMENT_BREAK, phrase), re.IGNORECASE)
    hits = [
        f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, hit.start()) + 1}: {' '.join(hit[0].split())}"
        for path in texts()
        for text in [path.read_text(encoding="utf-8")]
        for hit in pattern.finditer(text)
    ]
    assert hits == [], f"write instead: {PHRASES[phrase]}"
