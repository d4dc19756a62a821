"""Part `right`: texts of captured steps against those of `generate`, while sequences join, leave and are canceled."""

from __future__ import annotations

import random
from typing import Any

import torch
from bench_requests import Client, Engine
from transformers import GenerationConfig

from gpu_parts.setting import Mark, Measured, Setting
from tests.engine.architectures import VISION, decoder

KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "dynamic rope": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        "max_position_embeddings": 64,
    },
}
CAPTURED = ("llama", "qwen3")
UNSUITED = ("qwen3_next", "dynamic rope")
LENGTHS = (5, 33, 1, 70, 12, 50, 9, 21)
TOKENS = (80, 20, 60, 40, 90, 25, 110, 30)


def right(setting: Setting) -> Measured:
    """Tiny models in float32, whose texts must be equal, and one in bfloat16, whose may part where two tokens tie."""
    figures: dict[str, Any] = {}
    marks: list[Mark] = []
    for kind, options in KINDS.items():
        model = decoder("llama" if kind == "dynamic rope" else kind, **options).to(setting.device)
        with setting.fixed() as made:
            texts = _staggered(setting, model)
        differing = [i for i, (ids, text) in enumerate(texts) if text != generated(model, ids, len(text))]
        fixed = made[-1]
        figures[kind] = {"captures": fixed.captured, "replays": fixed.repeated, "reason": fixed.reason}
        marks.append(setting.mark(f"{kind}: texts that differ from generate", differing, "none", not differing))
        if kind in CAPTURED:
            right_end = fixed.reason is None and fixed.captured >= 2
            marks.append(setting.mark(f"{kind}: captures", fixed.captured, "2 or more, to the end", right_end))
        if kind in UNSUITED:
            marks.append(setting.mark(f"{kind}: why it has no graphs", fixed.reason, "a reason", bool(fixed.reason)))
    marks.append(_several_dimensions(setting))
    marks.append(_lower_precision(setting, figures, "dense", setting.model("tiny" if setting.tiny else "88m")))
    # In float32, experts are computed by a loop that asks the device how many tokens each has.
    experts = decoder("qwen3_moe").to(setting.device, torch.float32 if setting.tiny else torch.bfloat16)
    marks.append(_lower_precision(setting, figures, "experts", experts))
    return figures, marks


def generated(model: Any, ids: list[int], count: int, **inputs: Any) -> list[int]:
    """What `generate` gives for a prompt alone."""
    given = torch.tensor([ids], device=model.device)
    config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=1 << 20, pad_token_id=0)
    with torch.inference_mode():
        found = model.generate(given, attention_mask=torch.ones_like(given), generation_config=config, **inputs)
    return [int(i) for i in found[0, len(ids) :].tolist()]


def _staggered(setting: Setting, model: Any) -> list[tuple[list[int], list[int]]]:
    """Prompts and texts of requests that join while others run; the third is canceled and left out."""
    rng = random.Random(1)
    engine = setting.engine(model, 4)
    prompts = [[rng.randrange(3, 150) for _ in range(length)] for length in LENGTHS]
    clients: list[Client] = []
    for number, (ids, count) in enumerate(zip(prompts, TOKENS, strict=True)):
        clients.append(engine.start(ids, count))
        if number == 2:
            engine.batching_engine.cancel(str(number + 1))
        elif number % 3 == 0:
            _wait_for(clients[number], 6)
    texts = [
        (ids, client.wait().tokens) for i, (ids, client) in enumerate(zip(prompts, clients, strict=True)) if i != 2
    ]
    engine.close()
    return texts


def _wait_for(client: Client, tokens: int) -> None:
    while len(client.tokens) < tokens and not client.done.wait(0.002):
        pass


def _several_dimensions(setting: Setting) -> Mark:
    """Positions of three dimensions, beside those of one."""
    build, image, media = VISION["qwen2_vl"]
    model = build().to(setting.device)
    ids = [9, 11, *image, 12, 13, 14]
    inputs = {name: value.to(setting.device) for name, value in media(ids, 1).items()}
    with setting.fixed() as made:
        engine = setting.engine(model, 2)
        seen, read = engine.start(ids, 24, inputs=inputs), engine.start([5, 6, 7], 24)
        texts = seen.wait().tokens, read.wait().tokens
        engine.close()
    same = texts == (generated(model, ids, 24, **inputs), generated(model, [5, 6, 7], 24))
    good = same and made[-1].reason is None
    return setting.mark("qwen2_vl: text of an image, captured", "equal" if same else "differs", "equal", good)


def _lower_precision(setting: Setting, figures: dict[str, Any], name: str, model: Any) -> Mark:
    rng = random.Random(2)
    prompts = [[rng.randrange(1, model.config.vocab_size) for _ in range(50 + 20 * i)] for i in range(6)]
    with setting.fixed() as made:
        engine: Engine = setting.engine(model, 6)
        clients = [engine.start(ids, setting.sized(128, 24)) for ids in prompts]
        texts = [client.wait().tokens for client in clients]
        engine.close()
    faults = [
        i for i, text in enumerate(texts) if not alike(model, prompts[i], text, generated(model, prompts[i], len(text)))
    ]
    figures[f"bfloat16, {name}"] = {"captures": made[-1].captured, "reason": made[-1].reason}
    good = not faults and made[-1].reason is None
    return setting.mark(f"bfloat16, {name}: texts that part where no tokens tie", faults, "none", good)


@torch.inference_mode()
def alike(model: Any, ids: list[int], one: list[int], other: list[int]) -> bool:
    """Whether two texts are equal up to a token at which the likeliest two are within 2 % of the logits' spread."""
    parted = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
    if parted is None:
        return True
    logits = model(input_ids=torch.tensor([[*ids, *one[:parted]]], device=model.device)).logits[0, -1].float()
    first, second = logits.topk(2).values.tolist()
    return first - second <= 0.02 * float(logits.max() - logits.min())
