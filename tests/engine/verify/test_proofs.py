"""One table of what is proved when a model loads, one line in the log, and no more forwards than that takes."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.config.engine import EngineOptions
from deployments.config.model import ModelEntry
from deployments.engine.verify.proofs import TABLE, Proof
from deployments.host.loaded_model import LoadedModel
from model_loaders.contract import ModelInfo
from tests.engine.architectures import encoder_decoder
from tests.engine.running import built_engine, model_info
from tests.tiny import byte_tokenizer, llama, mistral

ROOT = Path(__file__).parents[3]


def as_row(proof: Proof) -> str:
    tolerance = proof.tolerance
    limits = " / ".join(f"{limit:g}" for limit in (tolerance.float32, tolerance.float16, tolerance.bfloat16))
    compared = tolerance.of if not tolerance.float32 else f"{tolerance.of}: {limits}"
    lengths = ", ".join(map(str, proof.lengths)) or "–"
    return f"| {proof.name} | {proof.claim} | {compared} | {lengths} | `{proof.module}` |"


def test_the_page_shows_the_table() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    for proof in TABLE:
        assert as_row(proof) in page
        assert (ROOT / proof.module).is_file()


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (
            llama,
            {},
            "forward (logits within 0.001): chunks, pads, mixes, N s; "
            "inside (logits within 0.001): 31 of 32 modules, N s; "
            "the answers of generate (log-probabilities within 0.0001): 5 prompts, N s",
        ),
        (
            lambda: llama().to(torch.bfloat16),
            {"pack_linears": False, "deterministic": True, "max_batch_size": 4},
            "forward (logits within 0.2): chunks, pads, mixes, N s; inside (logits within 0.2): 31 of 32 modules, N s; "
            "deterministic mode (the same bits): together, N s; "
            "the answers of generate (log-probabilities within 0.03): 5 prompts, N s",
        ),
        (
            mistral,
            {},
            "forward (logits within 0.001): chunks, pads, mixes beyond 64 tokens, N s; "
            "inside (logits within 0.001): 31 of 32 modules, N s; "
            "the answers of generate (log-probabilities within 0.0001): 7 prompts, N s",
        ),
        (
            llama,
            {"kind": "generate"},
            "generate in batches (log-probabilities within 0.0001): together, N s; "
            "generate beyond lengths (logits within 0.001): together, N s; "
            "generate resumed (log-probabilities within 0.0001): yes, N s",
        ),
    ],
    ids=["decoder", "deterministic", "window", "generate"],
)
def test_a_load_writes_one_line(
    make: Any, options: dict[str, Any], expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    entry = ModelEntry(id="tiny", loader="tests:none", engine=EngineOptions(memory_gib=0.1, **options))
    hook = {"decode": lambda ids: " ".join(map(str, ids.tolist()))}
    with caplog.at_level(logging.INFO):
        model = LoadedModel(entry, ModelInfo(model=make(), tokenizer=byte_tokenizer(), **hook))
    model.close()
    (line,) = [record.getMessage() for record in caplog.records if "was checked at load" in record.getMessage()]
    line = re.sub(r"\d+\.\d\d s", "N s", line)
    assert line == f"Model tiny was checked at load in N s: hooks (types and shapes): encode, decode, N s; {expected}."


@pytest.mark.parametrize(
    ("make", "options", "forwards", "tokens"),
    [
        (llama, {}, 73, 470),
        (mistral, {}, 107, 1500),
        (lambda: encoder_decoder("t5"), {}, 68, 165),
        (llama, {"kind": "generate"}, 33, 596),
    ],
    ids=["decoder", "window", "encoder-decoder", "generate"],
)
def test_forwards_of_a_load(make: Any, options: dict[str, Any], forwards: int, tokens: int) -> None:
    """A proof that is added costs every load. How requests meet in a step varies a little."""
    model = make()
    computed: list[int] = []
    embedding = model.get_decoder().get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: computed.append(args[0].numel()))
    built_engine(model_info(model), **options).close(5.0)
    assert len(computed) <= forwards
    assert sum(computed) <= tokens
