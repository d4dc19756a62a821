"""Count the lines of code of every package, as the tables in docs/structure.md show them.

python scripts/count_lines.py

Blank lines, comments and docstrings are not code.
"""

from __future__ import annotations

import ast
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE_THE_CORE = (
    *("model_loaders/backends", "model_loaders/examples", "model_loaders/demo", "deployments/compat"),
    *("deployments/media/whisper", "deployments/openai/responses", "deployments/openai/scores"),
    "deployments/engine/speedups",
)
CAPABILITIES = {
    "commands: `check`, what a start prints": (
        "deployments/cli/doctor",
        "deployments/cli/output",
        "deployments/cli/endpoint",
    ),
    "models that come while the server runs, versions": ("deployments/registry",),
    "adapters, models in host memory": (
        "deployments/adapters",
        "deployments/engine/adapters",
        "deployments/host/adapted",
        "deployments/host/memory",
    ),
    "looking inside a model": (
        "deployments/engine/inside",
        "deployments/host/inside",
        "deployments/openai/inside",
        "deployments/inside_client",
    ),
    "tool calls and reasoning of every family": ("deployments/openai/parsing",),
    "constraints on the text": ("deployments/engine/grammar",),
    "batches": ("deployments/batches", "deployments/openai/batches", "deployments/cli/batches"),
    "Messages": ("deployments/openai/messages",),
    "benchmarks: `eval`, `agentbench`, records and `replay`": (
        "deployments/cli/sweep",
        "deployments/cli/agentbench",
        "deployments/cli/records",
        "deployments/openai/record",
    ),
    "`bench`": ("deployments/cli/bench",),
    "routing by how a prompt begins": ("deployments/routing",),
    "large JSON texts in short steps": ("deployments/core/json_text",),
    "the page": ("deployments/openai/page",),
}
"""Folders that are there for one capability."""
_NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_lines(path: Path) -> int:
    """Lines of a Python file that have code on them."""
    source = path.read_text(encoding="utf-8")
    with path.open(encoding="utf-8") as file:
        tokens = [token for token in tokenize.generate_tokens(file.readline) if token.type not in _NO_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the tables."""
    counts: Counter[str] = Counter()
    for top in ("deployments", "model_loaders"):
        for path in (ROOT / top).rglob("*.py"):
            counts[str(path.parent.relative_to(ROOT))] += code_lines(path)
    beside = sum(count for folder, count in counts.items() if folder.startswith(BESIDE_THE_CORE))
    print("| package | lines |\n|---|---|")
    for folder, count in sorted(counts.items()):
        if count:
            print(f"| `{folder}/` | {count:,} |")
    print(f"| the core: all but {', '.join(f'`{name}`' for name in BESIDE_THE_CORE)} | {counts.total() - beside:,} |")
    print(f"| all | {counts.total():,} |")
    print("\n| capability | lines of the core |\n|---|---|")
    rest = counts.total() - beside
    for capability, folders in CAPABILITIES.items():
        count = sum(
            counts[folder] for folder in counts if f"{folder}/".startswith(tuple(f"{each}/" for each in folders))
        )
        rest -= count
        print(f"| {capability} | {count:,} |")
    print(f"| the rest: config, engine, host, chats and completions, HTTP, loaders, Ray Serve | {rest:,} |")


if __name__ == "__main__":
    main()
