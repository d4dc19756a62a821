"""Measures at load what each module of a model gives: how often, of which shape, and whether a batch can be sliced.

Two prompts are computed alone, one after the other, and then together. A tap is offered if its slices in the batch are
what the prompt gives alone. Hidden states are found by their bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deployments.engine.base.text_side import TextSide
from deployments.engine.cache.cache import AnyCache, new_cache
from deployments.engine.inside.catalogue import NEVER_CALLED, Catalogue, Entry, Tap
from deployments.engine.inside.layout import Layout
from deployments.engine.inside.watch import Place, Seen, watching
from deployments.engine.model.forward import NO_OFFSET, Forward
from deployments.engine.verify.length_probe import LengthProbe
from deployments.engine.verify.parity import image_prompt
from deployments.engine.verify.proofs import INSIDE

_LONG, _SHORT = INSIDE.lengths


def measure(forward: Forward, *, pads: bool, mixes: bool, text_side: TextSide) -> Catalogue:
    """The catalogue of a model.

    Args:
        pads: prompts of different lengths may be padded together.
        mixes: sequences of different lengths may decode together.
        text_side: makes a prompt with an image, for what runs for images alone.
    """
    probe = _Probe(forward, pads=pads, mixes=mixes, text_side=text_side)
    taps: dict[nn.Module, dict[str, Tap]] = {}
    for place in probe.places:
        module, side, item = place
        known = taps.setdefault(module, {})
        suffix = side if side != "output" or "output" not in known else f"output.{item}"
        known[suffix] = probe.tap(place)
    model = forward.model
    entries = [
        Entry(name, module, taps[module]) if module in taps else Entry(name, module, reason=NEVER_CALLED)
        for name, module in model.named_modules(remove_duplicate=False)
        if name
    ]
    return Catalogue(entries, dict(_aliases(forward, {entry.name: entry for entry in entries}, probe.long)))


class _Probe:
    """The forwards that are compared."""

    def __init__(self, forward: Forward, *, pads: bool, mixes: bool, text_side: TextSide) -> None:
        self._forward = forward
        forward.fresh.reset()
        self._lengths = LengthProbe(forward, _LONG, _SHORT)
        self.long = self._lengths.long
        long, long_next, first = self._alone(self.long)
        short, short_next, second = self._alone(self._lengths.short)
        self._prompts, self._steps = (long, short), (long_next, short_next)
        self._order = (0, 1) if mixes else (1, 1)
        self._together = self._batch(first if mixes else second, second)
        self._padded = self._pad() if pads else None
        self._shown = self._images(text_side)
        forward.fresh.reset()
        self.places = list(dict.fromkeys([*long, *self._shown]))

    def tap(self, place: Place) -> Tap:
        """What was found out about one place."""
        side, item = place[1], place[2]
        if side == "attention":
            return self._attention(place)
        if place not in self._prompts[0]:
            return _whole(place, self._shown[place], "it runs for images alone")
        calls = {len(seen.get(place, ())) for seen in (*self._prompts, *self._steps)}
        first = self._prompts[0][place][0]
        if place not in self._steps[0] and self._forward.is_encoder_decoder:
            return _whole(place, self._prompts[0][place], "it runs for the encoder alone")
        if len(calls) > 1:
            return _refused(place, "it is called for prompts alone" if 0 in calls else "its calls depend on the tokens")
        layout = self._layout(place)
        if isinstance(layout, str):
            return _refused(place, layout)
        if not self._same(place, layout):
            return _refused(place, "its values in a batch are not those of a sequence alone")
        (count,) = calls
        shape = tuple(layout.view(first, 0, 1, 1).shape[1:])
        return Tap(side=side, item=item, layout=layout, shape=shape, dtype=first.dtype, calls=count)

    def _attention(self, place: Place) -> Tap:
        heads = [seen[place] for seen in (*self._prompts, *self._steps) if place in seen]
        if any(len(seen) != 1 or not seen[0].numel() for seen in heads) or len(heads) != 4:
            return _refused(place, "its attention takes arguments of its own, or does not run in every forward")
        return Tap(side="attention", layout=Layout(2), shape=(heads[0][0].numel(),), dtype=torch.float32)

    def _alone(self, ids: Sequence[int]) -> tuple[Seen, Seen, AnyCache]:
        """What a prompt without its last token gives, what that token gives, and the cache before it."""
        with watching(self._forward.model) as prompt:
            cache, _ = self._lengths.alone(ids[:-1])
        with watching(self._forward.model) as step:
            self._forward.decode([ids[-1]], [NO_OFFSET], cache.copy_sequence(0))
        return prompt, step, cache

    def _batch(self, cache: AnyCache, other: AnyCache) -> Seen:
        joined = cache.copy_sequence(0)
        joined.append(other, 0)
        last = [(self._lengths.long, self._lengths.short)[i][-1] for i in self._order]
        with watching(self._forward.model) as together:
            self._forward.decode(last, [NO_OFFSET] * 2, joined)
        return together

    def _pad(self) -> Seen:
        prompts = [self._lengths.long[:-1], self._lengths.short[:-1]]
        with watching(self._forward.model) as padded:
            self._forward.prefill(prompts, new_cache(self._forward.model))
        return padded

    def _images(self, text_side: TextSide) -> Seen:
        """What a prompt with an image gives, of a model that sees images."""
        shown: Seen = {}
        if self._forward.is_encoder_decoder:
            return shown
        for prompt in image_prompt(text_side):
            try:
                with watching(self._forward.model) as shown:
                    cache = new_cache(self._forward.model)
                    self._forward.prefill_media(prompt.input_ids, prompt.model_inputs, cache)
            except Exception:
                return {}
        return shown

    def _layout(self, place: Place) -> Layout | str:
        """How the tensors of a place are sliced, or why they cannot be."""
        found = {self._layout_of(place, call) for call in range(len(self._prompts[0][place]))}
        return found.pop() if len(found) == 1 else "its calls give tensors of different kinds"

    def _layout_of(self, place: Place, call: int) -> Layout | str:
        long, short = (seen[place][call].shape for seen in self._prompts)
        step, joined = self._steps[0][place][call].shape, self._together.get(place, [])
        if len(joined) <= call or not len(long) == len(short) == len(step) == joined[call].dim():
            return "its shape depends on the tokens"
        differing = [axis for axis, (a, b) in enumerate(zip(long, short, strict=True)) if a != b]
        if not differing and long == step and len(long) > 2 and long[:2] == (1, 1):
            return Layout(1, last=True) if joined[call].shape[0] == 2 else "all sequences share it"
        if len(differing) != 1:
            return "its shape does not follow the tokens" if not differing else "two of its axes follow the tokens"
        (axis,) = differing
        if (long[axis], short[axis], step[axis]) != (_LONG - 1, _SHORT - 1, 1):
            return "its shape depends on the tokens"
        if joined[call].shape[0] != 2:
            return "all sequences share it"
        return Layout(axis)

    def _same(self, place: Place, layout: Layout) -> bool:
        """Whether each sequence's slices are those that it gives alone."""
        wanted = [self._steps[i][place] for i in self._order]
        pairs = list(_pairs(wanted, self._together[place], layout, (1, 1)))
        if self._padded is not None:
            counts = (_LONG - 1, _SHORT - 1)
            padded = self._padded.get(place, [])
            if len(padded) != len(self._prompts[0][place]):
                return False
            pairs += _pairs([seen[place] for seen in self._prompts], padded, layout, counts)
        return all(_close(found, alone) for found, alone in pairs)


def _pairs(
    alone: Sequence[Sequence[Tensor]], together: Sequence[Tensor], layout: Layout, counts: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    for row, (calls, count) in enumerate(zip(alone, counts, strict=True)):
        for own, both in zip(calls, together, strict=True):
            yield layout.view(both, row, 2, count), layout.view(own, 0, 1, count)


def _close(found: Tensor, alone: Tensor) -> bool:
    if found.shape != alone.shape:
        return False
    if not alone.dtype.is_floating_point:
        return bool(torch.equal(found, alone))
    one, other = found.float().nan_to_num(), alone.float().nan_to_num()
    return bool((one - other).norm() <= INSIDE.tolerance.at(alone.dtype) * other.norm())


def _whole(place: Place, seen: Sequence[Tensor], what: str) -> Tap:
    """A tap of what runs once for a request."""
    if len(seen) != 1:
        return _refused(place, f"{what}, and more than once")
    return Tap(side=place[1], item=place[2], shape=tuple(seen[0].shape), dtype=seen[0].dtype)


def _refused(place: Place, reason: str) -> Tap:
    return Tap(side=place[1], item=place[2], reason=reason)


def _aliases(
    forward: Forward, entries: Mapping[str, Entry], ids: Sequence[int]
) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names of the hidden states as transformers counts them, and TransformerLens's names of the residual stream."""
    try:
        states, seen = _hidden_states(forward, ids)
    except Exception:
        return
    places = [_place_of(state, seen, entries) for state in states]
    for index, place in enumerate(places):
        if place is not None:
            yield f"hidden_states.{index}", place
    for block, (before, after) in enumerate(itertools.pairwise(places)):
        if before is None or after is None:
            continue
        yield f"blocks.{block}.hook_resid_pre", before
        # The last hidden state is normed: the block's own output is not.
        last = block == len(places) - 2
        if not last or before[1] == "input":
            yield f"blocks.{block}.hook_resid_post", (before[0], "output") if last else after


def _hidden_states(forward: Forward, ids: Sequence[int]) -> tuple[Sequence[Tensor], Seen]:
    model: Callable[..., Any] = forward.model
    given = {"input_ids": torch.tensor([list(ids)], device=forward.device)}
    if forward.is_encoder_decoder:
        if forward.tried:
            given = {name: value.to(forward.device) for name, value in forward.tried.items()}
        given["decoder_input_ids"] = torch.tensor([list(ids)], device=forward.device)
    with watching(forward.model) as seen:
        output = model(**given, output_hidden_states=True, use_cache=False, return_dict=True)
    states = output.decoder_hidden_states if forward.is_encoder_decoder else output.hidden_states
    return states or (), seen


def _place_of(state: Tensor, seen: Seen, entries: Mapping[str, Entry]) -> tuple[str, str] | None:
    """The tap that shows a hidden state after every intervention: the input of a block, else what others read."""
    found = [
        (suffix != "input" or not name.rpartition(".")[2].isdecimal(), suffix != "input", name.count("."), name, suffix)
        for name, entry in entries.items()
        for suffix, tap in entry.taps.items()
        if tap.layout == Layout(1)
        and not tap.reason
        and any(
            value.shape == state.shape and value.dtype == state.dtype and torch.equal(value, state)
            for value in seen.get((entry.module, tap.side, tap.item), ())
        )
    ]
    return min(found)[3:] if found else None
