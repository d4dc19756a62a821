"""How a model's engine runs. The same dataclass is the `engine:` section of serve_config.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Options of one model's engine.

    Attributes:
        kind: `rows` (continuous batching), `one_shot` (the model's own generate), or `auto`: rows where a probe at
            load finds them equal to generate, else one_shot.
        max_rows: requests computed together at most; further ones wait.
        max_model_len: positions per request, prompt and text together; None takes the model's own.
        memory_gib: budget for KV caches and states, prefix store included; None takes it from the device.
        prefix_cache: reuse the computation of prompts that begin like an earlier one.
        prefix_cache_gib: share of the budget the prefix store may keep; None is half.
        prefill_chunk: tokens of a prompt computed between two steps of the running rows; of several whole prompts twice
            as many.
        deterministic: a row's bits never depend on its neighbours; slower.
        prompt_lookup: tokens guessed at a time from what a row has said before, while at most four rows run; for models
            whose layers all have full attention. No text changes by it. 0 guesses none.
        torch_compile: a torch.compile mode for the decode steps of rows; models with layers of other kinds than full
            attention, one_shot and deterministic mode run uncompiled, rows with a warning at load.
        cuda_graphs: capture the decode steps of rows on a GPU, where the model allows it.
        static_cache: keep the KV cache at its full length from the start; one_shot only.
        pack_linears: pack linear weights for the CPU at load; None decides by dtype and instruction set.
        threads: CPU threads of a forward; None takes the cores the replica was given.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["auto", "rows", "one_shot"] = "auto"
    max_rows: int = 16
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
        for name in ("max_rows", "max_model_len", "prefill_chunk", "threads"):
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
