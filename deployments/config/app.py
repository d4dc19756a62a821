"""The schema of `args` in serve_config.yaml. Unknown keys are errors that name the nearest known one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from deployments.config.api import ApiOptions
from deployments.config.booleans import booleans_for_numbers
from deployments.config.explain import config_error, descriptions, nearest
from deployments.config.model import OF_THE_BASE, ModelEntry, Strict
from deployments.config.sources import FolderSource, HubSource
from deployments.core.errors import ModelNotFound

IMPORT_PATH = "deployments.app:build_app"
"""The `import_path` of an application of Troupe."""

_SHOWN = 20
"""Names that an error lists."""


class Pool(Strict):
    """A deployment of replicas for some of the models."""

    models: list[str] = Field(min_length=1, description="Ids of the models in the pool.")
    replicas: int | None = Field(default=None, ge=1, description="Number of replicas; None is one for every GPU.")
    gpus_per_replica: float | None = Field(default=None, ge=0, description="None is 1 if the cluster has GPUs.")
    max_models_per_replica: int | None = Field(default=None, ge=1, description="None takes the application's value.")


class AppArgs(Strict):
    """`args` of the application: the models, and how replicas and the API behave."""

    models: list[ModelEntry] = Field(min_length=1)
    max_models_per_replica: int = Field(default=1, ge=1, description="Models that a replica holds at the same time.")
    stream_interval_ms: float = Field(
        default=20.0,
        ge=0,
        description="Minimum time between two chunks of a stream, after the first token; longer if a replica has many "
        "streams or few cores. 0 sends every token at once, however many there are.",
    )
    host_memory_gib: float = Field(
        default=0.0,
        ge=0,
        description="Host memory of a replica for the weights of unloaded models, which makes their next load quick.",
    )
    swap_patience_s: float = Field(
        default=2.0, ge=0, description="Seconds that a request waits before a model in use is unloaded for it."
    )
    settle_s: float = Field(
        default=3.0, ge=0, description="Seconds without a write until the files of a rewritten model are loaded."
    )
    max_concurrent_requests: int | None = Field(
        default=None, ge=1, description="More concurrent requests are refused with 429; None sets no limit."
    )
    pools: dict[str, Pool] = Field(
        default_factory=dict, description="Deployments of replicas by name; if empty, one serves all models."
    )
    folders: list[FolderSource] = Field(
        default_factory=list, description="Folders that become models while the server runs."
    )
    hub: HubSource | None = Field(default=None, description="Models of the Hub that clients can request by name.")
    state_dir: str | None = Field(
        default=None, description="Folder for files and batches, and the models that POST /admin/models adds."
    )
    api: ApiOptions = Field(default_factory=ApiOptions, description="Options of the HTTP API.")
    folder: str | None = Field(
        default=None, description="Folder that relative paths start from; None is the configuration file's."
    )

    @field_validator("models")
    @classmethod
    def _names_are_unique(cls, models: list[ModelEntry]) -> list[ModelEntry]:
        seen: dict[str, str] = {}
        for entry in models:
            for position, name in enumerate(entry.names):
                if name in entry.names[:position]:
                    raise ValueError(f"model {entry.id!r} has the name {name!r} twice")
                if name in seen:
                    if seen[name] == entry.id:
                        raise ValueError(f"two models have the id {name!r}; give one of them another")
                    raise ValueError(f"{name!r} names both model {seen[name]!r} and model {entry.id!r}")
                seen[name] = entry.id
        return models

    @model_validator(mode="after")
    def _adapters_have_bases(self) -> Self:
        known = self.by_name()
        for index, entry in enumerate(self.models):
            if entry.base is not None:
                self.models[index] = _adapter(entry, known, f"models[{index}]")
        return self

    @model_validator(mode="after")
    def _sources_are_like_a_model(self) -> Self:
        models = [entry.id for entry in self.models if entry.base is None]
        named = [("like", source.like) for source in (*self.folders, *((self.hub,) if self.hub else ()))]
        named += [("base", source.base) for source in self.folders]
        for key, name in named:
            if name is not None and name not in models:
                raise ValueError(f"{key}: there is no model {name!r} among models")
        return self

    @model_validator(mode="after")
    def _every_model_has_one_pool(self) -> Self:
        ids = [entry.id for entry in self.models if entry.base is None]
        adapters = [entry.id for entry in self.models if entry.base is not None]
        of: dict[str, str] = {}
        for name, pool in self.pools.items():
            for model in pool.models:
                if model in adapters:
                    raise ValueError(f"pool {name!r} has the adapter {model!r}, which is in the pool of its base")
                if model not in ids:
                    raise ValueError(f"pool {name!r} has the model {model!r}, which is not among models")
                if model in of:
                    raise ValueError(f"model {model!r} is in the pools {of[model]!r} and {name!r}")
                of[model] = name
        if self.pools and (left := [model for model in ids if model not in of]):
            raise ValueError(f"add {', '.join(left)} to a pool: every model must be in one")
        return self

    @model_validator(mode="after")
    def _pinned_models_fit(self) -> Self:
        for pool in self.all_pools().values():
            room = pool.max_models_per_replica or self.max_models_per_replica
            pinned = [entry.id for entry in self.models if entry.pinned and entry.id in pool.models]
            if len(pinned) > room or (len(pinned) == room and len(pinned) < len(pool.models)):
                raise ValueError(
                    f"{len(pinned)} pinned models ({', '.join(pinned)}) leave no room for other models; "
                    f"raise max_models_per_replica (now {room})"
                )
        return self

    def all_pools(self) -> dict[str, Pool]:
        """The pools by name. If none are configured, a pool named "all" has all models."""
        return self.pools or {"all": Pool(models=[entry.id for entry in self.models if entry.base is None])}

    def pool_of(self) -> dict[str, str]:
        """The pool of each model; that of an adapter is its base's."""
        of = {model: name for name, pool in self.all_pools().items() for model in pool.models}
        return {entry.id: of[entry.base or entry.id] for entry in self.models}

    def of_pool(self, pool: Pool) -> Self:
        """The arguments for the replicas of a pool: only its models, and the adapters over them."""
        return self.model_copy(
            update={
                "models": [entry for entry in self.models if (entry.base or entry.id) in pool.models],
                "max_models_per_replica": pool.max_models_per_replica or self.max_models_per_replica,
                "pools": {},
            }
        )

    @property
    def has_registry(self) -> bool:
        """Whether models can come while the server runs."""
        return bool(self.folders or self.hub or self.api.admin_keys)

    @property
    def batches_dir(self) -> Path | None:
        """The folder of files and batches; None if the server has none."""
        if self.state_dir is None or not self.api.batches.enabled:
            return None
        return Path(self.folder or "", self.state_dir) / "batches"

    def by_name(self) -> dict[str, ModelEntry]:
        """Maps every id and alias to its model."""
        return {name: entry for entry in self.models for name in entry.names}


def _adapter(entry: ModelEntry, known: Mapping[str, ModelEntry], place: str) -> ModelEntry:
    """An adapter of the configuration with what it has of its base."""
    base = known.get(entry.base or "")
    if base is None:
        models = [name for name, other in known.items() if other.base is None]
        raise ValueError(
            f"{place}.base: there is no model {entry.base!r} among models{nearest(entry.base or '', models)}"
        )
    if base.base is not None:
        raise ValueError(
            f"{place}.base: {entry.base!r} is an adapter itself; name the model that both are over, or merge the first"
        )
    if extra := sorted(
        entry.model_fields_set & {*OF_THE_BASE, "loader", "kwargs", "pinned", "idle_unload_s", "profile_dir"}
    ):
        raise ValueError(f"{place}.{extra[0]}: an adapter has this of its base {base.id!r}; remove the key")
    return entry.over(base)


def unknown_model(name: str, known: Iterable[ModelEntry]) -> ModelNotFound:
    """The error for a name that is not a model.

    Args:
        known: the models that can be requested.
    """
    names = [name for entry in known for name in (entry.id, *entry.variants)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    error = ModelNotFound(
        f"The model {name!r} does not exist. This server has: {', '.join(names[:_SHOWN])}{more}.", param="model"
    )
    error.model = name
    return error


def parse_args(args: Mapping[str, Any] | AppArgs, source: str = "args") -> AppArgs:
    """Validates the arguments of the application.

    Args:
        source: where the arguments come from, for the error message.

    Raises:
        ConfigError: lists every fault with its place and the fix.
    """
    if isinstance(args, AppArgs):
        return args
    faults = list(booleans_for_numbers(args, AppArgs))
    try:
        checked = AppArgs.model_validate(args)
    except ValidationError as error:
        faults += descriptions(error, AppArgs)
    if faults:
        raise config_error(faults, source)
    return checked
