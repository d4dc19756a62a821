"""The argument under which a model's forward takes its cache, found by what it is and not by its name.

Versions of transformers name it differently, and code that comes with a checkpoint keeps the name of its day. So the
parameter whose type is a cache is looked for, then the known names, then a small forward is tried.
`generate` uses one name for all models: `take_generate_cache` lets a model of another name run in it.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from deployments.engine.library.transformers_internals import (
    CACHE_NAMES,
    Cache,
    DynamicCache,
    generate_cache_name,
    is_library_class,
)
from deployments.engine.model.fresh_state import fresh_state

_TYPE = re.compile(r"\b(Dynamic|Static|EncoderDecoder)?Cache\b")
# What a forward takes beside its cache: never tried with one.
_OTHERS = re.compile("ids|mask|embeds|labels|pixel|image|video|audio|feature|output|return|use_|logits|position")


def cache_argument(model: Any) -> str | None:
    """The name of the argument of a model's forward that takes a cache; None if none does.

    The forward is run on two tokens, at most once for each optional parameter, if neither types nor names decide it.
    """
    found = _named(model.forward)
    if len(found) == 1:
        return found[0]
    parameters = inspect.signature(model.forward).parameters
    if not found and any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        # What it hands on goes to the forward of a base class or of a model inside.
        found = list(dict.fromkeys(name for forward in _inner_forwards(model) for name in _named(forward)))
        found = found or [generate_cache_name()]
    left = [name for name, p in parameters.items() if p.default is None and not _OTHERS.search(name)]
    tried = list(dict.fromkeys([*found, *left]))
    if found and len(tried) == 1:
        return found[0]
    return next((name for name in tried if _fills(model, name)), found[0] if found else None)


def argument_of(function: Callable[..., Any]) -> str:
    """The argument under which a function takes a cache; `generate`'s own name if none shows."""
    return next(iter(_named(function)), generate_cache_name())


def take_generate_cache(model: Any) -> None:
    """Let an instance's forward and its preparation of inputs take the cache under the name that `generate` uses.

    Nothing changes for models of transformers' own. The output gets the cache under that name too.
    """
    if is_library_class(type(model)):
        return
    given = generate_cache_name()
    own = cache_argument(model)
    if own is None:
        return
    vars(model)["forward"] = _renamed(model.forward, given, own, _with_cache)
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    names = _named(prepare) if prepare is not None else []
    if prepare is not None and names and given not in names:
        vars(model)["prepare_inputs_for_generation"] = _renamed(prepare, given, names[0])


def accept_old_fields(model: Any) -> None:
    """Let output classes of a checkpoint's code hold a cache under a name of old.

    From 5.24 on transformers renames what such a class is made of, but not its fields, so that it cannot be made.
    """
    if not isinstance(model, nn.Module):
        return
    given = generate_cache_name()
    kinds = {kind for module in model.modules() for kind in type(module).__mro__ if not is_library_class(kind)}
    for name in {kind.__module__ for kind in kinds}:
        for output in vars(sys.modules.get(name, object)).values():
            if isinstance(output, type) and issubclass(output, ModelOutput) and output.__module__ == name:
                _rename_field(output, given)


def _rename_field(output: Any, given: str) -> None:
    names = {field.name for field in fields(output)} if is_dataclass(output) else set()
    old = next((name for name in CACHE_NAMES if name in names and name != given), None)
    if old is None or given in names or not _refuses(output, old):
        return
    make = inspect.unwrap(output.__init__)
    known = output.__dataclass_fields__
    known[old].name = given
    output.__dataclass_fields__ = {given if name == old else name: field for name, field in known.items()}

    @functools.wraps(make)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{old if name in (given, old) else name: value for name, value in kwargs.items()})

    # Past the metaclass, whose way of renaming is what fails.
    type.__setattr__(output, "__init__", renamed)
    type.__setattr__(output, given, None)
    if old in vars(output):
        type.__delattr__(output, old)


def _refuses(output: Any, name: str) -> bool:
    try:
        output(**{name: DynamicCache()})
    except TypeError:
        return True
    return False


def _renamed(
    function: Callable[..., Any], given: str, own: str, after: Callable[[Any, str], Any] | None = None
) -> Callable[..., Any]:
    """A function that takes under one more name what it takes under its own."""

    @functools.wraps(function)
    def renamed(*args: Any, **kwargs: Any) -> Any:
        if given != own and given in kwargs:
            value = kwargs.pop(given)
            if kwargs.get(own) is None:
                kwargs[own] = value
        result = function(*args, **kwargs)
        return result if after is None else after(result, given)

    renamed.__module__ = __name__  # `listeners` knows by it whose this is.
    return renamed


def _with_cache(output: Any, given: str) -> Any:
    """A model's output, its cache under the name that `generate` looks for."""
    if isinstance(output, MutableMapping) and given not in output:
        found = next((value for value in output.values() if isinstance(value, Cache)), None)
        if found is not None:
            output[given] = found
    return output


def _named(function: Any) -> list[str]:
    """The parameters that take a cache by their type or default, else by their name."""
    parameters = inspect.signature(function).parameters
    types = _types(function)
    typed = [
        name
        for name, parameter in parameters.items()
        if _is_cache(types.get(name, parameter.annotation)) or isinstance(parameter.default, Cache)
    ]
    if len(typed) == 1:
        return typed
    known = [name for name in CACHE_NAMES if name in (typed or parameters)]
    return known[:1] or typed


def _types(function: Any) -> Mapping[str, Any]:
    try:
        return typing.get_type_hints(inspect.unwrap(getattr(function, "__func__", function)))
    except Exception:
        return {}


def _is_cache(annotation: Any) -> bool:
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    if isinstance(annotation, str):
        return bool(_TYPE.search(annotation))
    return any(_is_cache(part) for part in typing.get_args(annotation))


def _inner_forwards(model: Any) -> Iterator[Any]:
    for kind in type(model).__mro__:
        if "forward" in vars(kind):
            yield vars(kind)["forward"]
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is not None and decoder is not model:
        yield decoder.forward
    for module in model.modules():
        if module is not model:
            yield module.forward


def _fills(model: Any, name: str) -> bool:
    """Whether a forward of two tokens puts something in a cache that it is given under a name."""
    fresh = fresh_state(model)
    try:
        device = model.get_input_embeddings().weight.device
        # Padding in a prompt would be a warning.
        ids = [i for i in (1, 2, 3) if i != getattr(model.config, "pad_token_id", None)][:2]
        held = DynamicCache(config=model.config.get_text_config(decoder=True))
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids], device=device), **{name: held})
        return any(getattr(layer, "is_initialized", False) for layer in held.layers)
    except Exception:
        return False
    finally:
        fresh.reset()
