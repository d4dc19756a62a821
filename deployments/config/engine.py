"""How a model's engine runs. The same dataclass is the `engine:` section of serve_config.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of one model's engine.

    Attributes:
        kind: `continuous_batching`, `generate` (the model's own `generate`), or `auto`: continuous batching if a probe
            at load finds it equal to `generate`.
        max_batch_size: maximum number of requests computed together; more requests wait.
        max_model_len: maximum number of tokens of a request, prompt and answer together (of each of them, if an encoder
            reads the prompt); None takes the model's own.
        memory_gib: memory for KV caches and states, including the prefix cache; None takes it from the device.
        prefix_cache: keep computed prompts, and reuse them for prompts that start with the same tokens.
        prefix_cache_gib: maximum size of the prefix cache; None is half of the memory.
        prefill_chunk: maximum number of prompt tokens computed between two decode steps; several whole prompts
            together can have twice as many. None is 512 on a CPU and 2048 on a GPU.
        deterministic: the bits of an answer do not depend on other requests; slower.
        prompt_lookup: draft tokens per step, taken from the sequence's own text, while at most four sequences run; for
            models whose layers all have full attention. It does not change the text. 0 is off.
        torch_compile: a torch.compile mode for decode steps; models with layers of other kinds than full attention, the
            kind `generate` and deterministic mode run uncompiled, with a warning at load.
        cuda_graphs: capture decode steps as CUDA graphs, if the model allows it.
        trace_steps: trace decode steps, which run without Python then; None does it on a CPU.
        static_cache: allocate the KV cache at its full length at the start; kind `generate` only.
        pack_linears: pack linear weights for the CPU at load; None decides by dtype and instruction set.
        threads: CPU threads of a forward; None takes the cores of the replica.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    kind: Literal["auto", "continuous_batching", "generate"] = "auto"
    max_batch_size: int = 16
    max_model_len: int | None = None
    memory_gib: float | None = None
    prefix_cache: bool = True
    prefix_cache_gib: float | None = None
    prefill_chunk: int | None = None
    deterministic: bool = False
    prompt_lookup: int = 0
    torch_compile: str | None = None
    cuda_graphs: bool = False
    trace_steps: bool | None = None
    static_cache: bool = False
    pack_linears: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_model_len", "prefill_chunk", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} should be at least 1; got {value}")
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise ValueError(f"memory_gib should be more than 0, and finite; got {self.memory_gib:g}")
        for name in ("prefix_cache_gib", "prompt_lookup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} should be at least 0, and finite; got {value:g}")
        if self.static_cache and self.kind == "continuous_batching":
            raise ValueError("static_cache needs the kind generate; its caches grow in continuous_batching")
        if self.torch_compile not in (None, *_COMPILE_MODES):
            raise ValueError(f"torch_compile should be one of {', '.join(_COMPILE_MODES)}; got {self.torch_compile!r}")
