"""How fast the engine is, against the same stock model without it. Needs torch and transformers only.

    python scripts/bench_engine.py                              everything, the 88 M model
    python scripts/bench_engine.py --parts speed --rows 16 32 --prompt 300 --json out.json
    python scripts/bench_engine.py --model 8b --device cuda     on a GPU

Models are built from configs with random weights. The contenders of a comparison take turns, each in a process of its
own; figures are medians over the turns, ratios are medians of the ratios within a turn. Every turn has new prompts.

Parts:
    speed          tokens/s, prefill included, and the time of a decode step; against the bare loop, generate and CB
    gap            time between two tokens of running rows while a long prompt is computed
    conversations  agents whose every prompt begins with the last one; the prefix store on and off
    sampling       choosing the tokens of 32 rows of a large vocabulary, against the matrix product of their logits
    proof          deterministic mode: requests among neighbors against the same ones alone, bit by bit
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from bench_baselines import SIZES, apart, bandwidth, build_model
from bench_contenders import CLOCKS, Contender
from bench_requests import Engine, random_prompts
from bench_sampling import sampling


def compare(
    contenders: dict[str, Contender], turn: Callable[[], list[list[int]]], new: int, turns: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each contender's runs and decode steps, turn after turn; a first, short one does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(turns + 1):
        prompts = turn()
        for name, contender in contenders.items():
            taken, each = contender.run(prompts, new if number else min(4, new))
            if number:
                seconds[name].append(taken)
                steps[name] += each
    return seconds, steps


def ratio(seconds: dict[str, list[float]], other: str) -> float:
    """How many times the engine's time another one needs, the median over the turns."""
    return median(b / a for a, b in zip(seconds["engine"], seconds[other], strict=True))


def speed(model: Any, arguments: argparse.Namespace, bytes_per_second: float) -> list[dict[str, Any]]:
    """Tokens per second with the prefill, and decode steps, at several row counts."""
    rng = random.Random(1)
    results = []
    header = ("prompt", "rows", "tokens/s", "step ms", "roofline", "/loop", "/generate", "/CB", "/determin.")
    print("".join(f"{name:>11}" for name in header))
    for length in arguments.prompt:
        for rows in arguments.rows:
            result = _speed_of(model, arguments, bytes_per_second, rng, length, rows)
            results.append(result)
            values = [length, rows, f"{result['tokens_per_s']:.0f}", f"{result['step_ms']:.2f}"]
            values.append(f"{100 * result['roofline']:.0f} %")
            for name in ("loop", "generate", "cb", "deterministic"):
                value = result["times"].get(name)
                values.append("-" if value is None else f"{value:.2f}")
            print("".join(f"{value:>11}" for value in values), flush=True)
    return results


def _speed_of(
    model: Any, arguments: argparse.Namespace, bytes_per_second: float, rng: random.Random, length: int, rows: int
) -> dict[str, Any]:
    new, against = arguments.new, arguments.against
    names = ["engine", *(name for name in against if name != "cb")]
    options = {"engine": {"max_batch_size": rows}, "deterministic": {"max_batch_size": rows}}

    def turn() -> list[list[int]]:
        return random_prompts(rng, rows, length, model.config.vocab_size)

    with ExitStack() as stack:
        contenders = {name: stack.enter_context(Contender(name, arguments, **options.get(name, {}))) for name in names}
        seconds, steps = compare(contenders, turn, new, arguments.turns)
        times = {name: ratio(seconds, name) for name in names[1:]}
        if "cb" in against:
            batching = _batching(contenders["engine"], arguments, turn, length, rows)
            times["cb"] = min(ratio(taken, "cb") for taken in batching.values())
            seconds |= {f"cb{at_once}": taken["cb"] for at_once, taken in batching.items()}
    step = median(steps["engine"])
    read = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    read += rows * (length + new // 2) * _position_bytes(model.config, model.dtype)
    return {
        "prompt": length,
        "new": new,
        "rows": rows,
        "tokens_per_s": rows * new / median(seconds["engine"]),
        "step_ms": 1000 * step,
        "roofline": read / bytes_per_second / step,
        "times": times,
        "seconds": seconds,
    }


def _batching(
    engine: Contender, arguments: argparse.Namespace, turn: Any, length: int, rows: int
) -> dict[int, dict[str, list[float]]]:
    """Continuous batching with all rows in one forward, and with eight at most."""
    taken = {}
    for at_once in sorted({rows, min(8, rows)}):
        sizes = {"rows": rows, "positions": length + arguments.new, "at_once": at_once}
        with Contender("cb", arguments, **sizes) as batching:
            contenders = {"engine": engine, "cb": batching}
            taken[at_once], _ = compare(contenders, turn, arguments.new, max(1, arguments.turns // 2))
    return taken


def _position_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one position."""
    head = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * head * dtype.itemsize)


def gap(model: Any, arguments: argparse.Namespace, bytes_per_second: float) -> list[dict[str, Any]]:
    """Gaps between tokens of running rows, before and while a long prompt is computed."""
    rng, vocab = random.Random(2), model.config.vocab_size
    results = []
    print(f"{'chunk':>11}{'step ms':>11}{'gap ms':>11}{'longest':>11}{'first token of the long prompt, s':>36}")
    for chunk in arguments.chunks:
        engine = Engine(model, arguments, max_batch_size=9, prefill_chunk=chunk, prefix_cache=False)
        engine.run(random_prompts(rng, 2, 64, vocab), 4)
        clients = [engine.start(ids, 4000) for ids in random_prompts(rng, 8, 64, vocab)]
        while min(len(client.times) for client in clients) < 60:
            time.sleep(0.01)
        quiet = median(gap for client in clients for gap in client.gaps[20:])
        start = time.perf_counter()
        long = engine.start(random_prompts(rng, 1, arguments.long, vocab)[0], 1).wait()
        gaps = [
            later - sooner
            for client in clients
            for sooner, later in zip(client.times, client.times[1:], strict=False)
            if start < later and sooner < long.times[0]
        ]
        first = long.times[0] - start
        engine.close()
        results.append({"chunk": chunk, "step": quiet, "gap": median(gaps), "longest": max(gaps), "first_token": first})
        print(f"{chunk:>11}{1e3 * quiet:>11.1f}{1e3 * median(gaps):>11.1f}{1e3 * max(gaps):>11.1f}{first:>36.2f}")
    return results


def conversations(model: Any, arguments: argparse.Namespace, _: float) -> list[dict[str, Any]]:
    """Agents at work side by side: each prompt is the last one, its answer and a new observation."""
    first, observed, answer, agents = arguments.conversation
    results = []
    print(f"{'turns':>11}{'off s':>11}{'on s':>11}{'off / on':>11}{'computed':>11}")
    for turns in (6, 20):
        wall: dict[bool, list[float]] = {True: [], False: []}
        computed = 0.0
        for repeat in range(max(1, arguments.turns // 2)):
            for kept in (True, False):
                engine = Engine(model, arguments, max_batch_size=agents, prefix_cache=kept)
                engine.run([[1, 2, 3]], 4)
                rng = random.Random(repeat)
                clock = CLOCKS[arguments.clock]
                start = clock()
                asked, reused = _converse(engine, rng, turns, first, observed, answer, agents, model.config.vocab_size)
                wall[kept].append(clock() - start)
                engine.close()
                computed = 1 - reused / asked if kept else computed
        times = median(off / on for on, off in zip(wall[True], wall[False], strict=True))
        result = {"turns": turns, "off": median(wall[False]), "on": median(wall[True]), "times": times}
        results.append({**result, "computed": computed})
        print(f"{turns:>11}{result['off']:>11.2f}{result['on']:>11.2f}{times:>11.2f}{100 * computed:>9.1f} %")
    return results


def _converse(
    engine: Engine, rng: random.Random, turns: int, first: int, observed: int, answer: int, agents: int, vocab: int
) -> tuple[int, int]:
    """Prompt tokens sent, and of those reused."""
    histories = random_prompts(rng, agents, first, vocab)
    asked = reused = 0
    for _ in range(turns):
        clients = [engine.start(list(ids), answer) for ids in histories]
        for ids, client in zip(histories, clients, strict=True):
            asked += len(ids)
            reused += client.wait().cached
            ids += client.tokens + random_prompts(rng, 1, observed, vocab)[0]
    return asked, reused


def proof(model: Any, arguments: argparse.Namespace, _: float) -> list[dict[str, Any]]:
    """Deterministic mode: tokens and log-probabilities among neighbors equal those alone, bit for bit."""
    rng, vocab = random.Random(3), model.config.vocab_size
    count = arguments.requests
    shared = random_prompts(rng, 4, 600, vocab)
    asked = []
    for number in range(count):
        ids = random_prompts(rng, 1, rng.randrange(1, 160), vocab)[0]
        if number % 4 == 0:
            ids = shared[rng.randrange(4)] + ids[:40]
        sampling = {"logprobs": 0, "seed": number, "temperature": float(number % 2)}
        # A step begins one prompt: texts this long let 32 rows come together.
        asked.append((ids, rng.randrange(33, 49), sampling))
    alone = Engine(model, arguments, max_batch_size=32, deterministic=True, prefix_cache=False)
    together = Engine(model, arguments, max_batch_size=32, deterministic=True)
    start = time.perf_counter()
    clients = [together.start(ids, new, **sampling) for ids, new, sampling in asked]
    for client in clients:
        client.wait()
    busy = time.perf_counter() - start
    differ = 0
    for (ids, new, sampling), client in zip(asked, clients, strict=True):
        other = alone.start(ids, new, **sampling).wait()
        differ += (other.tokens, other.logprobs) != (client.tokens, client.logprobs)
    reused = sum(client.cached for client in clients)
    together.close()
    alone.close()
    print(f"{count} requests at 32 rows, {reused} prompt tokens reused: {differ} differ from alone ({busy:.0f} s)")
    return [{"requests": count, "differ": differ, "reused": reused}]


def markdown(results: dict[str, Any]) -> str:
    """The figures as the tables of docs/performance.md."""
    facts = results["facts"]
    lines = [", ".join(f"{key} {facts[key]}" for key in ("dtype", "device", "threads", "torch", "transformers")), ""]
    if results.get("speed"):
        lines += [
            "| prompts | tokens/s | step, ms | roofline | against the bare loop | generate | CB | deterministic costs |"
        ]
        lines += ["|---" * 8 + "|"]
    for row in results.get("speed", ()):
        times = [row["times"].get(name) for name in ("loop", "generate", "cb", "deterministic")]
        cells = [f"{row['rows']} x {row['prompt']}", f"{row['tokens_per_s']:.0f}", f"{row['step_ms']:.1f}"]
        cells += [f"{100 * row['roofline']:.0f} %", *("" if value is None else f"{value:.2f}" for value in times)]
        lines.append(f"| {' | '.join(cells)} |")
    if results.get("conversations"):
        lines += ["", "| turns | off, s | on, s | off / on | prompt tokens computed |", "|---" * 5 + "|"]
    for row in results.get("conversations", ()):
        cells = [str(row["turns"]), *(f"{row[name]:.1f}" for name in ("off", "on")), f"{row['times']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {100 * row['computed']:.1f} % |")
    if results.get("gap"):
        lines += ["", "| prefill_chunk | step, ms | gap, ms | longest, ms | first token, s |", "|---" * 5 + "|"]
    for row in results.get("gap", ()):
        cells = [str(row["chunk"]), *(f"{1e3 * row[name]:.1f}" for name in ("step", "gap", "longest"))]
        lines.append(f"| {' | '.join(cells)} | {row['first_token']:.2f} |")
    if results.get("sampling"):
        lines += ["", "| 32 rows x 128256 tokens | ms | of the head's product |", "|---" * 3 + "|"]
    for row in results.get("sampling", ()):
        lines.append(f"| {row['wish']} | {row['ms']:.1f} | {100 * row['share']:.0f} % |")
    return "\n".join(lines)


PARTS = {"speed": speed, "gap": gap, "conversations": conversations, "sampling": sampling, "proof": proof}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=SIZES, default="88m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of a forward")
    parser.add_argument("--memory-gib", type=float, default=None, help="the engine's budget for caches")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64])
    parser.add_argument("--prompt", nargs="+", type=int, default=[100, 300], help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=48, help="tokens to generate")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: of this process, for busy machines with --threads 1",
    )
    names = ("loop", "generate", "cb", "deterministic")
    parser.add_argument("--against", nargs="*", choices=names, default=list(names))
    parser.add_argument("--long", type=int, default=4000, help="tokens of the long prompt of `gap`")
    parser.add_argument("--chunks", nargs="+", type=int, default=[512, 128, 8192], help="prefill_chunk in `gap`")
    sizes = ("FIRST", "OBSERVED", "ANSWER", "AGENTS")
    parser.add_argument("--conversation", nargs=4, type=int, default=(400, 80, 24, 8), metavar=sizes)
    parser.add_argument("--requests", type=int, default=1000, help="requests of `proof`")
    parser.add_argument("--json", type=Path, help="write all figures here, and print the tables of the docs")
    return parser.parse_args(argv)


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    model = apart(partial(build_model, arguments.model, getattr(torch, arguments.dtype), arguments.device))
    measured = apart(partial(bandwidth, arguments.device))
    where = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else platform.machine()
    facts = {
        "model": arguments.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": arguments.dtype,
        "device": where,
        "threads": torch.get_num_threads(),
        "bandwidth_gb_s": measured / 1e9,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_before": os.getloadavg()[0],
    }
    print(
        ", ".join(
            f"{key} {value:.1f}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
    )
    results: dict[str, Any] = {"facts": facts}
    for part in arguments.parts:
        print(f"\n{part}")
        results[part] = PARTS[part](model, arguments, measured)
    results["facts"]["load_after"] = os.getloadavg()[0]
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{markdown(results)}")


if __name__ == "__main__":
    main()
