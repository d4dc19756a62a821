"""Selects the transformers class that a checkpoint is loaded with."""

from __future__ import annotations

import copy
import importlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from deployments.core.errors import ModelLoadFailed, last_line

logger = logging.getLogger("troupe.loader")

# Tried in this order: the first whose mapping has the model's config.
_AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForMultimodalLM",
    "AutoModel",
)


def model_class(config: Any, *, trusted: bool = False) -> Any:
    """The class that a checkpoint's config declares, else an Auto class that knows the config.

    A class of another model type is not taken: it would read the config's fields in its own way, or not at all.
    A class without a head is taken as it is declared: it gives embeddings. If the model's head is nothing but its tied
    embedding, a base model is a complete language model, and the class with the head is taken.

    Args:
        trusted: the checkpoint's own code may run. It is taken also where transformers has a class of that name.

    Raises:
        ModelLoadFailed: there is none.
    """
    own = _remote(config) or next(_mapped(config), None)
    if trusted and own is not None:
        return own
    declared = list(_declared(config))
    headless = [found for found in declared if not hasattr(found, "generate")]
    found = next((each for each in declared if each not in headless), None) or _remote(config)
    if found is None and headless:
        found = (_with_tied_head(config, headless[0]) if _is_base(config, headless[0]) else None) or headless[0]
    found = found or next(_known(config), None)
    if found is None:
        raise ModelLoadFailed(
            f"No Auto class knows model type {config.model_type!r}; name one with auto_class, or write a loader."
        )
    if own not in (None, found):
        text = "The checkpoint has code of its own for %s, which is not run: set trust_remote_code: true to use it."
        logger.warning(text, found.__name__)
    return found


def embedding_class(config: Any, *, trusted: bool = False) -> Any:
    """The class without a head that a checkpoint's config declares, else the Auto class of base models.

    Args:
        trusted: see `model_class`.
    """
    if trusted and "AutoModel" in _auto_map(config):
        return transformers.AutoModel
    return next((found for found in _declared(config) if not hasattr(found, "generate")), transformers.AutoModel)


def has_pretraining_head(config: Any, found: Any) -> bool:
    """Whether a class is an encoder with the head of its pretraining, which embeddings do without."""
    mappings = (transformers.AutoModelForMaskedLM._model_mapping, transformers.AutoModelForPreTraining._model_mapping)
    return not hasattr(found, "generate") and any(
        type(config) in mapping and mapping[type(config)] is found for mapping in mappings
    )


def takes_part(config: Any, found: Any) -> bool:
    """Whether a class is of one part of a composite model, such as the text side of CLIP."""
    own = getattr(found, "config_class", None)
    return isinstance(own, type) and any(
        isinstance(getattr(config, name, None), own) for name in getattr(config, "sub_configs", ())
    )


def named_class(name: str) -> Any:
    """A class of transformers, or package.Class.

    Raises:
        ModelLoadFailed: there is none of that name.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module) if module else transformers, attribute, None)
    except ImportError as error:
        raise ModelLoadFailed(f"auto_class {name!r}: {last_line(error)}") from error
    if found is None:
        place = module or f"transformers {transformers.__version__}"
        raise ModelLoadFailed(f"auto_class {attribute!r} is not a class of {place}.")
    return found


def _declared(config: Any) -> Iterator[Any]:
    """The classes of transformers that a config declares, but for those of another model type."""
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
            continue
        if _is_foreign(config, found):
            text = "The config's architectures name %s, not a class of its model_type %s: that of the type is used."
            logger.warning(text, architecture, config.model_type)
        else:
            yield found


def _is_foreign(config: Any, found: Any) -> bool:
    """Whether a class is of another model type than a config that transformers knows."""
    own = getattr(found, "config_class", None)
    fits = not isinstance(own, type) or isinstance(config, own) or takes_part(config, found)
    return not fits and next(_known(config), None) is not None


def _remote(config: Any) -> Any:
    """The Auto class under which the checkpoint's own code has the class that the config declares."""
    names = getattr(config, "architectures", None) or ()
    for auto, code in _auto_map(config).items():
        if isinstance(code, str) and code.rpartition(".")[2] in names and hasattr(transformers, auto):
            return getattr(transformers, auto)
    return None


def _mapped(config: Any) -> Iterator[Any]:
    """Auto classes of models that generate for which the checkpoint has a class of its own."""
    names = (name for name in _AUTO_CLASSES[:-1] if name in _auto_map(config) and hasattr(transformers, name))
    return (getattr(transformers, name) for name in names)


def _auto_map(config: Any) -> dict[str, Any]:
    """The checkpoint's own classes, by Auto class."""
    found: dict[str, Any] = getattr(config, "auto_map", None) or {}
    return found


def _known(config: Any) -> Iterator[Any]:
    """Auto classes that know a config. An encoder, alone or with a decoder, is not a decoder."""
    remote = _auto_map(config)
    masked = type(config) in transformers.AutoModelForMaskedLM._model_mapping
    encodes = getattr(config, "is_encoder_decoder", False) or (masked and getattr(config, "is_decoder", None) is False)
    for name in _AUTO_CLASSES:
        candidate = getattr(transformers, name, None)
        if candidate is None or (name == "AutoModelForCausalLM" and encodes and name not in remote):
            continue
        if name in remote or type(config) in candidate._model_mapping:
            yield candidate


def _is_base(config: Any, declared: Any) -> bool:
    """Whether a class is the base model of its config."""
    mapping = transformers.AutoModel._model_mapping
    return type(config) in mapping and mapping[type(config)] is declared


def _with_tied_head(config: Any, base: Any) -> Any:
    """The class with a head for a base model whose weights are all that the head needs; None if there is none."""
    if not getattr(config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return None
    auto = next(_known(config))
    if auto is transformers.AutoModel:
        return None
    with torch.device("meta"):
        own, model = base(copy.deepcopy(config)).state_dict(), auto.from_config(copy.deepcopy(config))
    present = {*own, *(f"{model.base_model_prefix}.{key}" for key in own)}
    present |= model.all_tied_weights_keys.keys() | dict(model.named_buffers()).keys()
    return type(model) if present.issuperset(model.state_dict()) else None
