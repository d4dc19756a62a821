"""Sixteen adapters and their base asked by many clients at once: the tokens and log-probabilities of each, merged."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.adapters.lora import merged, unmerged, write_adapter
from tests.engine.running import Alone, generate_alone
from tests.openai.added import model
from tests.openai.conftest import Serve
from tests.tiny import byte_tokenizer, llama

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"a{i}" for i in range(16)]
WORKERS = 32


class Rig:
    """A base of a dtype with its adapters, and what each answers by itself."""

    def __init__(self, place: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        llama().to(dtype).save_pretrained(place / "base")
        byte_tokenizer().save_pretrained(place / "base")
        self.base = place / "base"
        self.folders = {
            name: write_adapter(llama(), place / name, LINEARS, seed=i, rank=1 + i) for i, name in enumerate(NAMES)
        }
        self.models = {"base": llama().to(dtype)}
        self.models |= {name: merged(llama(), folder, lambda _: 2.0).to(dtype) for name, folder in self.folders.items()}

    def entries(self) -> list[dict[str, Any]]:
        adapters = [{"id": name, "base": "base", "adapter": str(folder)} for name, folder in self.folders.items()]
        return [model(self.base), *adapters]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(9, 150, (9 + 5 * i % 40,), generator=generator).tolist() for i in range(count)]


def asked(url: str, name: str, ids: list[int], **fields: Any) -> Any:
    body = {"model": name, "prompt": ids, "temperature": 0, "ignore_eos": True, "logprobs": 0, **fields}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


@pytest.mark.parametrize("count", [2, pytest.param(30, marks=pytest.mark.long)])
def test_every_answer_is_that_of_the_merged_adapter(count: int, serve: Serve, tmp_path: Path) -> None:
    rig = Rig(tmp_path, torch.float32)
    server = serve(rig.entries())
    requests_ = [(name, ids) for name, ids in itertools.product(["base", *NAMES], prompts(count))]
    random.Random(3).shuffle(requests_)
    with ThreadPoolExecutor(WORKERS) as pool:
        answers = pool.map(lambda each: asked(server.url, *each, max_tokens=16, return_token_ids=True), requests_)
        for (name, ids), answer in zip(requests_, answers, strict=True):
            alone: Alone = generate_alone(rig.models[name], ids, 16)
            assert answer["token_ids"] == alone.token_ids, name
            assert answer["logprobs"]["token_logprobs"] == pytest.approx(alone.logprobs, abs=5e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loglikelihoods_are_those_of_the_adapter(dtype: torch.dtype, most: float, serve: Serve, tmp_path: Path) -> None:
    """As lm_eval asks for them: the log-probabilities of a prompt's own tokens, against the adapter by itself."""
    rig = Rig(tmp_path, dtype)
    server = serve(rig.entries())
    pairs = list(itertools.product(["base", *NAMES], prompts(2)))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda each: asked(server.url, *each, max_tokens=1, echo=True), pairs)
        for (name, ids), answer in zip(pairs, found, strict=True):
            with torch.inference_mode(), unmerged(rig.models["base"], rig.folders.get(name)) as alone:
                logits = alone(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            expected = logits.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            scores = torch.tensor(answer["logprobs"]["token_logprobs"][1 : len(ids)])
            # Rounding grows with the numbers: a logit of 20 has steps of an eighth in bfloat16.
            assert float((scores - expected).abs().max()) < most * float(logits.abs().max()), name
