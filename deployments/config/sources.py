"""Where models come from while the server runs: watched folders, the Hub, `POST /admin/models`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from deployments.config.model import ModelEntry, Strict

SPEC = '{"entry":'
"""How a `Spec` begins as JSON."""
Origin = Literal["yaml", "post", "folder", "hub"]


class Source(Strict):
    """What the sections `folders` and `hub` have in common."""

    like_key: str = Field(default="model_name", min_length=1, description="Argument of the loader that gets the model.")


class FolderSource(Source):
    """Folders that become models while the server runs, such as the checkpoints of a training run."""

    glob: str = Field(min_length=1, description="Pattern of the folders' paths.")
    like: str | None = Field(
        default=None, min_length=1, description="Id of the model whose loader and options the models in them have."
    )
    base: str | None = Field(default=None, min_length=1, description="Id of the model that adapters in them change.")
    id: str = Field(
        default="{name}",
        min_length=1,
        description="The models' ids: {name} is the folder's name, {parent} its parent's name, {step} its last number "
        "(folders without one are left out).",
    )
    every_s: float = Field(default=5.0, gt=0, description="Seconds between two searches for new folders.")

    @model_validator(mode="after")
    def _says_what_they_are(self) -> Self:
        if self.like is None and self.base is None:
            raise ValueError("name a model with like, whose loader and options are used, or with base, for adapters")
        return self

    @field_validator("id")
    @classmethod
    def _has_known_names(cls, template: str) -> str:
        try:
            template.format(name="a", parent="b", step=1)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError("write {name}, {parent} or {step} in braces, and nothing else") from error
        return template


class HubSource(Source):
    """Models of the Hub that clients can request by their names."""

    like: str = Field(min_length=1, description="Id of the model whose loader and options are used.")
    allow: list[str] = Field(min_length=1, description="Patterns of the names, such as org/*.")


class Spec(BaseModel):
    """A model that was found while the server runs. It crosses to the replicas as JSON.

    Attributes:
        like: id of the model in the configuration that it is like; for an adapter, that of its base.
        source: its folder, or its name on the Hub.
        listed: it is in /v1/models.
        created: when its files were written, else when it came, in seconds since the epoch.
        parent: the base of an adapter, if that too was found while the server runs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    entry: ModelEntry
    origin: Origin
    like: str
    source: str
    listed: bool = True
    created: int = 0
    parent: Spec | None = None

    def same(self, other: Spec) -> bool:
        """Whether both describe the same model in the same way."""
        state = {"listed", "created", "parent"}
        return self.model_dump(exclude=state) == other.model_dump(exclude=state)


def spec_like(
    like: ModelEntry, key: str, *, name: str, source: str, origin: Origin, created: int, **fields: object
) -> Spec:
    """A model with the loader and the options of another.

    Args:
        key: the argument of the loader that gets `source`.
        fields: further keys of the model's entry.

    Raises:
        ValidationError: a key has a value that cannot be used.
    """
    base = like.model_dump(exclude={"id", "aliases", "variants", "pinned", "preload", "profile_dir"})
    base["kwargs"] = {**like.kwargs, key: source}
    entry = ModelEntry.model_validate({**base, **fields, "id": name})
    return Spec(entry=entry, origin=origin, like=like.id, source=source, listed=origin != "hub", created=created)


def adapter_spec(
    base: ModelEntry, parent: Spec | None, *, name: str, source: str, origin: Origin, created: int, **fields: object
) -> Spec:
    """An adapter over a model.

    Args:
        parent: the base, if it was found while the server runs.
        source: the adapter's folder.
        fields: further keys of the adapter's entry.

    Raises:
        ValidationError: a key has a value that cannot be used.
    """
    entry = ModelEntry.model_validate({"id": name, "base": base.id, "adapter": source, **fields}).over(base)
    like = base.id if parent is None else parent.like
    return Spec(entry=entry, origin=origin, like=like, source=source, created=created, parent=parent)
