"""The bundled demo model: a small Llama whose weights lie beside this file.

It repeats strings, reverses words, adds two-digit numbers, looks up values and plays an agent in small text worlds;
see MODEL_CARD.md. `tasks` and `worlds` make prompts whose right answers are known, without importing torch.
"""

from __future__ import annotations

from pathlib import Path

from model_loaders.contract import ModelInfo

WEIGHTS = Path(__file__).parent / "weights"


def load_model(device: str = "cpu", dtype: str = "float32") -> ModelInfo:
    """Load the demo model.

    Args:
        device: a torch device.
        dtype: "float32" (answers are then the same whatever runs beside them), "bfloat16" or "float16".

    Raises:
        ValueError: `dtype` is none of the three.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model_loaders.weights.checkpoint import load_checkpoint

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(dtypes)}")
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
    model = load_checkpoint(AutoModelForCausalLM, str(WEIGHTS), dtype=dtypes[dtype], local_files_only=True)
    return ModelInfo(model_name="demo", model=model.to(device).eval(), tokenizer=tokenizer)
