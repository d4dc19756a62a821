"""Options of files and batches, the `batches:` part of the `api` section."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BatchOptions(BaseModel):
    """Limits of files and batches. They are kept in `state_dir`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    enabled: bool = Field(default=True, description="Answer `/v1/files` and `/v1/batches` if `state_dir` is set.")
    file_mib: float = Field(default=200.0, gt=0, description="Maximum size of an uploaded file.")
    file_lines: int = Field(default=50_000, ge=1, description="Maximum number of lines of an uploaded file.")
    disk_gib: float = Field(
        default=20.0, gt=0, description="Size of all files; more uploads are refused, and batches wait."
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of lines of a model at the same time; without it, three quarters of its batch size.",
    )
