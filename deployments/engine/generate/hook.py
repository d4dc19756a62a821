"""The loader's own `generate` hook, called for one request at a time.

    generate(**inputs, max_new_tokens=..., temperature=..., ...) -> LongTensor[1, prompt + new]

A hook is given what it names, or everything below if it takes **kwargs: `input_ids` and the encoder's other tensors,
`max_new_tokens`, `temperature`, `do_sample`, and those of the request's other settings that differ from their defaults,
under transformers' names. One that takes `streamer` (transformers' protocol: put, end) streams; one that takes
`stopping_criteria` stops where the text ends and when the client leaves. Around the call the process's random state
(torch, `random`, numpy) is the request's own, begun from its seed; see `random_state`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from deployments.core.calls import SamplingParams
from deployments.core.errors import RAISED_BY_HOOKS, ModelError, hook_failure
from deployments.core.token_ids import known_ids
from deployments.engine.adapters.step import AdapterStep, current_step
from deployments.engine.base.failures import as_error
from deployments.engine.generate.job import Job
from deployments.engine.generate.result import GenerateContract
from deployments.engine.model.random_state import RANDOM_STATE, TURN_LIMIT_S, Turn
from deployments.engine.sampling.sample import Sampled
from model_loaders.contract import ModelInfo

# Our name of a setting and transformers' name of it.
_SETTINGS = {
    "min_tokens": "min_new_tokens",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "early_stopping": "early_stopping",
}
# Settings that transformers' generate does not have: given only to a hook that names them.
_NAMED = ("presence_penalty", "frequency_penalty", "logit_bias", "bad_words", "allowed_token_ids", "ignore_eos")
# What the engine does around any hook.
_OURS = ("max_tokens", "temperature", "stop", "stop_token_ids", "include_stop_str_in_output", "skip_special_tokens")
_LIVE = ("streamer", "stopping_criteria")


class _Ended(Exception):
    """Raised out of a hook that streams and takes no stopping criteria."""


class GenerateHook:
    """Runs jobs through a loader's hook.

    Attributes:
        supports: the `SamplingParams` fields that the hook, or the engine around it, honors.
    """

    def __init__(self, info: ModelInfo, turn_limit_s: float = TURN_LIMIT_S) -> None:
        self._turn_limit_s = turn_limit_s
        if info.generate is None:
            raise ModelError("The loader has no generate hook.")
        self._hook = info.generate
        self._kwargs = dict(info.generate_kwargs)
        self._model = info.model
        parameters = _parameters(self._hook)
        self._names = frozenset(parameters)
        self._anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._live = tuple(name for name in _LIVE if self._takes(name))
        self._encoder_decoder = bool(getattr(getattr(info.model, "config", None), "is_encoder_decoder", False))
        self._vocab = known_ids(info.model, info.tokenizer)
        self.supports = frozenset(
            {"seed", "extra", *_OURS}
            | {ours for ours, theirs in _SETTINGS.items() if self._takes(theirs)}
            | {name for name in _NAMED if name in self._names}
        )

    def run(self, job: Job) -> None:
        """Generate one job's text."""
        kwargs = {**self._inputs(job), **self._settings(job.request.sampling)}
        contract = self._contract(job, kwargs)
        seed = job.request.sampling.seed
        with RANDOM_STATE.seeded(seed, self._turn_limit_s) as turn, torch.no_grad():
            if not job.active:
                return
            streamer = _Streamer(job, contract, turn, raising="stopping_criteria" not in self._live)
            step = current_step()
            try:
                returned = self._call(kwargs, streamer, job)
            except _Ended:
                return
            except RAISED_BY_HOOKS as error:
                raise as_error(error, message=hook_failure("generate", error, self._hook)) from error
        _check_kept(turn, seed)
        _check_adapted(step)
        tokens = contract.new_tokens(returned)
        given = streamer.given
        if tokens[: len(given)] != given:
            # The hook streamed something else than it returns: what the client has seen counts.
            tokens = given
        for token_id in tokens[len(given) :]:
            job.take(Sampled(token_id))
        limit = job.request.sampling.max_tokens
        job.finish("length" if limit is not None and len(tokens) >= limit else "stop")

    def _call(self, kwargs: Mapping[str, Any], streamer: _Streamer, job: Job) -> Any:
        live = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([_Stop(job, streamer)])}
        try:
            return self._hook(**kwargs, **{name: live[name] for name in self._live})
        except (TypeError, ValueError) as error:
            # **kwargs may lead to a function that knows neither; nothing has been computed then.
            named = [name for name in self._live if name in str(error) and name not in self._names]
            if not named or streamer.given:
                raise
            self._live = tuple(name for name in self._live if name not in named)
            streamer.raising = "stopping_criteria" not in self._live
            return self._call(kwargs, streamer, job)

    def _inputs(self, job: Job) -> dict[str, Any]:
        device = _device(self._model)
        ids = torch.tensor([job.request.input_ids], device=device)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        dtype = getattr(self._model, "dtype", None)
        for key, value in job.request.model_inputs.items():
            floating = value.is_floating_point() and isinstance(dtype, torch.dtype)
            inputs[key] = value.to(device=device, dtype=dtype if floating else value.dtype)
        return {key: value for key, value in inputs.items() if self._takes(key)}

    def _settings(self, params: SamplingParams) -> dict[str, Any]:
        """The request's settings under the hook's names, over the loader's `generate_kwargs`."""
        settings: dict[str, Any] = {**self._kwargs, "max_new_tokens": params.max_tokens}
        greedy = params.temperature <= 0
        settings["do_sample"] = not greedy
        if "temperature" in self._names or not greedy:
            settings["temperature"] = params.temperature
        else:
            settings.pop("temperature", None)
        settings |= {_SETTINGS[name]: value for name, value in params.given().items() if name in _SETTINGS}
        for name in _NAMED:
            if name in self._names:
                settings[name] = getattr(params, name)
        taken = {key: value for key, value in settings.items() if self._takes(key)}
        return {**taken, **params.extra}

    def _takes(self, name: str) -> bool:
        return self._anything or name in self._names

    def _contract(self, job: Job, kwargs: Mapping[str, Any]) -> GenerateContract:
        """What a call with these arguments may return."""
        prompt, limit, begun = job.request.input_ids, kwargs.get("max_new_tokens"), kwargs.get("decoder_input_ids")
        return GenerateContract(
            prompt=None if self._encoder_decoder else prompt,
            begun=len(prompt) if not self._encoder_decoder else 1 if begun is None else begun.shape[-1],
            limit=limit if isinstance(limit, int) else None,
            vocab=self._vocab,
        )


def _check_adapted(step: AdapterStep | None) -> None:
    """Refuse what a hook has computed without the adapter of its request: with another model, or in another thread.

    Raises:
        ModelError: no module of the loader's model was called in the hook's own thread.
    """
    if step is not None and not step.used:
        raise ModelError(
            "The generate hook has not used the adapter: it computes with another model than the loader's, or in "
            "another thread. Call the loader's model in the hook itself."
        )


class _Streamer:
    """Passes tokens on as the hook finds them; transformers' streamer protocol.

    Attributes:
        given: the tokens passed on.
        raising: end the hook by an exception once the text has ended.
    """

    def __init__(self, job: Job, contract: GenerateContract, turn: Turn, *, raising: bool) -> None:
        self.given: list[int] = []
        self.raising = raising
        self._job = job
        self._contract = contract
        self._turn = turn
        self._step = current_step()
        self._begun = False

    def put(self, value: Any) -> None:
        """Take tokens; the first call may bring the prompt."""
        self.give_way()
        ids = self._contract.streamed(value)
        tokens: list[int] = ids.reshape(-1).tolist()
        # transformers streams the context first, with a batch dimension, and then tokens without one.
        context = not self._begun and (
            tokens == self._contract.prompt or (ids.dim() == 2 and len(tokens) == self._contract.begun)
        )
        self._begun = True
        if context:
            return
        self._contract.check(tokens, "streamed")
        _check_adapted(self._step)
        for token_id in tokens:
            self.given.append(token_id)
            self._job.take(Sampled(token_id))
        if self.raising and not self._job.active:
            raise _Ended

    def give_way(self) -> None:
        """Let another hook compute first, if one waits."""
        self._turn.give_way()
        _check_kept(self._turn, self._job.request.sampling.seed)

    def end(self) -> None:
        """Nothing follows; the hook's result says the same."""


class _Stop(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, job: Job, streamer: _Streamer) -> None:
        self._job = job
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._streamer.give_way()
        return torch.full((input_ids.shape[0],), not self._job.active, device=input_ids.device)


def _check_kept(turn: Turn, seed: int | None) -> None:
    """Raise if a seed has been lost on the way."""
    if turn.lost and seed is not None:
        raise ModelError(
            f"Hook generate has computed for more than {turn.limit:g} s without a chance for other hooks, which went "
            "on: its random numbers are no longer those of the seed. Let the hook take a streamer or "
            "stopping_criteria, or raise hook_timeout_s."
        )


def _device(model: Any) -> torch.device:
    device = getattr(model, "device", None)
    if isinstance(device, torch.device):
        return device
    parameters = getattr(model, "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if isinstance(first, torch.Tensor) else torch.device("cpu")


def _parameters(hook: Any) -> Mapping[str, inspect.Parameter]:
    """The hook's parameters; where they cannot be read, it is trusted to take anything."""
    try:
        return inspect.signature(hook).parameters
    except (TypeError, ValueError):
        return {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
