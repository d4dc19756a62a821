"""A copy of a base with an adapter merged into its weights by PEFT, for adapters that batches cannot hold.

https://huggingface.co/docs/peft/developer_guides/model_merging
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deployments.adapters.lora_file import check_weights_file
from deployments.adapters.refused import AdapterRefused, needs_peft, peft_is_installed
from deployments.adapters.safetensors_file import read_tensors
from deployments.core.errors import last_line
from deployments.engine.verify.prompts import ordinary_ids
from deployments.engine.verify.proofs import close
from deployments.host.adapted.text_side import adapted_info
from model_loaders.contract import ModelInfo

_TOKENS = 9


def merged_info(info: ModelInfo, folder: Path) -> ModelInfo:
    """A base with an adapter merged into it, and the adapter's tokenizer and template if it has its own.

    Args:
        info: nobody else uses its model, which is changed.
        folder: of the adapter.

    Raises:
        AdapterRefused: PEFT is missing or cannot merge it, a tensor of its file would have no effect, or the merged
            model does not give what the adapter gives beside its base.
    """
    if not peft_is_installed():
        raise needs_peft("batches cannot hold it")
    if not isinstance(info.model, nn.Module):
        raise AdapterRefused("its base is not a PyTorch module, so that nothing can be merged into it.")
    if getattr(info.model, "is_quantized", False):
        raise AdapterRefused("it has to be merged, and its base is quantized; serve an unquantized base.")
    tensors = read_tensors(check_weights_file(folder))
    with warnings.catch_warnings(), torch.no_grad():
        # What PEFT only warns of is checked here.
        warnings.simplefilter("ignore")
        try:
            info.model = _merged(info.model.eval(), folder, tensors)
        except AdapterRefused:
            raise
        except Exception as error:
            raise AdapterRefused(f"PEFT cannot merge it: {last_line(error).removesuffix('!')}.") from error
    return adapted_info(info, folder) or info


def _merged(model: Any, folder: Path, tensors: dict[str, Any]) -> Any:
    from peft import PeftModel, get_peft_model_state_dict

    base = _logits(model)
    adapted = PeftModel.from_pretrained(model, str(folder))
    _check_keys(get_peft_model_state_dict(adapted, save_embedding_layers=False), adapted.state_dict(), tensors)
    expected, beside = _logits_and_others(adapted)
    inputs = {name: given for name, layer in beside.items() if (given := _input(layer.get_base_layer())) is not None}
    outputs = {name: beside[name](given) for name, given in inputs.items()}
    unchanged = [torch.equal(beside[name].get_base_layer()(given), outputs[name]) for name, given in inputs.items()]
    if torch.equal(base, expected) and all(unchanged):
        raise AdapterRefused(_without_effect(sorted(beside.keys() - inputs.keys())))
    merged = adapted.merge_and_unload(safe_merge=True).eval()
    found = _logits(merged)
    if not all(close(own, other) for own, other in zip(found, expected, strict=True)):
        raise AdapterRefused("merged, it gives other logits than beside its base.")
    for name, given in inputs.items():
        if not close(merged.get_submodule(name)(given), outputs[name]):
            raise AdapterRefused(f"merged, {name} gives other numbers than beside its base.")
    return merged.requires_grad_(False)


def _logits_and_others(adapted: Any) -> tuple[Tensor, dict[str, Any]]:
    """The logits of a text, and the modules with an adapter that a text does not need, such as an image encoder's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    named = adapted.base_model.model.named_modules()
    layers = {name: layer for name, layer in named if isinstance(layer, BaseTunerLayer)}
    called: set[str] = set()
    hooks = [layer.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, layer in layers.items()]
    logits = _logits(adapted)
    for hook in hooks:
        hook.remove()
    return logits, {name: layer for name, layer in layers.items() if name not in called}


def _input(module: Any) -> Tensor | None:
    """Random numbers that a module takes; None if its kind is not known."""
    if isinstance(module, nn.Linear):
        shape: tuple[int, ...] = (2, module.in_features)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        shape = (1, module.in_channels, *(dilation * (size - 1) + 1 for size, dilation in sizes))
    else:
        return None
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(module.weight)


def _without_effect(unknown: list[str]) -> str:
    if unknown:
        names = f"{', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''}"
        return f"a text does not need {names}, and only linears and convolutions can be tried by themselves."
    return "it changes nothing: with it, its base gives the same logits."


def _check_keys(used: dict[str, Tensor], all_tensors: dict[str, Tensor], file: dict[str, Any]) -> None:
    """Refuse a file with a tensor that is not used, or without one that is.

    Args:
        used: those of the adapter.
        all_tensors: also those of its base, of which PEFT writes embeddings too.
    """
    for key in sorted(used.keys() - file.keys()):
        raise AdapterRefused(f"its file lacks {key}.")
    for key in sorted(file.keys() - used.keys()):
        own = all_tensors.get(key)
        if own is None or not torch.equal(own, torch.from_numpy(file[key]).to(own)):
            raise AdapterRefused(f"its file has {key}, which has no effect in its base.")


def _logits(model: Any) -> Tensor:
    """Logits [tokens, vocab] of a fixed prompt."""
    ids = torch.tensor([ordinary_ids(model, _TOKENS)], device=model.device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    logits: Tensor = model(**inputs).logits[0].clone()
    return logits
