"""`from_pretrained` with an error if weights are missing or unexpected.

transformers fills missing weights with random numbers and lists them in a table of the log. A model with such weights
answers nonsense, which differs after every start.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.core.errors import ModelLoadFailed
from model_loaders.weights.adapter_folder import find_adapter, use_adapter
from model_loaders.weights.changeable import may_change
from model_loaders.weights.load_report import forget_reports

logger = logging.getLogger("troupe.loader")

_SHOWN = 5
# Buffers that old versions have saved and no version reads: masks of attention, rotary tables, positions.
_OLD_BUFFERS = re.compile(
    r"(\.masked_bias|rotary(_pos)?_emb\.(inv_freq|cos_cached|sin_cached)|(^|\.)position_ids|attn\.causal_mask)$"
)
_OLD_MASK = re.compile(r"(attn|attention)\.bias$")
# Parts of an encoder that only its training reads.
_TRAINING = re.compile(r"(^|\.)(pooler|seq_relationship)\.")
# Layers for multi-token prediction: their names, or how many of them follow the model's own.
_DRAFTS = re.compile(r"(^|\.)(mtp|nextn)(_layers|_block|_predict_layers)?\.")
_DRAFT_COUNTS = ("num_nextn_predict_layers", "num_mtp_modules", "num_mtp_layers", "mtp_num_layers", "n_mtp_layers")
# What quantizers write beside a packed weight, and do not always read again.
_SCALES = re.compile(
    r"(_scales?(_inv)?|_zero_points?|[._](scales|qzeros|g_idx|SCB|weight_format|weight_shape|absmax|quant_map)|"
    r"nested_(absmax|quant_map)|quant_state\.\w+)$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointOptions:
    """A loader's options for a checkpoint that does not match its model exactly.

    Attributes:
        allow_missing_keys: regular expressions; weights of the model whose names one of them matches somewhere may be
            missing from the checkpoint, or of another size there. They are random.
        allow_unexpected_keys: the same for weights of the checkpoint that the model does not have. They are not used.
        adapter: "use" or "ignore" the PEFT adapter that lies beside the weights.
    """

    allow_missing_keys: Sequence[str] | str = ()
    allow_unexpected_keys: Sequence[str] | str = ()
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.adapter not in (None, "use", "ignore"):
            raise ModelLoadFailed(f"adapter is {self.adapter!r}; write use or ignore.")
        for name in ("allow_missing_keys", "allow_unexpected_keys"):
            for pattern in _patterns(getattr(self, name)):
                _check_pattern(name, pattern)


class IncompleteCheckpoint(ModelLoadFailed):
    """The checkpoint's weights are not those of the model's class.

    Attributes:
        lacks_head: everything that is missing lies outside the base model.
    """

    lacks_head = False


def load_checkpoint(model_class: Any, name: str, options: CheckpointOptions | None = None, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(name, **kwargs)`, refused if weights are missing, of another size or left over.

    Keys that transformers itself ignores, tied weights and what `options` allow are not faults.

    Args:
        model_class: a transformers model class or Auto class.
        name: Hub id or local folder.

    Raises:
        IncompleteCheckpoint: it lists the keys.
        ModelLoadFailed: an adapter lies beside the weights, and `options` do not say whether to use it.
    """
    options = options or CheckpointOptions()
    adapter = find_adapter(name, kwargs.get("revision"), options.adapter)
    if adapter is not None:
        kwargs["adapter_kwargs"] = adapter.skipped
    random_sizes = bool(kwargs.pop("ignore_mismatched_sizes", False))
    kwargs.pop("output_loading_info", None)
    if may_change(name) and not kwargs.get("trust_remote_code"):
        kwargs.setdefault("disable_mmap", True)
    loaded = model_class.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    # A class of remote code may have a `from_pretrained` of its own, which tells nothing.
    if not isinstance(loaded, tuple):
        return loaded
    model, found = loaded
    forget_reports()
    _check(model, name, found, options, random_sizes)
    return use_adapter(model, adapter) if adapter is not None and options.adapter == "use" else model


def _check(model: Any, name: str, found: dict[str, Any], options: CheckpointOptions, random_sizes: bool) -> None:
    kind = type(model).__name__
    missing = {key: "missing" for key in found["missing_keys"] if not _is_unused(model, key)}
    sizes = {
        key: f"{_size(there)} in the checkpoint, {_size(here)} here" for key, there, here in found["mismatched_keys"]
    }
    absent = {**missing, **sizes}
    allowed = options.allow_missing_keys
    refused = {
        key: why for key, why in absent.items() if not (_matches(allowed, key) or (random_sizes and key in sizes))
    }
    left_over = [key for key in found["unexpected_keys"] if not _is_harmless(model, key, complete=not absent)]
    foreign = [key for key in left_over if not _matches(options.allow_unexpected_keys, key)]
    if refused or foreign:
        raise _incomplete(model, name, refused, foreign, sizes)
    if absent:
        logger.warning("%s: %s of %s are random, as allowed: %s", name, _count(absent), kind, _listed(sorted(absent)))
    if left_over:
        logger.warning("%s: %s unused by %s, as allowed: %s", name, _count(left_over), kind, _listed(sorted(left_over)))


def _incomplete(
    model: Any, name: str, refused: dict[str, str], foreign: list[str], sizes: dict[str, str]
) -> IncompleteCheckpoint:
    parts, fixes = [], []
    missing = sorted(refused.keys() - sizes.keys())
    if missing:
        parts.append(f"Missing from the checkpoint, so random: {_listed(missing)}.")
    wrong = sorted(refused.keys() & sizes.keys())
    if wrong:
        parts.append(f"Of another size, so random: {_listed([f'{key} ({sizes[key]})' for key in wrong])}.")
    if refused:
        fixes.append("allow_missing_keys: [...]")
    if foreign:
        parts.append(f"In the checkpoint, but not in the model: {_listed(sorted(foreign))}.")
        fixes.append("allow_unexpected_keys: [...]")
    error = IncompleteCheckpoint(
        f"The weights in {name} are not those of {type(model).__name__}. {' '.join(parts)} Load the class they were "
        "saved from, or correct the keys. To load them all the same, put regular expressions that match the keys into "
        f"the loader's kwargs: {{{', '.join(fixes)}}}."
    )
    error.lacks_head = bool(refused) and not any(_in_base(model, key) for key in refused)
    return error


def _is_unused(model: Any, key: str) -> bool:
    """Whether nothing that is served reads a weight: the pooler of a model without a head, which is for training."""
    return _TRAINING.search(key) is not None and not hasattr(model, "generate")


def _is_harmless(model: Any, key: str, *, complete: bool) -> bool:
    """Whether a key of the checkpoint that the model does not have says nothing against the two fitting together."""
    return (
        _is_buffer(model, key)
        or _is_draft_layer(model, key)
        or (getattr(model, "hf_quantizer", None) is not None and _SCALES.search(key) is not None)
        or (complete and _is_head(model, key))
    )


def _is_buffer(model: Any, key: str) -> bool:
    """Whether it is a buffer that the model computes by itself and an older version has saved."""
    buffers, names = dict(model.named_buffers()), (key, *_without_prefix(model, key))
    return _OLD_BUFFERS.search(key) is not None or any(name in buffers or _is_mask(model, name) for name in names)


def _is_mask(model: Any, key: str) -> bool:
    """Whether it is the mask of an attention module, not the bias of a layer that has that name."""
    module = dict(model.named_modules()).get(key.removesuffix(".bias")) if _OLD_MASK.search(key) else None
    return module is not None and not hasattr(module, "weight")


def _is_draft_layer(model: Any, key: str) -> bool:
    """Whether it belongs to the layers for multi-token prediction, which follow the model's own."""
    if _DRAFTS.search(key) is not None:
        return True
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "num_hidden_layers", None)
    drafts = max((count for name in _DRAFT_COUNTS if isinstance(count := getattr(config, name, 0), int)), default=0)
    found = re.search(r"(^|\.)layers\.(\d+)\.", key)
    return isinstance(layers, int) and found is not None and layers <= int(found[2]) < layers + drafts


def _is_head(model: Any, key: str) -> bool:
    """Whether it belongs to a head that the model does without.

    A model that generates nothing gives the hidden states of its base model, whatever head lies on it.
    """
    if _TRAINING.search(key) is not None:
        return True
    base, names = model.base_model, (key, *_without_prefix(model, key))
    if base is not model and (hasattr(model, "generate") or len(names) > 1):
        return False
    own = {name for name, _ in base.named_children()} | {name for name, _ in base.named_parameters(recurse=False)}
    return all(name.partition(".")[0] not in own for name in names)


def _in_base(model: Any, key: str) -> bool:
    """Whether it is a weight of the base model, not of the head on it."""
    return model.base_model is model or any(_without_prefix(model, key))


def _without_prefix(model: Any, key: str) -> Iterable[str]:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return [key.removeprefix(prefix)] if len(prefix) > 1 and key.startswith(prefix) else []


def _patterns(given: Sequence[str] | str) -> Sequence[str]:
    return [given] if isinstance(given, str) else given


def _matches(patterns: Sequence[str] | str, key: str) -> bool:
    return any(re.search(pattern, key) for pattern in _patterns(patterns))


def _check_pattern(name: str, pattern: object) -> None:
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise ModelLoadFailed(f"{name}: {pattern!r} is not a regular expression ({error}).") from error


def _count(keys: Iterable[str]) -> str:
    count = len(list(keys))
    return f"{count} weight{'' if count == 1 else 's'}"


def _listed(keys: Sequence[str]) -> str:
    """The first keys, and how many there are."""
    shown = ", ".join(keys[:_SHOWN])
    return f"{len(keys)} weights, the first {_SHOWN} are {shown}" if len(keys) > _SHOWN else f"{_count(keys)} ({shown})"


def _size(shape: Sequence[int]) -> str:
    return str(list(shape))
