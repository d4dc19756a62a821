"""`adapter_config.json` of a PEFT adapter: what it says of a LoRA, and which adapters are something else.

https://huggingface.co/docs/peft/package_reference/lora#peft.LoraConfig
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deployments.adapters.refused import AdapterRefused, NeedsMerge

CONFIG_FILE = "adapter_config.json"
_MERGE = "merge it with PEFT (merge_and_unload) and serve the merged folder"
_ANY_VALUE = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config"),
        *("exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform"),
        *("lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "peft_type", "peft_version", "r", "rank_pattern"),
        *("alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "loftq_config"),
        *("init_lora_weights", "qalora_group_size", "bias", "use_dora", "modules_to_save", "trainable_token_indices"),
    }
)
"""Keys that are read, or that change nothing once an adapter is trained."""
_NAMED = {
    "layer_replication": "it repeats layers of its base (layer_replication)",
    "alora_invocation_tokens": "it starts in the middle of a prompt (alora_invocation_tokens)",
    "arrow_config": "it routes between adapters (arrow_config)",
    "use_qalora": "it uses QALoRA (use_qalora)",
    "megatron_config": "it is for Megatron's layers (megatron_config)",
}
_MERGED = {
    "ensure_weight_tying": "it ties what it changes (ensure_weight_tying)",
    "target_parameters": "it changes parameters that are not of a module, such as fused experts (target_parameters)",
}
"""Options that batches cannot hold, and PEFT can merge."""
_UNMERGED = ("layer_replication", "alora_invocation_tokens", "arrow_config", "megatron_config")
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")
_TASKS = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")
_LAYER = r".*\.[^.]*\.(\d+)\."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What a LoRA's configuration says.

    Attributes:
        base: the model that it was trained on, as the trainer called it.
        rank, alpha: of its matrices; `rank_pattern` and `alpha_pattern` have those of single modules.
        rslora: the product is scaled by alpha / sqrt(rank) in place of alpha / rank.
        bias: the second matrix has a bias.
        saved: endings of the names of modules that were trained whole.
        dora: the length of each row of the weight is set anew (https://arxiv.org/abs/2402.09353).
        targets: names of modules, a regular expression, or "all-linear".
        exclude: names of modules, or a regular expression, that are left out of the targets.
        layers: numbers of the layers whose modules are targets; None for all.
        layers_pattern: names of the lists that have the layers.
        tokens: token ids whose vectors were trained, by endings of the names of their modules; an empty name is the
            input embedding.
    """

    base: str | None = None
    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    bias: bool = False
    dora: bool = False
    saved: tuple[str, ...] = ()
    targets: str | tuple[str, ...] = ()
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module's matrices."""
        return self.rank_pattern.get(_key_of(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by."""
        alpha = self.alpha_pattern.get(_key_of(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def named_targets(self) -> tuple[str, ...]:
        """The targets that are names of modules."""
        return self.targets if isinstance(self.targets, tuple) else ()

    def is_target(self, module: str) -> bool:
        """Whether a linear of this name was trained. All linears are, if the targets are "all-linear"."""
        if _named(self.exclude, module):
            return False
        if self.targets == "all-linear":
            return True
        return _named(self.targets, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self.layers is None or module in self.named_targets():
            return True
        patterns = [rf".*\.{name}\.(\d+)\." for name in self.layers_pattern] or [_LAYER]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers


def _named(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _key_of(patterns: Mapping[str, Any], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_lora_config(folder: Path) -> LoraConfig:
    """The configuration of the adapter in a folder.

    Raises:
        NeedsMerge: it has to be merged into a copy of its base; the reason names the option.
        AdapterRefused: it cannot be served; the same.
    """
    try:
        given = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterRefused(f"its folder has no {CONFIG_FILE}.") from None
    except (OSError, ValueError) as error:
        raise AdapterRefused(f"{CONFIG_FILE} cannot be read: {error}.") from error
    if not isinstance(given, dict):
        raise AdapterRefused(f"{CONFIG_FILE} is not a JSON object.")
    _check_kind(given)
    _check_options(given)
    try:
        return _config(given)
    except (TypeError, ValueError, re.error) as error:
        raise AdapterRefused(f"{CONFIG_FILE} has a value that cannot be used: {error}.") from error


def _check_kind(given: Mapping[str, Any]) -> None:
    kind, task = given.get("peft_type"), given.get("task_type")
    if kind == "ADALORA":
        raise NeedsMerge("its type is ADALORA")
    if kind != "LORA":
        named = f"its type is {kind}" if kind else f"{CONFIG_FILE} has no peft_type"
        raise AdapterRefused(f"{named}; LORA is the type that is served. If PEFT can merge it, {_MERGE}.")
    if task not in _TASKS:
        raise AdapterRefused(f"its task is {task}, which has a head of its own; text needs CAUSAL_LM or SEQ_2_SEQ_LM.")


def _check_options(given: Mapping[str, Any]) -> None:
    for key, named in _MERGED.items():
        if given.get(key):
            raise NeedsMerge(named)
    for key, named in _NAMED.items():
        if given.get(key):
            fix = "it needs the library that it was trained with" if key in _UNMERGED else _MERGE
            raise AdapterRefused(f"{named}; {fix}.")
    if given.get("bias", "none") != "none":
        raise NeedsMerge(f"it changes the biases of its base (bias: {given['bias']})")
    start = given.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterRefused(
            f"its start changed the weights of its base (init_lora_weights: {start}); convert it with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    unknown = sorted(key for key, value in given.items() if key not in {*_ANY_VALUE, *_NAMED, *_MERGED} and value)
    if unknown:
        raise AdapterRefused(f"{CONFIG_FILE} has the option {unknown[0]}, which is unknown here; {_MERGE}.")


def _config(given: Mapping[str, Any]) -> LoraConfig:
    targets, layers = given.get("target_modules"), given.get("layers_to_transform")
    config = LoraConfig(
        base=given.get("base_model_name_or_path"),
        rank=int(given.get("r", 8)),
        alpha=float(given.get("lora_alpha", 8)),
        rslora=bool(given.get("use_rslora")),
        bias=bool(given.get("lora_bias")),
        dora=bool(given.get("use_dora")),
        saved=tuple(given.get("modules_to_save") or ()),
        targets=targets if isinstance(targets, str) else tuple(targets or ()),
        exclude=_names(given.get("exclude_modules")),
        layers=None if layers is None else tuple([layers] if isinstance(layers, int) else layers),
        layers_pattern=tuple([pattern] if isinstance(pattern := given.get("layers_pattern"), str) else pattern or ()),
        rank_pattern={str(key): int(rank) for key, rank in (given.get("rank_pattern") or {}).items()},
        tokens=_tokens(given.get("trainable_token_indices")),
        alpha_pattern={str(key): float(alpha) for key, alpha in (given.get("alpha_pattern") or {}).items()},
    )
    if config.dora and config.bias:
        raise ValueError("use_dora and lora_bias do not go together")
    if not config.targets:
        raise ValueError("target_modules is empty")
    if min([config.rank, *config.rank_pattern.values()]) < 1:
        raise ValueError(f"r is {config.rank}; a rank is at least 1")
    config.is_target("x")  # Its regular expressions can be read.
    config.scale_of("x")
    return config


def _tokens(given: Any) -> dict[str, tuple[int, ...]]:
    named = given if isinstance(given, dict) else {"": given} if given else {}
    return {str(name): tuple(map(int, ids)) for name, ids in named.items()}


def _names(value: Any) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value or ())
