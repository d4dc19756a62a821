"""The objects of files and batches: https://platform.openai.com/docs/api-reference/batch"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, Field, WithJsonSchema
from typing_extensions import TypedDict

from deployments.openai.fields.fields import RequestBody, Whole

_MIN_EXPIRY_S, _MAX_EXPIRY_S = 3600, 30 * 86400
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class ExpiresAfter(BaseModel):
    """When a file is deleted: a number of seconds after it was made."""

    anchor: Literal["created_at"] = Field(description="Always created_at.")
    seconds: Annotated[Whole, Field(ge=_MIN_EXPIRY_S, le=_MAX_EXPIRY_S)] = Field(description="From an hour to 30 days.")


class UploadBody(RequestBody):
    """A file of JSON lines."""

    file: Annotated[bytes, WithJsonSchema({"type": "string", "format": "binary"})] = Field(
        description="One request as JSON per line."
    )
    purpose: Literal["batch"] = Field(description="What the file is for.")
    expires_after: ExpiresAfter | None = Field(
        default=None, description="As the fields expires_after[anchor] and expires_after[seconds]."
    )


class BatchBody(RequestBody):
    """A batch of requests."""

    input_file_id: str = Field(min_length=1, description="Id of the uploaded file.")
    endpoint: str = Field(description="Route of all requests, such as /v1/chat/completions.")
    completion_window: str = Field(description="Time until the batch expires, such as 24h, 90m or 7d.")
    metadata: Metadata | None = Field(default=None, description="Up to 16 texts of the client.")
    output_expires_after: ExpiresAfter | None = Field(default=None, description="When the result files are deleted.")


class FileObject(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: NotRequired[int]
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class FileList(TypedDict):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str
    last_id: str
    has_more: bool


class DeletedFile(TypedDict):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchError(TypedDict):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchErrors(TypedDict):
    object: Literal["list"]
    data: list[BatchError]


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(TypedDict):
    object: Literal["list"]
    data: list[BatchObject]
    first_id: str
    last_id: str
    has_more: bool
