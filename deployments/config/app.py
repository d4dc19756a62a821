"""The schema of `args` in serve_config.yaml. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.config.api import ApiOptions
from deployments.config.explain import config_error, described
from deployments.config.model import ModelEntry, Strict
from deployments.core.errors import ModelNotFound

IMPORT_PATH = "deployments.app:build_app"
"""The `import_path` of an application of Troupe."""


class Pool(Strict):
    """Replicas that serve some of the models, with so many GPUs each."""

    models: list[str] = Field(min_length=1, description="Ids of the models it serves.")
    replicas: int | None = Field(default=None, ge=1, description="How many; None is one for every GPU, or set of GPUs.")
    gpus_per_replica: float | None = Field(default=None, ge=0, description="None is 1 where the cluster has GPUs.")
    max_models_per_replica: int | None = Field(default=None, ge=1, description="None is that of the application.")


class AppArgs(Strict):
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
    folder: str | None = Field(
        default=None, description="Where relative paths begin; None is the folder of the configuration file."
    )

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
        return AppArgs.model_validate(args)
    except ValidationError as error:
        raise config_error([described(fault, AppArgs) for fault in error.errors()], source) from None
