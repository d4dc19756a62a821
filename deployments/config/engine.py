"""How a model's engine runs. The same dataclass is the `engine:` section of serve_config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of one model's engine.

    Attributes:
        kind: `continuous_batching`, `generate` (the model's own `generate`), or `auto`: continuous batching if a probe
            at load finds it equal to `generate`.
        max_batch_size: requests computed together at most; further ones wait.
        max_model_len: positions per request, prompt and text together; None takes the model's own.
        memory_gib: budget for KV caches and states, prefix store included; None takes it from the device.
        prefix_cache: reuse the computation of prompts that begin like an earlier one.
        prefix_cache_gib: share of the budget the prefix store may keep; None is half.
        prefill_chunk: tokens of a prompt computed between two steps of the running sequences; twice as many if they are
            several whole prompts.
        deterministic: the bits of an answer never depend on other requests; slower.
        prompt_lookup: draft tokens at a time, taken from the sequence's own text, while at most four sequences run; for
            models whose layers all have full attention. It changes no text. 0 is off.
        torch_compile: a torch.compile mode for decode steps; models with layers of other kinds than full attention, the
            kind `generate` and deterministic mode run uncompiled, with a warning at load.
        cuda_graphs: capture decode steps on a GPU, if the model allows it.
        static_cache: keep the KV cache at its full length from the start; kind `generate` only.
        pack_linears: pack linear weights for the CPU at load; None decides by dtype and instruction set.
        threads: CPU threads of a forward; None takes the cores the replica was given.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["auto", "continuous_batching", "generate"] = "auto"
    max_batch_size: int = 16
    max_model_len: int | None = None
    memory_gib: float | None = None
    prefix_cache: bool = True
    prefix_cache_gib: float | None = None
    prefill_chunk: int = 512
    deterministic: bool = False
    prompt_lookup: int = 0
    torch_compile: str | None = None
    cuda_graphs: bool = True
    static_cache: bool = False
    pack_linears: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_model_len", "prefill_chunk", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} should be at least 1; got {value}")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ValueError(f"memory_gib should be more than 0; got {self.memory_gib:g}")
        for name in ("prefix_cache_gib", "prompt_lookup"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} should be at least 0; got {value:g}")
        if self.torch_compile not in (None, *_COMPILE_MODES):
            raise ValueError(f"torch_compile should be one of {', '.join(_COMPILE_MODES)}; got {self.torch_compile!r}")
