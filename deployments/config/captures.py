"""Options of captured states, the `captures:` part of the `api` section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class CaptureOptions(BaseModel):
    """Where captured states are kept, and how much of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(default=True, description="Requests can capture states of the models.")
    dir: str | None = Field(
        default=None,
        description="Folder for the files; each replica makes one of its own in it. Without it, that is a temporary one.",
    )
    gib: float = Field(default=4.0, gt=0, description="Size of all files of a replica; more requests wait.")
    per_choice_mib: float = Field(default=512.0, gt=0, description="Maximum size of the file of one choice.")
    ttl_s: float = Field(default=600.0, gt=0, description="Seconds until a file is deleted.")
    inline_kib: float = Field(default=1024.0, gt=0, description="Maximum size of a capture in the answer itself.")
    vectors_ttl_s: float = Field(
        default=86400.0, gt=0, description="Seconds without use until an uploaded vector is dropped."
    )
