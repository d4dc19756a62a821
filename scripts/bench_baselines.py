"""What the engine is compared with: the same stock model in a bare loop, in generate, in continuous batching."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM

from deployments.engine.model.cache_argument import argument_of

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    "88m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
KEY_HEADS = {"tiny": 2, "88m": 4, "1b": 8, "8b": 8}
VOCAB = {"tiny": 512, "88m": 8192, "1b": 128256, "8b": 128256}
Run = Callable[[list[list[int]], int], None]
T = TypeVar("T")


def apart(function: Callable[[], T]) -> T:
    """Run in a thread that ends, as the server loads models: torch's threads under it end, too.

    Where a process has more of them than cores, all wait for each other asleep: a decode step takes a third longer.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def build_model(size: str, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A Llama with random weights, built where it is to be."""
    config = LlamaConfig(
        **SIZES[size],
        vocab_size=VOCAB[size],
        num_key_value_heads=KEY_HEADS[size],
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def bandwidth(device: str) -> float:
    """Bytes per second read from memory, the best of several sums over 512 MiB (4 GiB on a GPU)."""
    data = torch.ones((4 << 30 if device.startswith("cuda") else 512 << 20) // 4, device=device)
    best = float("inf")
    for _ in range(7):
        synchronize(device)
        start = time.perf_counter()
        data.sum()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def bare_loop(model: Any, device: str) -> Run:
    """Prefill and decode of equally long prompts with the stock cache and an argmax: no code around the model."""

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=device)
        name, cache = argument_of(model.forward), DynamicCache(config=model.config)
        logits = model(input_ids=ids, **{name: cache}, use_cache=True, logits_to_keep=1).logits
        for _ in range(new - 1):
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits = model(input_ids=token, **{name: cache}, use_cache=True).logits
            token.tolist()
        logits[:, -1].argmax(-1).tolist()

    return run


def padded_generate(model: Any, device: str) -> Run:
    """`model.generate` for the batch, as a script that pads its prompts would call it."""

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts, device=device)
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()

    return run


@contextmanager
def continuous_batching(model: Any, rows: int, positions: int, at_once: int) -> Iterator[Run]:
    """transformers' continuous batching, sized by hand: its defaults take most of the memory of a CPU.

    Args:
        rows: requests of a run.
        positions: tokens of each, prompt and text together.
        at_once: requests in one forward at most.
    """
    from transformers import ContinuousBatchingConfig

    page = 64
    sizes: dict[str, Any] = {
        "num_blocks": (rows + 1) * (-(-positions // page) + 1),
        "max_batch_tokens": 512,
        "max_requests_per_batch": at_once,
        "allow_block_sharing": False,
        "auto_switch_to_flash": False,
    }
    known = ContinuousBatchingConfig.__dataclass_fields__
    sizes = {key: value for key, value in sizes.items() if key in known}
    sizes["page_size" if "page_size" in known else "block_size"] = page
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=8)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=ContinuousBatchingConfig(**sizes)
    ) as manager:

        def run(prompts: list[list[int]], new: int) -> None:
            left = len(prompts)
            manager.add_requests(inputs=prompts, max_new_tokens=new)
            while left:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise SystemExit("Continuous batching stopped.")
                if result is not None and result.is_finished():
                    assert len(result.generated_tokens) == new, result.error
                    left -= 1

        yield run
