"""Options of the API as a whole, the `api:` section of serve_config.yaml, and of each model's part of it."""

from __future__ import annotations

import ipaddress
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BatchOptions(_Section):
    """Limits of files and batches. They are kept in `state_dir`."""

    enabled: bool = Field(default=True, description="Answer `/v1/files` and `/v1/batches` if `state_dir` is set.")
    file_mib: float = Field(default=200.0, gt=0, description="Maximum size of an uploaded file.")
    file_lines: int = Field(default=50_000, ge=1, description="Maximum number of lines of an uploaded file.")
    disk_gib: float = Field(
        default=20.0, gt=0, description="Size of all files; more uploads are refused, and batches wait."
    )
    concurrency: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of lines of a model at once; without it, three quarters of its batch size.",
    )


class CaptureOptions(_Section):
    """Where captured states are kept, and how much of them."""

    enabled: bool = Field(default=True, description="Requests can capture states of the models.")
    dir: str | None = Field(
        default=None,
        description="Folder in which each replica makes one for its files. Without it, that is a temporary one.",
    )
    gib: float = Field(default=4.0, gt=0, description="Size of all files of a replica; more requests wait.")
    per_choice_mib: float = Field(default=512.0, gt=0, description="Maximum size of the file of one choice.")
    ttl_s: float = Field(default=600.0, gt=0, description="Seconds until a file is deleted.")
    inline_kib: float = Field(default=1024.0, gt=0, description="Maximum size of a capture in the answer itself.")
    vectors_ttl_s: float = Field(
        default=86400.0, gt=0, description="Seconds without use until an uploaded vector is dropped."
    )


class ApiOptions(_Section):
    """Options of the API that are the same for all models.

    Attributes:
        api_keys: keys of the API, as plain text or as `sha256:<hex digest>`; if there are none, the API is open.
        admin_keys: keys of the admin routes and of the API; if there are none, the admin routes are closed.
        admin_roots: folders below which models that POST /admin/models adds must lie.
        vllm_lora_routes: answer vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter, which need an admin key.
        api_keys_file: file with more keys, one per line; it is read again when it changes.
        cors_origins: origins whose pages can call the API from a browser; `*` allows every origin.
        default_model: model of requests that do not name one; None is the only model, if there is one.
        strict_parameters: refuse unknown request fields instead of listing them in a response header.
        allow_request_chat_template: requests can contain a chat template.
        chat_template_timeout_s, chat_template_max_bytes: maximum processor time and memory to render such a
            template; the limit by the clock is twice as long.
        max_body_bytes, max_header_bytes: larger requests are refused.
        max_choices: maximum number of choices (prompts times n) of a request.
        max_logprobs: maximum number of alternatives per token; -1 sets no limit, and requests can ask for all (-1).
        heartbeat_seconds: send white space each time nothing was sent for this many seconds, so that a client's read
            timeout does not end the request while the model computes. The status is then 200. 0 is off.
        media_urls: fetch images and recordings from the http(s) URLs in messages; data: URIs are always read.
        media_networks: private networks that URLs can lead to, such as 10.0.0.0/8.
        media_max_bytes, media_timeout_s: maximum size and time of a fetch, from the name lookup to the last byte.
        media_max_parts: maximum number of images and recordings of a request.
        media_max_pixels: maximum number of pixels of all images of a request.
        media_max_samples: maximum number of samples of all recordings of a request, over all channels.
        max_audio_seconds: maximum length of all recordings of a request.
        stream_usage: report token counts in every stream, as if each request asked for it.
        record_dir: folder for a JSONL record of every request and its answer, readable only by this user; None
            records nothing.
        record_max_bytes: size at which a new record file is started.
        resume: answer a call that the record has, by the same model, greedy or with a seed, from the record.
        captures: files of captured states, and uploaded vectors.
        batches: limits of uploaded files and batches.
        body_timeout_s: if no part of a request's body arrives for this many seconds, it is refused with 408.
    """

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    admin_roots: tuple[str, ...] = ()
    vllm_lora_routes: bool = False
    api_keys_file: str | None = None
    cors_origins: tuple[str, ...] = ()
    default_model: str | None = None
    strict_parameters: bool = False
    allow_request_chat_template: bool = False
    chat_template_timeout_s: float = Field(default=5, gt=0)
    chat_template_max_bytes: int = Field(default=256 * 2**20, ge=2**20)
    max_body_bytes: int = Field(default=64 * 2**20, ge=1024)
    max_header_bytes: int = Field(default=64 * 2**10, ge=1024)
    max_choices: int = Field(default=1024, ge=1)
    max_logprobs: int = Field(default=20, ge=-1)
    heartbeat_seconds: float = Field(default=0, ge=0)
    media_urls: bool = False
    media_networks: tuple[str, ...] = ()
    media_max_bytes: int = Field(default=20 * 2**20, ge=1024)
    media_timeout_s: float = Field(default=10, gt=0)
    media_max_parts: int = Field(default=256, ge=1)
    media_max_pixels: int = Field(default=256 * 2**20, ge=1)
    media_max_samples: int = Field(default=512 * 2**20, ge=1)
    max_audio_seconds: float = Field(default=3600, gt=0)
    stream_usage: bool = False
    record_dir: str | None = None
    record_max_bytes: int = Field(default=256 * 2**20, ge=1024)
    resume: bool = False
    captures: CaptureOptions = Field(default_factory=CaptureOptions)
    batches: BatchOptions = Field(default_factory=BatchOptions)
    body_timeout_s: float = Field(default=60, gt=0)

    @model_validator(mode="after")
    def _resumes_from_a_record(self) -> Self:
        if self.resume and self.record_dir is None:
            raise ValueError("resume needs record_dir, the folder of the record that answers")
        return self

    @field_validator("media_networks")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks
