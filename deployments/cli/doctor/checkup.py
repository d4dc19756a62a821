"""All checks of a loader, one after the other."""

from __future__ import annotations

import copy
import logging
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from deployments.cli.doctor import adapters, answers, conversations, engine, generation, media, modules, prompt, speed
from deployments.cli.doctor.finding import NOT_LOADED, Finding, NotApplicable, Step, fault, fine
from deployments.cli.doctor.subject import LoadLog, Subject, Trial, refusal
from deployments.config.app import AppArgs
from deployments.config.model import ModelEntry
from deployments.core.errors import ConfigError, ModelLoadFailed, TroupeError, last_line
from deployments.engine.model.random_state import RANDOM_STATE
from deployments.engine.verify import proofs
from deployments.host.hook_probe import probe_hooks
from deployments.host.host import ModelHost
from deployments.host.loading import default_device
from deployments.host.worker import Worker
from model_loaders.contract import ModelInfo
from model_loaders.loader_name import is_file, parts
from model_loaders.resolve import load_model_info

Check = Callable[[Subject], Awaitable[Finding]]

CHECKS: dict[str, Check] = {
    "engine": engine.engine,
    "load-log": engine.load_log,
    "memory": engine.memory,
    "weights": engine.weights,
    "template": prompt.template,
    "tokens": prompt.tokens,
    "vocabulary": prompt.vocabulary,
    "bos": prompt.bos,
    "generation-prompt": prompt.generation_prompt,
    "prompt-end": prompt.prompt_end,
    "round-trip": prompt.round_trip,
    "characters": prompt.characters,
    **conversations.CHECKS,
    "tools": conversations.tools,
    "tool-results": conversations.tool_results,
    "stop-tokens": answers.stop_tokens,
    "turn-end": answers.turn_end,
    "tool-format": answers.tool_format,
    "reasoning-format": answers.reasoning_format,
    "generate": generation.generate,
    "parity": generation.parity,
    "batch": generation.batch,
    "images": media.images,
    "audio": media.audio,
    "embeddings": media.embeddings,
    "modules": modules.modules,
    "adapters": adapters.adapters,
    "speed": speed.speed,
}
"""The checks of a model that is loaded, in their order."""

STEPS = ("loader", "hooks", *CHECKS)
"""Every step of a report."""

NEEDED = ("loader", "engine", "template")
"""The steps that others build on."""

_HOOKS = ("apply_chat_template", "encode", "generate", "decode", "embed", "done_callback", "close", "engine")
_CALLED = _HOOKS[:5]
_PROVED = "was checked at load"
"""In the line of the log that says what was proved of a model."""
_CONTRACT = ("contract.py", "resolve.py")
"""Files of `model_loaders/` that refuse what a loader takes or returns."""


class Checkup:
    """Checks one model of a configuration, loaded as a replica of the server loads it.

    Args:
        args: the configuration, with the adapters over the model that are checked.
        entry: of the model.
        skip: names of steps to leave out; those in `NEEDED` are not left out.

    Attributes:
        entry: of the model.
        device: where the model is loaded.
        thread_name: of the thread that calls the loader.
        traces: tracebacks of what failed.
    """

    def __init__(self, args: AppArgs, entry: ModelEntry, trial: Trial, skip: Collection[str] = ()) -> None:
        self.device = trial.device or default_device()
        self.traces: list[str] = []
        self.entry = entry
        self.thread_name = f"load-{entry.id}"
        over = [other for other in args.models if other.base == entry.id]
        self._args = args.model_copy(update={"models": [entry, *over], "pools": {}})
        self._trial = trial
        self._skip = set(skip) - set(NEEDED)
        self._info: ModelInfo | None = None
        self._subject: Subject | None = None

    async def steps(self, begun: Callable[[str], None] = lambda name: None) -> AsyncIterator[Step]:
        """Every step of the report, in the order of `STEPS`.

        Args:
            begun: called with the name of a step before it is made.
        """
        disable_progress_bar()
        with _Log() as log:
            async with AsyncExitStack() as stack:
                for name in STEPS:
                    begun(name)
                    started = time.monotonic()
                    found = await self._finding(name, stack, log)
                    yield Step(name=name, finding=found, seconds=time.monotonic() - started)

    async def _finding(self, name: str, stack: AsyncExitStack, log: _Log) -> Finding:
        """What one step finds; also if it fails."""
        try:
            if name in self._skip:
                raise NotApplicable("Left out by --skip.")
            match name:
                case "loader":
                    return await self._load()
                case "hooks":
                    return await self._probe()
                case "engine":
                    await self._build(stack, log)
            if self._subject is None:
                raise NotApplicable(NOT_LOADED)
            return await CHECKS[name](self._subject)
        except _Stop as stop:
            return stop.finding
        except NotApplicable as reason:
            return Finding(status="skipped", text=str(reason))
        except TroupeError as error:
            return fault("request-failed", f"A client gets {refusal(error)}")
        except Exception as error:
            self._keep(error)
            return fault("check-failed", f"The check failed: {last_line(error)}")

    async def _load(self) -> Finding:
        """Call the loader and show what it returns."""
        entry = self.entry
        try:
            self._info = info = await self._in_thread(self._call_loader, entry.load_timeout_s)
        except TimeoutError as error:
            text = f"The loader has not returned for {entry.load_timeout_s:g} s (at {error})."
            return fault("loader-failed", text)
        except (ConfigError, TroupeError) as error:
            return self._not_loaded(error)
        given = [field.name for field in fields(info) if field.init and _is_given(getattr(info, field.name))]
        info.served_as, info.model_name = entry.id, info.model_name or entry.id
        classes = {name: _class(getattr(info, name)) for name in ("model", "tokenizer", "processor")}
        texts = ", ".join(f"{name} {found}" for name, found in classes.items() if found)
        return fine(f"It returned {texts}.", f"keys: {', '.join(given)}", keys=given, **classes)

    def _call_loader(self) -> ModelInfo:
        with RANDOM_STATE.lasting(self.entry.hook_timeout_s):
            return load_model_info(self.entry.loader, self.entry.kwargs, self.device)

    def _not_loaded(self, error: Exception) -> Finding:
        """The finding for a loader that gives no model."""
        self._keep(error)
        raised = error.__cause__ or error
        frames = traceback.extract_tb(raised.__traceback__)
        last = Path(frames[-1].filename) if frames else Path()
        if raised is error and last.name in _CONTRACT and last.parent.name == "model_loaders":
            return fault("loader-contract", str(error))
        place, _ = parts(self.entry.loader)
        name = place if is_file(place) else getattr(sys.modules.get(place), "__file__", None) or ""
        own = Path(name).expanduser().resolve()
        mine = [frame for frame in frames if Path(frame.filename) == own and not place.startswith("model_loaders.")]
        lines = [f"{own}, line {frame.lineno} in {frame.name}: {frame.line}" for frame in mine[-1:]]
        return fault("loader-failed", str(error), *lines)

    async def _probe(self) -> Finding:
        """Call the hooks once, as the server does at load."""
        if self._info is None:
            raise NotApplicable(NOT_LOADED)
        given = [name for name in _HOOKS if getattr(self._info, name) is not None]
        # The server's own call may replace hooks.
        trial, limit = copy.copy(self._info), self.entry.hook_timeout_s
        try:
            await self._in_thread(lambda: probe_hooks(trial, limit=limit), None)
        except ModelLoadFailed as error:
            self._info = None
            return fault("hook-contract", error.message)
        if not given:
            return fine("The loader gives no hooks.", hooks=[])
        called = [name for name in given if name in _CALLED and name != "generate"]
        kept = f" Called once, {', '.join(called)} returned what the contract says." if called else ""
        return fine(f"The loader gives {', '.join(given)}.{kept}", hooks=given)

    async def _build(self, stack: AsyncExitStack, log: _Log) -> None:
        """Build the model's engine, and keep the model leased until the stack is closed."""
        if self._info is None:
            return
        host = ModelHost(self._args, self.device, given={self.entry.id: self._info})
        stack.push_async_callback(host.close)
        try:
            model = await stack.enter_async_context(host.lease(self.entry.id))
        except TroupeError as error:
            self._keep(error)
            raise _Stop(fault("no-engine", error.message)) from error
        self._subject = Subject(host, self._args, model, self._trial, log.kept)

    async def _in_thread(self, function: Callable[[], Any], limit: float | None) -> Any:
        worker = Worker(self.thread_name)
        try:
            return await worker.run(function, limit)
        finally:
            worker.stop()

    def _keep(self, error: BaseException) -> None:
        self.traces.append("".join(traceback.format_exception(error)))


class _Stop(Exception):
    """A step has a finding before its check is made."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.text)
        self.finding = finding


class _Log(logging.Handler):
    """Keeps what the server logs as a warning, in place of printing it, and the line that says what was proved."""

    _LOGGERS = ("troupe", "deployments", "model_loaders")

    def __init__(self) -> None:
        super().__init__()
        self.kept = LoadLog(warnings=[], proofs=[])
        self._proofs = logging.getLogger(proofs.logger.name)
        self._level = self._proofs.level

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            self.kept.warnings.append(text)
        elif record.name == self._proofs.name and _PROVED in text:
            self.kept.proofs.extend(text.partition(": ")[2].removesuffix(".").split("; "))

    def __enter__(self) -> _Log:
        self._proofs.setLevel(logging.INFO)
        for name in self._LOGGERS:
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *raised: object) -> None:
        self._proofs.setLevel(self._level)
        for name in self._LOGGERS:
            logging.getLogger(name).removeHandler(self)


def _class(value: object) -> str | None:
    return None if value is None else type(value).__name__


def _is_given(value: object) -> bool:
    """Whether a field of a ModelInfo has another value than its default."""
    return value is not None and (bool(value) or not isinstance(value, str | tuple | list | dict | bool))
