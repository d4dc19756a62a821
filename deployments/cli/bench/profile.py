"""`troupe bench --profile`: where the time of a server goes, from samples that py-spy takes of its processes."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from deployments.cli.bench.flame import drawn
from deployments.cli.bench.measure import Cell, Run, measured_run
from deployments.cli.bench.report import figures
from deployments.cli.bench.targets import Target
from deployments.cli.endpoint.processes import family, thread_seconds
from deployments.core.errors import ConfigError

_PROCESSES = 4
_BUSY = 0.02
_ATTACH_S = 3.0
_ENGINE = "deployments/engine/base/threaded.py"
PHASES = (
    ("render", ("deployments/host/template_processes.py", "model_loaders/prompts/template")),
    ("encode", ("tokenization_utils", "tokenizers", "model_loaders/prompts/encode")),
    ("detokenize", ("deployments/engine/text/",)),
    ("choose tokens", ("deployments/engine/sampling/", "deployments/engine/grammar/")),
    ("prefill", ("deployments/engine/batching/prefill.py",)),
    ("steps", ("deployments/engine/batching/", "deployments/engine/")),
    ("host", ("deployments/host/",)),
    ("API", ("deployments/openai/", "deployments/ingress.py", "pydantic", "fastapi")),
    ("transport", ("uvicorn", "starlette", "ray/", "asyncio", "deployments/")),
)
"""What a sample is part of: the first frame from its end on that lies in one of these files."""

Stacks = Mapping[tuple[str, ...], float]
"""Seconds of processor time by stack, from the outermost frame in."""

# Where Python is not on the processor, although py-spy may not see it.
_WAITS = ("wait (", "get (", "select (", "_worker (", "_work (", "main_loop (", "event_loop (", "run_forever (")
_THREAD = re.compile(r"thread \((\d+|0x[0-9a-fA-F]+)\)")


def profiled(cell: Cell, target: Target, folder: Path) -> str:
    """Record a run of a workload, write flame graphs to a folder, and return where a request's time goes, as a table.

    Raises:
        ConfigError: py-spy is not installed, or may not look at the processes.
    """
    program = shutil.which("py-spy")
    if program is None:
        raise ConfigError("--profile needs py-spy on the PATH: pip install py-spy.")
    folder.mkdir(parents=True, exist_ok=True)
    before = family(target.process)
    measured_run(cell, target, cell.rounds + 1)
    taken = {pid: seconds - before.get(pid, 0.0) for pid, seconds in family(target.process).items()}
    busiest = sorted((pid for pid in taken if taken[pid] > _BUSY), key=lambda pid: -taken[pid])[:_PROCESSES]
    longer = replace(cell, conversations=3 * cell.conversations)
    with _recorded(program, busiest, folder) as files:
        idle = {pid: thread_seconds(pid) for pid in files}
        run = measured_run(longer, target, cell.rounds + 2)
        busy = {pid: _less(thread_seconds(pid), idle[pid]) for pid in files}
    stacks = [_stacks(file, busy[pid]) for pid, file in files.items() if file.exists()]
    if not any(stacks):
        raise ConfigError(
            "py-spy has recorded nothing: it may need the right to trace processes (root, or ptrace_scope)."
        )
    name = f"{target.name}-{cell.workload}-{cell.concurrency}"
    for found in stacks:
        engine = {stack: seconds for stack, seconds in found.items() if any(_ENGINE in frame for frame in stack)}
        if engine:
            (folder / f"{name}.svg").write_text(drawn(engine, f"{name}: the engine's thread"), encoding="utf-8")
            break
    else:
        (folder / f"{name}.svg").write_text(drawn(stacks[0], name), encoding="utf-8")
    return timeline(name, run, phases(stacks))


def phases(found: Sequence[Stacks]) -> dict[str, float]:
    """Seconds of processor time by phase, in all processes."""
    taken: dict[str, float] = defaultdict(float)
    for stacks in found:
        for stack, seconds in stacks.items():
            taken[_phase(stack)] += seconds
    return {name: taken[name] for name in (*(name for name, _ in PHASES), "other") if name in taken}


def timeline(name: str, run: Run, seconds: Mapping[str, float]) -> str:
    """A request on average: what its client sees, and the samples of each phase, as a table of Markdown."""
    found, count = figures(run), max(1, len(run["requests"]))
    whole = 1e3 * sum(each["whole"] for each in run["requests"]) / count
    total = sum(seconds.values()) or 1.0
    lines = [f"{name}: first token after {found['first_p50_ms']:.1f} ms, whole {whole:.1f} ms", ""]
    lines += ["| phase | ms of a request | share |", "|---|---|---|"]
    lines += [f"| {phase} | {1e3 * each / count:.2f} | {100 * each / total:.0f} % |" for phase, each in seconds.items()]
    return "\n".join(lines) + "\n"


def _phase(stack: Sequence[str]) -> str:
    for frame in reversed(stack):
        for name, places in PHASES:
            if any(place in frame for place in places):
                return name
    return "other"


@contextlib.contextmanager
def _recorded(program: str, processes: Sequence[int], folder: Path) -> Iterator[dict[int, Path]]:
    """While the block runs, py-spy records processes; their files are written when it ends."""
    files = {pid: folder / f"{pid}.txt" for pid in processes}
    command = (*(program, "record", "--threads", "--format", "raw", "--full-filenames"), "--duration", "3600")
    recorders = [
        subprocess.Popen(
            [*command, "--output", str(file), "--pid", str(pid)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for pid, file in files.items()
    ]
    time.sleep(_ATTACH_S)
    try:
        yield files
    finally:
        for recorder in recorders:
            recorder.send_signal(signal.SIGINT)
        for recorder in recorders:
            recorder.wait()


def _stacks(file: Path, seconds: Mapping[int, float]) -> Stacks:
    """The processor time of each thread, divided among its samples: py-spy also samples threads that wait."""
    samples: dict[int, Counter[tuple[str, ...]]] = defaultdict(Counter)
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        found = _THREAD.match(thread)
        if found and frames and not any(wait in frames[-1] for wait in _WAITS):
            samples[int(found[1], 0)][tuple(frames)] += int(count)
    taken: dict[tuple[str, ...], float] = defaultdict(float)
    for thread_id, stacks in samples.items():
        each = seconds.get(thread_id, 0.0) / stacks.total()
        for frames_, count_ in stacks.items():
            taken[frames_] += each * count_
    return {stack: value for stack, value in taken.items() if value}


def _less(after: Mapping[int, float], before: Mapping[int, float]) -> dict[int, float]:
    return {thread: seconds - before.get(thread, 0.0) for thread, seconds in after.items()}
