"""One model of the configuration: an entry under `models`."""

from __future__ import annotations

import re
import time
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deployments.config.engine import EngineOptions
from deployments.core.model_card import ModelCard, ModelOptions
from model_loaders.loader_name import new_place

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_RENAMED = {"max_rows": "max_batch_size", "rows": "continuous_batching", "one_shot": "generate"}
"""Keys and values of the `engine` section in earlier versions."""


OF_THE_BASE = ("engine", "adapters", "hook_timeout_s", "max_prompt_chars", "load_timeout_s", "load_retry_s")
"""What an adapter has of its base."""


class Strict(BaseModel):
    """A section that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AdapterOptions(Strict):
    """Options of the adapters over a model."""

    memory_gib: float = Field(
        default=2.0, gt=0, description="Memory for adapters; the least recently used ones that are idle leave."
    )
    max_rank: int = Field(default=512, ge=1, description="Adapters of a higher rank are refused.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Type of the adapters' matrices, in which their part is computed."
    )


class ModelEntry(Strict):
    """One model that clients can request: what a loader loads, or an adapter over another model.

    An adapter has the loader, the engine and the limits of its base, see `over`.
    """

    id: str = Field(min_length=1, description="The name that clients send as `model`.")
    base: str | None = Field(default=None, min_length=1, description="Id of the model that an adapter changes.")
    adapter: str | None = Field(default=None, min_length=1, description="Folder of a PEFT adapter over `base`.")
    loader: str = Field(
        default="", validate_default=True, description="`module:function`, or `path/to/file.py:function`."
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Arguments of the loader.")
    aliases: list[str] = Field(default_factory=list, description="Other names of the same model.")
    engine: EngineOptions = Field(default_factory=EngineOptions, description="Options of its engine.")
    api: ModelOptions = Field(default_factory=ModelOptions, description="Options of its requests and answers.")
    adapters: AdapterOptions = Field(default_factory=AdapterOptions, description="Options of the adapters over it.")
    pinned: bool = Field(
        default=False, description="Load the model at start; it is not evicted, only unloaded by /admin/unload."
    )
    preload: bool = Field(default=False, description="Load the model at start; it can be evicted.")
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Further names of the model, each with default request fields such as `interventions`.",
    )
    inside: Literal["intervene", "capture", "off"] = Field(
        default="intervene", description="What requests may do inside the model: capture and intervene, or less."
    )
    idle_unload_s: float | None = Field(
        default=None, gt=0, description="Seconds without a request until it is unloaded."
    )
    profile_dir: str | None = Field(default=None, description="Folder for a trace of its first requests.")
    hook_timeout_s: float = Field(
        default=60.0, gt=0, description="Seconds until an encode, template or decode hook counts as hung."
    )
    max_prompt_chars: int | None = Field(
        default=None, ge=1, description="Longer texts are refused; None is 128 per token of the context."
    )
    marker: str | None = Field(
        default=None, min_length=1, description="A file that the writer of the folder writes last."
    )
    load_timeout_s: float = Field(default=3600.0, gt=0, description="Seconds until a loader counts as hung.")
    load_retry_s: float = Field(default=60.0, ge=0, description="Seconds until a failed load is tried again.")

    _created: int = PrivateAttr(default_factory=lambda: int(time.time()))

    @field_validator("id", "aliases", "variants")
    @classmethod
    def _can_be_written_in_a_line(cls, names: Any) -> Any:
        for name in [names] if isinstance(names, str) else names:
            if not name or name != name.strip():
                raise ValueError(f"remove the white space around {name!r}" if name.strip() else "a name is empty")
            if _CONTROL.search(name):
                raise ValueError(f"remove the control characters of {name!r}, such as line breaks")
        return names

    @field_validator("engine", mode="before")
    @classmethod
    def _has_new_names(cls, engine: Any) -> Any:
        for key, value in engine.items() if isinstance(engine, dict) else ():
            if key in _RENAMED:
                raise ValueError(f"{key} is now {_RENAMED[key]}")
            if key == "kind" and value in _RENAMED:
                raise ValueError(f"kind {value} is now {_RENAMED[value]}")
        return engine

    @field_validator("loader")
    @classmethod
    def _has_not_moved(cls, loader: str, info: ValidationInfo) -> str:
        if not loader and not (info.data.get("base") or info.data.get("adapter")):
            raise PydanticCustomError("missing", "Field required")
        if new := new_place(loader):
            raise ValueError(f"this loader is now {new}")
        return loader

    @model_validator(mode="after")
    def _has_both_or_neither(self) -> Self:
        if (self.base is None) != (self.adapter is None):
            raise ValueError("an adapter has both keys: base, the id of a model, and adapter, a folder")
        return self

    def over(self, base: ModelEntry) -> ModelEntry:
        """This adapter with what it has of its base, where it says nothing itself."""
        own = {"base": base.id} if "api" in self.model_fields_set else {"base": base.id, "api": base.api}
        kept = self.model_copy(update={name: getattr(base, name) for name in OF_THE_BASE} | own)
        kept.date(self._created)
        return kept

    def merged(self, base: ModelEntry) -> ModelEntry:
        """This adapter as a model of its own, which is loaded as its base is and has the adapter merged into it."""
        own = {name: getattr(self, name) for name in ("id", "aliases", "variants", "api", "adapter")}
        return base.model_copy(update={**own, "pinned": False, "preload": False, "profile_dir": None})

    @property
    def names(self) -> list[str]:
        return [self.id, *self.aliases, *self.variants]

    @property
    def card(self) -> ModelCard:
        names = (*self.aliases, *self.variants)
        return ModelCard(id=self.id, aliases=names, options=self.api, created=self._created, parent=self.base)

    def defaults(self, name: str) -> dict[str, Any]:
        """The default request fields under one of the model's names."""
        return {**self.api.default_params, **self.variants.get(name, {})}

    def date(self, created: int) -> None:
        """Set when the model was made, in seconds since the epoch, if that is known."""
        self._created = created
