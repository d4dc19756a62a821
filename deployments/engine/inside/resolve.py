"""From the fields of a request to what is captured and changed in its sequence; or why it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deployments.core.calls import Capture, Intervention, SamplingParams, Vector, Word
from deployments.core.errors import BadRequest, ModelError
from deployments.engine.inside.catalogue import Catalogue, Found, is_wide
from deployments.engine.inside.edits import Edit
from deployments.engine.inside.inspected import Asked, Inspected
from deployments.engine.inside.layout import Site
from deployments.engine.inside.positions import Chosen, choose
from deployments.engine.inside.recording import Recording, Wanted

_MOST_TAPS = 512
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Resolver:
    """Reads requests for the inside of one model.

    Args:
        catalogue: of the model.
        hooks, vectors: of the loader, by name.
        device: of the model.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        hooks: Mapping[str, Callable[..., Any]],
        vectors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.catalogue = catalogue
        self._hooks = dict(hooks)
        self._vectors = dict(vectors)
        self._device = device

    def inspected(self, params: SamplingParams, prompt: int, callback: Capture | None = None) -> Inspected | None:
        """What a request asks for; None if it asks for nothing.

        Args:
            params: with `max_tokens` set.
            prompt: tokens of the prompt.
            callback: what the loader's done_callback wants to see.

        Raises:
            BadRequest: something of it cannot be captured or changed.
            ModelError: that is so of what the callback is to see.
        """
        if params.capture is None and not params.interventions and callback is None:
            return None
        total = prompt + max(params.max_tokens or 1, 1) - 1
        sites: dict[Site, Asked] = {}
        recordings: list[Recording] = []
        if params.capture is not None:
            recordings.append(self._recording(params.capture, prompt, total, sites, callback=False))
        if callback is not None:
            try:
                recordings.append(self._recording(callback, prompt, total, sites, callback=True))
            except BadRequest as error:
                raise ModelError(f"The loader's inspect does not fit this request: {error.message}") from error
        for index, intervention in enumerate(params.interventions):
            self._intervene(intervention, f"interventions[{index}]", prompt, total, sites)
        hooks = [self._hooks[each.name] for each in params.interventions if each.op == "hook"]
        return Inspected(
            sites=sites,
            recordings=recordings,
            interventions=tuple(params.interventions),
            prompt=prompt,
            pure=all(getattr(hook, "pure", False) for hook in hooks),
        )

    def _recording(
        self, capture: Capture, prompt: int, total: int, sites: dict[Site, Asked], *, callback: bool
    ) -> Recording:
        field = "inspect" if callback else "capture"
        chosen = choose(capture.positions, prompt, total, f"{field}.positions")
        if capture.prompt_in:
            chosen = chosen.after(prompt)
        found: dict[str, Found] = {}
        for index, pattern in enumerate(capture.modules):
            place = f"{field}.modules[{index}]"
            for each in self._capturable(pattern, place):
                _check_last(each, chosen, prompt, place)
                found.setdefault(each.label, each)
        wanted: list[Wanted] = []
        recording = Recording(capture=capture, wanted=wanted, chosen=chosen, prompt=prompt, callback=callback)
        for each in found.values():
            for call in range(each.tap.calls) if each.call is None else [each.call]:
                label = each.label if each.tap.calls == 1 else f"{each.label}#{call}"
                wanted.append(Wanted(label, each.tap, each.entry.module, call))
                asked = sites.setdefault((each.entry.module, each.tap.side), Asked())
                asked.takes.append((recording, wanted[-1]))
        if len(wanted) > _MOST_TAPS:
            raise _too_many(len(wanted), f"{field}.modules")
        return recording

    def _capturable(self, pattern: str, place: str) -> list[Found]:
        """What a pattern stands for. One that is wide leaves out what cannot be captured, if anything can be."""
        found = self.catalogue.find(pattern, place)
        fitting = [each for each in found if not each.tap.reason]
        if not fitting or (len(fitting) < len(found) and not is_wide(pattern)):
            refused = next(each for each in found if each.tap.reason)
            raise BadRequest(
                f"Invalid {place!r}: {refused.label!r} cannot be captured: {refused.tap.reason}.",
                param=place,
                code="module_not_capturable",
            )
        return fitting

    def _intervene(self, asked: Intervention, place: str, prompt: int, total: int, sites: dict[Site, Asked]) -> None:
        found = self.catalogue.find(asked.module, f"{place}.module")
        for each in found:
            _check_steerable(each, asked, f"{place}.module")
        if len(found) > _MOST_TAPS:
            raise _too_many(len(found), f"{place}.module")
        chosen = choose(asked.positions, prompt, total, f"{place}.positions")
        if asked.op == "hook" and asked.name not in self._hooks:
            raise _unknown(asked.name, self._hooks, "hook", f"{place}.name")
        vectors = self._vectors_of(asked, found, _count(asked, chosen, prompt), place)
        for each, vector in zip(found, vectors, strict=True):
            edit = Edit(
                asked=asked,
                module=each.label,
                item=each.tap.item,
                call=each.call,
                chosen=chosen,
                vector=vector,
                places=_places(asked, chosen, prompt),
                columns=_columns(asked, each, f"{place}.features", self._device),
                hook=self._hooks[asked.name] if asked.op == "hook" else None,
            )
            site = (each.entry.module, each.tap.side)
            sites.setdefault(site, Asked()).edits.append((edit, each.tap))

    def _vectors_of(
        self, asked: Intervention, found: Sequence[Found], count: int | None, place: str
    ) -> list[Tensor | None]:
        """The vector for each module: [width], or [positions, width]."""
        if asked.vector is None:
            return [None] * len(found)
        vector = self._numbers(asked.vector, f"{place}.vector")
        several = vector.dim() == 2 and len(found) > 1 and vector.shape[0] == len(found)
        if several and vector.shape[0] == count:
            raise _bad_shape(vector, place, f"its {count} rows may be modules or positions; send one intervention each")
        for each in found:
            _check_shape(vector[0] if several else vector, each, asked, count, place)
        vector = vector.to(self._device)
        return [vector[index] if several else vector for index in range(len(found))]

    def _numbers(self, vector: Vector, place: str) -> Tensor:
        if vector.name:
            if vector.name not in self._vectors:
                raise _unknown(vector.name, self._vectors, "vector", f"{place}.name")
            return self._vectors[vector.name]
        numbers = torch.frombuffer(bytearray(vector.data), dtype=_DTYPES[vector.dtype]).reshape(vector.shape).float()
        if not bool(torch.isfinite(numbers).all()):
            raise BadRequest(f"Invalid {place!r}: all its numbers should be finite.", param=place, code="vector_shape")
        return numbers


def _check_last(found: Found, chosen: Chosen, prompt: int, place: str) -> None:
    first = chosen.first
    if found.tap.layout.last and first is not None and first < prompt - 1:
        raise BadRequest(
            f"Invalid {place!r}: {found.label!r} cannot be captured at these positions: it runs for the last token of "
            "the prompt and for generated ones alone. Send positions last_prompt or generated; prompt_logprobs "
            "reports what it gives for the other tokens.",
            param=place,
            code="module_not_capturable",
        )


def _check_steerable(found: Found, asked: Intervention, place: str) -> None:
    reason = found.tap.unsteerable
    if not reason and found.tap.layout.axis is None and asked.positions != "all":
        reason = "it has no positions; send positions all"
    if reason:
        raise BadRequest(
            f"Invalid {place!r}: {found.label!r} cannot be changed: {reason}.", param=place, code="module_not_steerable"
        )


def _width(found: Found, asked: Intervention) -> tuple[int, int]:
    """Columns of the states, and of those that are changed."""
    width = found.tap.shape[-1] if found.tap.shape else 1
    if asked.features is None:
        return width, width
    return width, len({column for start, end in asked.features for column in range(start, min(end, width))})


def _check_shape(vector: Tensor, found: Found, asked: Intervention, count: int | None, place: str) -> None:
    width, changed = _width(found, asked)
    if vector.dim() not in (1, 2) or vector.shape[-1] != changed:
        columns = f"{changed} of its {width} columns are changed" if changed < width else f"it has {width} columns"
        raise _bad_shape(vector, place, f"{found.label!r} needs [{changed}]: {columns}")
    if vector.dim() == 2 and vector.shape[0] != count:
        named = "these positions cannot be counted" if count is None else f"there are {count} positions"
        raise _bad_shape(vector, place, f"{found.label!r} needs [{changed}], or [positions, {changed}], and {named}")
    directed = asked.op == "clamp" or asked.norm_match
    if directed and not bool((vector.norm(dim=-1) > 0).all()):
        raise _bad_shape(vector, place, "a vector of zeros has no direction")


def _bad_shape(vector: Tensor, place: str, reason: str) -> BadRequest:
    place = f"{place}.vector"
    return BadRequest(
        f"Invalid {place!r}: its shape is {list(vector.shape)}, but {reason}.", param=place, code="vector_shape"
    )


_COUNTED: tuple[Word, ...] = ("prompt", "last_prompt")


def _count(asked: Intervention, chosen: Chosen, prompt: int) -> int | None:
    """How many positions are named, if that is known before the answer."""
    if isinstance(asked.positions, tuple):
        return len(asked.positions)
    if asked.positions in _COUNTED or (chosen.end is not None and chosen.end <= prompt):
        return len(chosen.within(0, prompt))
    return None


def _places(asked: Intervention, chosen: Chosen, prompt: int) -> dict[int, int]:
    """The row of a vector [positions, width] for each position: in the order in which the request names them."""
    if isinstance(asked.positions, tuple):
        resolved = [position + prompt if position < 0 else position for position in asked.positions]
        return {position: row for row, position in enumerate(resolved)}
    if _count(asked, chosen, prompt) is None:
        return {}
    return {position: row for row, position in enumerate(chosen.within(0, prompt))}


def _columns(asked: Intervention, found: Found, place: str, device: torch.device) -> Tensor | None:
    if asked.features is None:
        return None
    width, _ = _width(found, asked)
    for start, end in asked.features:
        if not 0 <= start < end <= width:
            raise BadRequest(
                f"Invalid {place!r}: {found.label!r} has columns 0 to {width - 1}; got [{start}, {end}].", param=place
            )
    columns = sorted({column for start, end in asked.features for column in range(start, end)})
    return torch.tensor(columns, device=device)


def _unknown(name: str, known: Mapping[str, Any], noun: str, place: str) -> BadRequest:
    has = f"it has {', '.join(sorted(known))}" if known else f"it has no {noun}s"
    return BadRequest(
        f"Invalid {place!r}: the model's loader has no {noun} {name!r}; {has}.", param=place, code=f"unknown_{noun}"
    )


def _too_many(count: int, place: str) -> BadRequest:
    return BadRequest(f"Invalid {place!r}: it names {count} tensors; send at most {_MOST_TAPS}.", param=place)
