"""Options of the API as a whole, the `api:` section of serve_config.yaml, and of each model's part of it."""

from __future__ import annotations

import ipaddress

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ApiOptions(BaseModel):
    """What the server accepts and how it answers, the same for all models.

    Attributes:
        api_keys: keys that open the API, as they are or as `sha256:<hex digest>`; none at all leaves it open.
        admin_keys: keys that open the admin routes too, which no other key does; none closes those routes.
        api_keys_file: further keys, one a line, read again when the file changes.
        cors_origins: origins whose pages may call the API from a browser; `*` is every one.
        default_model: answers requests that name no model; None means the only model where there is one.
        strict_parameters: refuse unknown request fields instead of listing them in a response header.
        allow_request_chat_template: requests may bring a chat template of their own.
        chat_template_timeout_s, chat_template_max_bytes: processor time and memory that such a template may take; by
            the clock, twice the time.
        max_body_bytes, max_header_bytes: larger requests are refused.
        max_choices: choices (prompts times n) of one request at most.
        max_logprobs: alternatives reported per token at most; -1 sets no limit, and requests may ask for all (-1).
        heartbeat_seconds: after so many silent seconds send white space, and again after as many, so that a client's
            read timeout does not strike while the model computes. The status is 200 from then on. 0 is off.
        media_urls: fetch images and recordings that messages name by http(s) URL; data: URIs are always read.
        media_networks: networks besides the public internet that URLs may lead to, such as 10.0.0.0/8.
        media_max_bytes, media_timeout_s: of one fetch at most, from looking its name up to the last byte.
        media_max_parts: images and recordings of one request at most.
        media_max_pixels: of the images of one request together.
        media_max_samples: of the recordings of one request together, as their files have them, over all channels.
        max_audio_seconds: of the recordings of one request together.
        stream_usage: report token counts in every stream, as if each request asked for it.
        record_dir: folder for a JSONL record of every request and its answer, readable by this user alone; None records
            nothing.
        record_max_bytes: a file of the record that is larger is followed by a new one.
        body_timeout_s: a request whose body does not come on for this long is refused with 408.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
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
    body_timeout_s: float = Field(default=60, gt=0)

    @field_validator("media_networks")
    @classmethod
    def _are_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            ipaddress.ip_network(network)
        return networks
