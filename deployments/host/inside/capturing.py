"""The captures of one call: room for them, their ids, and the files that its choices leave."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol

import torch

from deployments.config.model import ModelEntry
from deployments.core.calls import Capture, GenerateCall, Intervention, SamplingParams
from deployments.core.errors import UnsupportedParameter
from deployments.core.events import Captured
from deployments.core.installed import installed_version, server_version
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.inside.recording import Recording
from deployments.host.inside.captures import CaptureStore, too_large
from deployments.host.inside.files import data_bytes, header, numbers
from deployments.host.inside.offered import inspected_states
from model_loaders.contract import ModelInfo

Aside = Callable[[Callable[[], list[int]]], Awaitable[list[int]]]


class OpenModel(Protocol):
    """A loaded model, as far as this module knows it."""

    entry: ModelEntry
    info: ModelInfo
    engine: Engine
    captures: CaptureStore

    @property
    def fingerprint(self) -> str: ...


class Capturing:
    """What a call captures.

    Args:
        ranked: the best of its choices are kept, so that each has the positions of its prompt.

    Attributes:
        shown: what the loader's done_callback is shown of every choice.
        seen: the tensors of each choice for it.
    """

    def __init__(self, model: OpenModel, call: GenerateCall, *, per_prompt: int, ranked: bool) -> None:
        self._model = model
        self._store: CaptureStore = model.captures
        self._call = call
        self._per_prompt = per_prompt
        self._ranked = ranked
        self._reserved = 0
        self._ids: dict[int, str] = {}
        self._written: dict[int, str] = {}
        self._done = False
        self.shown = shown_to_callback(model)
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def sampling(self, params: SamplingParams, choice: int) -> SamplingParams:
        """The parameters of a choice: with the id of its capture, and with vectors in the place of their ids."""
        if params.capture is None:
            return params
        self._ids[choice] = self._store.new_id()
        first = choice - choice % self._per_prompt
        prompt_in = "" if self._ranked or choice == first else self._ids[first]
        return replace(params, capture=replace(params.capture, id=self._ids[choice], prompt_in=prompt_in))

    async def reserve(self, requests: Sequence[EngineRequest], aside: Aside) -> None:
        """Check the size of everything that is captured, and wait for room for it.

        Args:
            aside: calls a function in the thread that looks at requests.

        Raises:
            BadRequest: it is too large, or cannot be captured.
        """
        if self._call.sampling.capture is None:
            return
        sizes = await aside(lambda: [_size(self._model.engine, request) for request in requests])
        options = self._store.options
        inline = self._call.sampling.capture.inline
        limit = int(options.inline_kib * 2**10 if inline else options.per_choice_mib * 2**20)
        if max(sizes) > limit:
            raise too_large(max(sizes), limit, f"api.captures.{'inline_kib' if inline else 'per_choice_mib'}")
        if not inline:
            await self._store.reserve(sum(sizes))
            self._reserved = sum(sizes)

    async def take(self, choice: int, recording: Recording) -> list[Captured]:
        """What the client gets of a choice's recording; nothing for that of the loader's done_callback."""
        if recording.callback:
            self.seen[choice] = await asyncio.to_thread(_ordinary, recording)
            return []
        self._describe(choice, recording)
        positions = recording.positions
        tensors_of = recording.shapes()
        fields: dict[str, Any] = {
            "positions": [positions[0], positions[-1]] if positions else [],
            "tensors": {name: {"shape": shape, "dtype": dtype} for name, (dtype, shape) in tensors_of.items()},
        }
        return [Captured(choice=choice, handle=await self._handle(choice, recording, fields))]

    async def _handle(self, choice: int, recording: Recording, fields: dict[str, Any]) -> dict[str, Any]:
        count = len(recording.positions)
        shapes: dict[str, tuple[str, Sequence[int]]] = {**recording.shapes()}
        shapes.update(positions=("int64", [count]), token_ids=("int64", [count]))

        def tensors() -> dict[str, torch.Tensor]:
            return {**recording.tensors(), **recording.numbered()}

        if recording.capture.inline:
            nbytes, data = await asyncio.to_thread(lambda: _inline(shapes, recording.described(), tensors()))
            return {"id": self._ids[choice], "bytes": nbytes, **fields, "data": data}
        self._release(_size_of(recording))
        capture_id = self._ids[choice]
        handle = self._store.write(capture_id, self._call.owner, shapes, recording.described(), tensors)
        self._store.describe(capture_id, fields)
        self._written[choice] = capture_id
        return {**handle, **fields}

    def _describe(self, choice: int, recording: Recording) -> None:
        """Say in the file what it is of: enough to read it a year later."""
        entry = self._model.entry
        recording.meta.update(
            model=entry.id,
            fingerprint=self._model.fingerprint,
            capture=self._ids[choice],
            choice=choice,
            prompt_in=recording.capture.prompt_in or None,
            deterministic=entry.engine.deterministic,
            engine=self._model.engine.stats().kind,
            versions=_versions(),
        )

    def drop(self, choice: int) -> None:
        """A choice is not part of the answer."""
        if choice in self._written:
            self._store.drop(self._written.pop(choice))

    def finish(self) -> None:
        """The answer is complete: its files stay."""
        self._done = True

    def close(self) -> None:
        """Give back what is reserved; a call that is not complete leaves no file."""
        self._release(self._reserved)
        if not self._done:
            for choice in list(self._written):
                self.drop(choice)

    def _release(self, nbytes: int) -> None:
        given = min(nbytes, self._reserved)
        self._reserved -= given
        if given:
            self._store.release(given)


def capturing(model: OpenModel, call: GenerateCall) -> Capturing | None:
    """The captures of a call, of which most have none."""
    if call.sampling.capture is None and shown_to_callback(model) is None:
        return None
    per_prompt = max(call.n, call.best_of or 0)
    return Capturing(model, call, per_prompt=per_prompt, ranked=per_prompt > call.n)


@cache
def _versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": installed_version("transformers") or "",
        "troupe": server_version(),
    }


def check_inside(model: OpenModel, params: SamplingParams) -> None:
    """Refuse what the configuration does not let requests do inside the model.

    Raises:
        UnsupportedParameter: it names the field and the key.
    """
    asked = [name for name in ("interventions", "capture") if getattr(params, name)]
    if asked and not isinstance(model.engine, BatchingEngine):
        raise UnsupportedParameter(
            f"Model {model.entry.id!r} cannot honor {asked[0]}: {_closed(model)}; leave it out.", param=asked[0]
        )
    allowed = model.entry.inside
    if params.interventions and allowed != "intervene":
        raise UnsupportedParameter(
            f"Model {model.entry.id!r} takes no interventions on this server (models[].inside is {allowed}).",
            param="interventions",
        )
    if params.capture is not None and (allowed == "off" or not model.captures.options.enabled):
        key = "models[].inside" if allowed == "off" else "api.captures.enabled"
        raise UnsupportedParameter(
            f"States of model {model.entry.id!r} cannot be captured on this server ({key}).", param="capture"
        )


def _closed(model: OpenModel) -> str:
    """Why nothing inside of a model can be seen or changed, which its engine decides."""
    if model.entry.base is not None:
        return f"it is an adapter, and only its base {model.entry.base!r} can be inspected"
    return "it does not run with continuous batching"


async def modules_of(model: OpenModel, pattern: str) -> dict[str, Any]:
    """What can be captured and changed inside a model, as JSON values.

    Raises:
        UnsupportedParameter: its engine cannot do either.
    """
    engine = model.engine
    if not isinstance(engine, BatchingEngine) or model.entry.inside == "off":
        reason = "models[].inside is off" if model.entry.inside == "off" else _closed(model)
        raise UnsupportedParameter(
            f"Nothing can be captured or changed inside model {model.entry.id!r}: {reason}.", param="model"
        )
    return await asyncio.to_thread(engine.inside.catalogue.as_json, pattern)


def with_vectors(params: SamplingParams, store: CaptureStore) -> SamplingParams:
    """The parameters with uploaded vectors in the place of their ids.

    Raises:
        BadRequest: a vector is not there.
    """
    if not any(each.vector is not None and each.vector.id for each in params.interventions):
        return params
    return replace(
        params, interventions=tuple(_with_vector(each, index, store) for index, each in enumerate(params.interventions))
    )


def _with_vector(asked: Intervention, index: int, store: CaptureStore) -> Intervention:
    if asked.vector is None or not asked.vector.id:
        return asked
    return replace(asked, vector=store.vectors.get(asked.vector.id, f"interventions[{index}].vector.id"))


def shown_to_callback(model: OpenModel) -> Capture | None:
    """What the loader's done_callback is shown of the model's states."""
    return inspected_states(model.info)


def _size(engine: Any, request: EngineRequest) -> int:
    assert isinstance(engine, BatchingEngine)
    inspected = engine.inspected(request)
    assert inspected is not None
    total = inspected.prompt + max(request.sampling.max_tokens or 1, 1) - 1
    sizes = [recording.nbytes(total) for recording in inspected.recordings if not recording.callback]
    return sum(sizes)


def _size_of(recording: Recording) -> int:
    return data_bytes(recording.shapes()) + 16 * len(recording.positions)


def _ordinary(recording: Recording) -> dict[str, torch.Tensor]:
    """Not the engine's tensors: they were made in its inference mode, which autograd refuses."""
    return {name: tensor.clone() for name, tensor in recording.tensors().items()}


def _inline(
    shapes: Mapping[str, tuple[str, Sequence[int]]], meta: str, tensors: Mapping[str, torch.Tensor]
) -> tuple[int, str]:
    """The bytes of a file, how many and in base64."""
    data = b"".join([header(shapes, meta), *numbers(tensors, shapes)])
    return len(data), base64.b64encode(data).decode()
