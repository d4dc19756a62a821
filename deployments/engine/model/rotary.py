"""Rotary frequencies of each sequence's own length.

Some rotary embeddings choose their frequencies by the longest position of a forward: dynamic NTK, LongRoPE. In a batch,
in a prompt computed in chunks, or after a longer prompt, a sequence then gets frequencies that it does not get by
itself. Here such a module is asked once for every length that matters in a forward, in the state it had after loading,
with one position more that stands for the length; each token takes what its own length gives.

Modules are found by trying them, not by their names: the first positions of a prompt are computed with and without a
far one.
"""

from __future__ import annotations

import bisect
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.library.transformers_internals import DynamicCache
from deployments.engine.model.cache_argument import argument_of
from deployments.engine.model.fresh_state import FreshState, fresh_state

Lengths = Sequence[Sequence[int]]
"""For each token of each sequence of a forward: the length whose frequencies it gets."""

_PLACES = ("position_ids", "positions")
_OUTER = "rotary_of_its_own"


class UnknownRotary(RuntimeError):
    """A model's frequencies follow the length of a sequence in a way that batches cannot reproduce."""


@dataclass(frozen=True, slots=True)
class Regime:
    """How frequencies follow the length of a sequence.

    Attributes:
        first: the least length that changes them.
        steps: every longer length changes them again (dynamic NTK), not only the first (LongRoPE).
    """

    first: int
    steps: bool

    def at(self, length: int) -> int:
        """The same number for all lengths with the same frequencies."""
        return min(length, self.first) if not self.steps and length >= self.first else max(length, self.first - 1)


class SequenceRotary:
    """The rotary embeddings of a model, each token with the frequencies of its own sequence.

    Outside `for_lengths` a sequence's length is its largest position plus one, as in a forward of that sequence alone.

    Args:
        model: any model. Its modules stay changed; another `SequenceRotary` of the same model takes them over.
        limit: the longest sequence.

    Attributes:
        depends: whether frequencies follow the length at all, up to the limit.
    """

    def __init__(self, model: Any, limit: int) -> None:
        fresh_state(model).reset()
        self._model = model
        self._limit = limit
        self._modules = [
            found for module in _candidates(model) if (found := _Rotary.from_module(module, limit)) is not None
        ]
        inside = _encoder_modules(model)
        self._now = threading.local()
        for rotary in self._modules:
            rotary.wrap((lambda: None) if rotary.module in inside else self._lengths)
        self._regimes = sorted(
            {regime for rotary in self._modules for regime in rotary.regimes.values()}, key=lambda r: (r.first, r.steps)
        )
        self.depends = bool(self._modules)

    @cached_property
    def recomputes(self) -> bool:
        """Whether `generate` computes a text anew at the first length with other frequencies.

        If not, keys keep the frequencies that they were computed with.

        Raises:
            UnknownRotary: `generate` computes a text anew at some other length.
        """
        return self.depends and _recomputes(self._model, self._regimes, self._limit)

    def frequencies(self, length: int) -> tuple[int, ...]:
        """Equal for two lengths if prompts of these lengths get the same frequencies."""
        return tuple(regime.at(length) for regime in self._regimes)

    def room(self, length: int) -> int | None:
        """Tokens that may follow a text of some length before it has to be computed anew; None: any number."""
        if not self.recomputes:
            return None
        ahead = [regime.first - 1 - length for regime in self._regimes if length < regime.first]
        return min(ahead, default=None)

    @contextmanager
    def for_lengths(self, lengths: Callable[[], Lengths]) -> Iterator[None]:
        """A forward of this thread in which tokens have these lengths."""
        if not self.depends:
            yield
            return
        self._now.lengths = lengths()
        try:
            yield
        finally:
            self._now.lengths = None

    def _lengths(self) -> Lengths | None:
        return getattr(self._now, "lengths", None)


def follows_length(model: nn.Module) -> bool:
    """Whether a `SequenceRotary` of the model has found frequencies that follow the length of a sequence."""
    return any(_OUTER in getattr(vars(module).get("forward"), "__dict__", {}) for module in model.modules())


class _Rotary:
    """One rotary module.

    Attributes:
        regimes: how its frequencies follow the length; for each layer type, if it has several.
    """

    def __init__(self, module: nn.Module, fresh: FreshState, regimes: dict[str | None, Regime]) -> None:
        self.module = module
        self.regimes = regimes
        self._fresh = fresh
        self._forward: Callable[..., Any] = module.forward
        self._signature = inspect.signature(self._forward)
        self._place = _place(self._signature)
        self._lock = threading.Lock()

    @classmethod
    def from_module(cls, module: nn.Module, limit: int) -> _Rotary | None:
        """A module whose frequencies follow the length; None if they do not, or if it cannot be tried."""
        fresh = FreshState(module)
        regimes = {}
        for layer_type in _layer_types(module):
            try:
                regime = _regime(module, fresh, layer_type, limit)
            except Exception:
                continue
            finally:
                fresh.reset()
            if regime is not None:
                regimes[layer_type] = regime
        return cls(module, fresh, regimes) if regimes else None

    def wrap(self, lengths: Callable[[], Lengths | None]) -> None:
        """Let the module's forward give each token the frequencies of its own length."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = self._signature.bind(*args, **kwargs).arguments
            with self._lock:
                return self._rotated(call, lengths())

        vars(forward)[_OUTER] = self._forward
        vars(self.module)["forward"] = forward

    def _rotated(self, call: dict[str, Any], lengths: Lengths | None) -> Any:
        positions, regime = call[self._place], self.regimes.get(call.get("layer_type"))
        if regime is None:
            return self._forward(**call)
        if lengths is None or len(lengths[0]) != positions.shape[-1]:
            lengths = _own(positions)
        asked: dict[int, int] = {}
        for length in {length for row in lengths for length in row}:
            asked[regime.at(length)] = max(length, asked.get(regime.at(length), 0))
        if len(asked) == 1:
            return self._at(call, *asked.values())
        wanted = torch.tensor([[regime.at(length) for length in row] for row in lengths], device=positions.device)
        found: Any = None
        for kind, length in asked.items():
            new = self._at(call, length)
            found = new if found is None else _each(partial(_chosen, wanted == kind), new, found)
        return found

    def _at(self, call: dict[str, Any], length: int) -> Any:
        """The embedding [..., tokens, dim] of a call's positions as in a sequence of some length."""
        self._fresh.reset()
        return _extended(self._forward, call, self._place, length)


def _extended(forward: Callable[..., Any], call: dict[str, Any], place: str, length: int) -> Any:
    """What a rotary forward gives for a call's positions and one more, the last of a sequence of some length."""
    positions = call[place]
    last = torch.full_like(positions[..., :1], length - 1)
    call = {**call, place: torch.cat([positions.clamp(max=length - 1), last], dim=-1)}
    if call.get("seq_len") is not None:
        call["seq_len"] = length
    return _each(lambda found: found[..., :-1, :], forward(**call))


def _each(function: Callable[..., Tensor], *found: Any) -> Any:
    """The same for a tensor, or for each of a tuple of them (cosine and sine)."""
    if isinstance(found[0], Tensor):
        return function(*found)
    return tuple(function(*tensors) for tensors in zip(*found, strict=True))


def _chosen(here: Tensor, new: Tensor, found: Tensor) -> Tensor:
    """[..., rows, tokens, dim]: `new` at some of [rows, tokens], `found` elsewhere."""
    return torch.where(here[..., None], new, found)


def _own(positions: Tensor) -> Lengths:
    """For each sequence of [..., rows, tokens] its largest position plus one."""
    rows = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2)) if positions.dim() > 1 else positions.amax()[None]
    return [[int(last) + 1] * positions.shape[-1] for last in rows.tolist()]


# Finding the modules.


def _encoder_modules(model: Any) -> set[nn.Module]:
    """The modules that see the positions of an encoder."""
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder = getattr(model, "get_encoder", None)
    return set(encoder().modules()) if encodes and encoder is not None else set()


def _candidates(model: Any) -> list[nn.Module]:
    """Modules without weights and children whose forward takes positions; those that were wrapped are as before."""
    found: list[nn.Module] = []
    if not isinstance(model, nn.Module):
        return found
    for module in model.modules():
        wrapped = vars(module).get("forward")
        if _OUTER in getattr(wrapped, "__dict__", {}):
            del vars(module)["forward"]
        if not module._modules and not module._parameters and _place(inspect.signature(module.forward)):
            found.append(module)
    return found


def _place(signature: inspect.Signature) -> str:
    return next((name for name in _PLACES if name in signature.parameters), "")


def _layer_types(module: nn.Module) -> list[str | None]:
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [None]
    kinds = getattr(module, "rope_type", None)
    return [None, *kinds] if isinstance(kinds, dict) else [None]


def _regime(module: nn.Module, fresh: FreshState, layer_type: str | None, limit: int) -> Regime | None:
    """How the frequencies of a module follow the length, found by asking it for positions 0 and 1."""

    def at(length: int) -> Any:
        fresh.reset()
        return _tried(module, layer_type, length)

    def changed(length: int, other: Any) -> bool:
        found = at(length)
        return any(not torch.equal(a, b) for a, b in zip(_tensors(found), _tensors(other), strict=True))

    if limit < 3 or not changed(limit, short := at(2)):
        return None
    first = bisect.bisect_left(range(2, limit + 1), True, key=lambda length: changed(length, short)) + 2
    return Regime(first, steps=changed(limit, at(first)))


def _tried(module: nn.Module, layer_type: str | None, length: int) -> Any:
    """A module's embedding of positions 0 and 1 in a sequence of some length."""
    tensors = [*module.buffers(), *(value for value in vars(module).values() if isinstance(value, Tensor))]
    device = tensors[0].device if tensors else torch.device("cpu")
    signature = inspect.signature(module.forward)
    first, place = next(iter(signature.parameters)), _place(signature)
    call: dict[str, Any] = {first: torch.zeros(1, 2, 8, device=device)}
    if layer_type is not None:
        call["layer_type"] = layer_type
    flat = torch.arange(2, device=device)[None]
    for positions in (flat, flat.expand(3, 1, 2)):
        try:
            found = _extended(module.forward, {**call, place: positions}, place, length)
        except Exception:
            continue
        if all(tensor.shape[-2] == 2 for tensor in _tensors(found)):
            return found
    raise TypeError("It is not a rotary embedding of one position per token.")


def _tensors(found: Any) -> Sequence[Tensor]:
    return [found] if isinstance(found, Tensor) else found


# What `generate` does at the first length with other frequencies.


def _recomputes(model: Any, regimes: Sequence[Regime], limit: int) -> bool:
    """Whether `generate` drops the cache of a text that reaches the first length with other frequencies."""
    named = getattr(model.config.get_text_config(decoder=True), "original_max_position_embeddings", None)
    lengths = {regime.first for regime in regimes} | (
        {named + 1} if isinstance(named, int) and named < limit else set()
    )
    drops = {length for length in lengths if _drops_cache(model, length)}
    if drops and (drops != {regime.first for regime in regimes} or any(regime.steps for regime in regimes)):
        raise UnknownRotary(f"its generate computes a text again at {', '.join(map(str, sorted(drops)))} tokens")
    return bool(drops)


class _Filled(DynamicCache):  # type: ignore[misc]
    """A cache that reports a given number of tokens."""

    said = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.said


def _drops_cache(model: Any, length: int) -> bool:
    prepare = getattr(model, "prepare_inputs_for_generation", None)
    if prepare is None:
        return False
    device = model.get_input_embeddings().weight.device
    cache = _Filled(config=model.config.get_text_config(decoder=True))
    cache.said = length - 1
    ids = torch.zeros(1, length, dtype=torch.long, device=device)
    try:
        inputs = prepare(
            ids,
            **{argument_of(prepare): cache},
            attention_mask=torch.ones_like(ids),
            use_cache=True,
            next_sequence_length=1,
            is_first_iteration=False,
        )
    except Exception:
        return False
    if any(value is cache for value in inputs.values()):
        return False
    if inputs["input_ids"].shape[1] != length:
        raise UnknownRotary(
            f"its generate forgets a text at {length} tokens; continuous batching serves max_model_len {length - 1}"
        )
    return True
