"""The schema of `args` in serve_config.yaml. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.config.api import ApiOptions
from deployments.config.engine import EngineOptions
from deployments.core.errors import ConfigError, ModelNotFound
from deployments.core.model_card import ModelCard, ModelOptions
from deployments.openai.default_params import default_faults
from model_loaders.moved import new_place


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ModelEntry(_Strict):
    """One model that clients can ask for."""

    id: str = Field(min_length=1, description="The name clients send as `model`.")
    loader: str = Field(description="`module:function`, or `path/to/file.py:function`.")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to the loader.")
    aliases: list[str] = Field(default_factory=list, description="Other names of the same model.")
    engine: EngineOptions = Field(default_factory=EngineOptions, description="How its engine runs.")
    api: ModelOptions = Field(default_factory=ModelOptions, description="How its routes read and answer.")
    pinned: bool = Field(default=False, description="Loaded at start and never evicted.")
    preload: bool = Field(default=False, description="Loaded at start, but evicted like any other.")
    idle_unload_s: float | None = Field(default=None, gt=0, description="Unloaded when nobody has used it so long.")
    profile_dir: str | None = Field(default=None, description="Folder for a trace of its first requests.")
    hook_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds until an encode, template or decode hook counts as hung."
    )
    load_timeout_s: float = Field(default=3600.0, gt=0, description="Seconds until a loader counts as hung.")
    load_retry_s: float = Field(default=60.0, ge=0, description="Seconds a failed load's error is answered again.")

    @field_validator("loader")
    @classmethod
    def _has_not_moved(cls, loader: str) -> str:
        if new := new_place(loader):
            raise ValueError(f"this loader is now {new}")
        return loader

    @property
    def names(self) -> list[str]:
        return [self.id, *self.aliases]

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.id, aliases=tuple(self.aliases), options=self.api)


class Pool(_Strict):
    """Replicas that serve some of the models, with so many GPUs each."""

    models: list[str] = Field(min_length=1, description="Ids of the models it serves.")
    replicas: int | None = Field(default=None, ge=1, description="How many; None is one for every GPU, or set of GPUs.")
    gpus_per_replica: float | None = Field(default=None, ge=0, description="None is 1 where the cluster has GPUs.")
    max_models_per_replica: int | None = Field(default=None, ge=1, description="None is that of the application.")


class AppArgs(_Strict):
    """`args` of the application: the models, and how replicas and the API behave."""

    models: list[ModelEntry] = Field(min_length=1)
    max_models_per_replica: int = Field(default=1, ge=1, description="Models loaded side by side on one replica.")
    stream_interval_ms: float = Field(
        default=20.0, ge=0, description="After a stream's first token, what has come since is sent this often."
    )
    swap_patience_s: float = Field(
        default=2.0, ge=0, description="Seconds a request waits before a busy model is drained for its own."
    )
    max_concurrent_requests: int | None = Field(
        default=None, ge=1, description="More at once are refused with 429; None queues without end."
    )
    pools: dict[str, Pool] = Field(
        default_factory=dict, description="Deployments of replicas by name; without any, one serves all models."
    )
    api: ApiOptions = Field(default_factory=ApiOptions, description="What the HTTP surface accepts.")

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: list[ModelEntry]) -> list[ModelEntry]:
        seen: dict[str, str] = {}
        for entry in models:
            for name in entry.names:
                if name in seen:
                    raise ValueError(f"{name!r} names both model {seen[name]!r} and model {entry.id!r}")
                seen[name] = entry.id
        return models

    @model_validator(mode="after")
    def _every_model_has_one_pool(self) -> Self:
        ids = [entry.id for entry in self.models]
        of: dict[str, str] = {}
        for name, pool in self.pools.items():
            for model in pool.models:
                if model not in ids:
                    raise ValueError(f"pool {name!r} has the model {model!r}, which is not among models")
                if model in of:
                    raise ValueError(f"model {model!r} is in the pools {of[model]!r} and {name!r}")
                of[model] = name
        if self.pools and (left := [model for model in ids if model not in of]):
            raise ValueError(f"{', '.join(left)}: in no pool")
        return self

    @model_validator(mode="after")
    def _pinned_models_fit(self) -> Self:
        for pool in self.all_pools().values():
            room = pool.max_models_per_replica or self.max_models_per_replica
            pinned = [entry.id for entry in self.models if entry.pinned and entry.id in pool.models]
            if len(pinned) > room or (len(pinned) == room and len(pinned) < len(pool.models)):
                raise ValueError(
                    f"{len(pinned)} pinned models ({', '.join(pinned)}) leave no room among "
                    f"max_models_per_replica={room} for the others"
                )
        return self

    def all_pools(self) -> dict[str, Pool]:
        """The pools by name; the one of all models, where none are configured, is called "all"."""
        return self.pools or {"all": Pool(models=[entry.id for entry in self.models])}

    def of_pool(self, pool: Pool) -> Self:
        """These arguments as the replicas of a pool see them: with its models alone."""
        return self.model_copy(
            update={
                "models": [entry for entry in self.models if entry.id in pool.models],
                "max_models_per_replica": pool.max_models_per_replica or self.max_models_per_replica,
                "pools": {},
            }
        )

    def by_name(self) -> dict[str, ModelEntry]:
        """Every id and alias with its entry."""
        return {name: entry for entry in self.models for name in entry.names}


def unknown_model(name: str, args: AppArgs) -> ModelNotFound:
    """The error for a name that no model has."""
    known = ", ".join(entry.id for entry in args.models)
    return ModelNotFound(f"The model {name!r} does not exist. Configured: {known}.", param="model")


def parse_args(args: Mapping[str, Any] | AppArgs, source: str = "args") -> AppArgs:
    """The application's arguments, checked.

    Args:
        source: where they come from, for the message.

    Raises:
        ConfigError: something is wrong; every fault is listed with its place and the fix.
    """
    if isinstance(args, AppArgs):
        return args
    try:
        checked = AppArgs.model_validate(args)
    except ValidationError as error:
        raise _config_error([_describe(fault) for fault in error.errors()], source) from None
    faults = [
        f"models[{index}].api.default_params.{key}: {fault}"
        for index, entry in enumerate(checked.models)
        for key, fault in default_faults(entry.api.default_params, checked.api)
    ]
    if faults:
        raise _config_error(faults, source)
    return checked


def _config_error(faults: list[str], source: str) -> ConfigError:
    lines = "\n".join(f"  {fault}" for fault in faults)
    return ConfigError(f"{source}:\n{lines}")


def _describe(fault: Any) -> str:
    place = _place(fault["loc"])
    if fault["type"] == "extra_forbidden" or fault["type"] == "unexpected_keyword_argument":
        return f"{place}: unknown key{_nearest(fault['loc'])}"
    if fault["type"] in ("missing", "missing_keyword_only_argument"):
        return f"{place}: missing"
    shown = repr(fault["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{place}: {fault['msg'].removeprefix('Value error, ')} (got {shown})"


def _place(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "args"


def _nearest(loc: tuple[int | str, ...]) -> str:
    known, wrong = _known_keys(loc[:-1]), str(loc[-1])
    close = [key for key in known if key.startswith(wrong)] or difflib.get_close_matches(wrong, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(known)})"


def _known_keys(path: tuple[int | str, ...]) -> list[str]:
    """The keys allowed at a place of the configuration."""
    model: Any = AppArgs
    for before, part in zip((None, *path), path, strict=False):
        if isinstance(part, int) or before == "pools":
            continue
        model = _type_of(model, part)
    return list(_fields(model))


def _fields(model: Any) -> dict[str, Any]:
    return dict(getattr(model, "model_fields", None) or getattr(model, "__dataclass_fields__", {}))


def _type_of(model: Any, key: str) -> Any:
    nested = {"models": ModelEntry, "pools": Pool}
    if key in nested:
        return nested[key]
    return getattr(_fields(model).get(key), "annotation", None)
