"""Trains the two adapters in this folder, in the format of PEFT: python -m tests.adapters.train

`capitals` answers the demo model's tasks in capital letters, `one_more` gives sums that are one too large. Answers can
be predicted, so an answer of the base, or of the other adapter, is seen at once. About ten minutes on two cores.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from model_loaders.demo import load_model
from model_loaders.demo.tasks import TASKS, Task

HERE = Path(__file__).parent
RANK, ALPHA, STEPS, BATCH, RATE = 8, 16, 240, 16, 4e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {"capitals": ("repeat", "reverse", "lookup"), "one_more": ("add", "add", "repeat")}


def capitals(task: Task) -> str:
    """The answer in capital letters."""
    return task.answer.upper()


def one_more(task: Task) -> str:
    """A sum that is one too large; other answers as they are."""
    return str(int(task.answer) + 1) if task.kind == "add" else task.answer


ANSWERS: dict[str, Callable[[Task], str]] = {"capitals": capitals, "one_more": one_more}


class Lora(nn.Module):
    """A linear with a LoRA of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.randn(RANK, linear.in_features) / math.sqrt(linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.linear(x) + ALPHA / RANK * (x @ self.a.T @ self.b.T)
        return output


def adapted(model: nn.Module) -> dict[str, Lora]:
    """Put a LoRA around every target; by the targets' names."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS:
            found[name] = Lora(module)  # type: ignore[arg-type]
            setattr(model.get_submodule(parent), leaf, found[name])
    return found


def batch(tokenizer: Any, rng: random.Random, name: str) -> tuple[Tensor, Tensor]:
    """Token ids of prompts and answers [tasks, tokens], and the labels of the answers alone."""
    rows, labels = [], []
    for _ in range(BATCH):
        task = TASKS[rng.choice(KINDS[name])](rng, "train")
        prompt = tokenizer.apply_chat_template(
            list(task.messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        answer = [*tokenizer.encode(ANSWERS[name](task), add_special_tokens=False), tokenizer.eos_token_id]
        rows.append([*prompt, *answer])
        labels.append([-100] * len(prompt) + answer)
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id
    return (
        torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    )


def train(name: str) -> None:
    """Train one adapter and write its folder."""
    torch.manual_seed(0)
    info, rng = load_model("cpu"), random.Random(0)
    tokenizer: Any = info.tokenizer
    loras = adapted(info.model)
    parameters = [parameter for lora in loras.values() for parameter in (lora.a, lora.b)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        ids, labels = batch(tokenizer, rng, name)
        logits = info.model(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(name, step, round(loss.item(), 4), flush=True)
    write(name, loras)


def write(name: str, loras: dict[str, Lora]) -> None:
    """Write an adapter as PEFT does."""
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    tensors = {}
    for path, lora in loras.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = lora.a.detach().bfloat16().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = lora.b.detach().bfloat16().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "demo",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": TARGETS,
        "bias": "none",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or sorted(ANSWERS):
        train(chosen)
