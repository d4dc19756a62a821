"""The table and the drawing of servers side by side have the figures that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from deployments.cli.bench.plot import svg

DOCS = Path(__file__).parent.parent.parent / "docs"
RESULTS = json.loads((DOCS / "bench/cpu-avx512-bf16.json").read_text())["results"]
WORKLOADS = {"short": "short", "200 words": "words200", "6 turns": "agent6"}
SERVERS = {
    "Troupe": "troupe",
    "Troupe, fast mode": "fast",
    "transformers, continuous batching": "transformers-cb",
    "llama.cpp (`-t 2`)": "llama.cpp",
}


def test_the_table_has_the_medians_and_their_ratios() -> None:
    speed = {(each["workload"], each["concurrency"], each["target"]): each["tokens_per_s"] for each in RESULTS}
    section = (DOCS / "performance.md").read_text().split("### Beside other servers")[1]
    head, *rows = re.findall(r"^\| (.*) \|$", section.split("\n![")[0], re.MULTILINE)
    cells = [column.split(", ") for column in head.removeprefix("| ").split(" | ")]
    assert len(rows) == len(SERVERS)
    for row in rows:
        name, *written = row.split(" | ")
        for (workload, count), text in zip(cells, written, strict=True):
            cell = WORKLOADS[workload], int(count)
            ours, its = speed[*cell, "troupe"], speed[*cell, SERVERS[name]]
            ratio = "" if name.startswith("Troupe") else f" ({ours / its:.2f})"
            assert text == f"{its:,.0f}{ratio}", (name, cell)


def test_the_drawing_is_of_these_figures() -> None:
    assert (DOCS / "bench/cpu-avx512-bf16.svg").read_text() == svg(RESULTS), "draw it with deployments.cli.bench.plot"
