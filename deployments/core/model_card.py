"""What clients see of a model: its names, its limits and the options of its API.

Plain dataclasses of the standard library, as in `deployments.core.calls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options of a model's API. The same dataclass is the `api:` section of a model in serve_config.yaml.

    Attributes:
        merge_consecutive_roles: join consecutive messages of a role, for templates that require alternating roles.
        default_params: default values of request fields, such as `temperature`.
        pooling: how embeddings are computed from the states of the last layer. None takes the pooling of a
            sentence-transformers folder; for other models, the last token if attention is causal, else the mean.
        tool_parser: format of the model's tool calls, a key of `deployments.openai.parsing.syntax.SYNTAXES`; None
            finds it in the chat template.
        tools_without_template: write tools, calls and results as text if the chat template has no place for them. Calls
            are then read as JSON in `<tool_call>`.
        usage_timings: add time_to_first_token, total_time and tokens_per_second to `usage`.
        reasoning_parser: format of the model's reasoning, a key of `deployments.openai.parsing.syntax.MARKERS`; None
            finds it in the chat template or the vocabulary. Both parsers can be `response_template`, the tokenizer's
            own description of the two formats. It is also used if both are None.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "allow_inf_nan": False}

    merge_consecutive_roles: bool = False
    default_params: Mapping[str, Any] = field(default_factory=dict)
    pooling: Literal["mean", "last", "cls", "max", "weighted_mean", "mean_sqrt_len"] | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    usage_timings: bool = False
    tools_without_template: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What the API knows of a model without asking a replica.

    Attributes:
        max_model_len, fingerprint: set once the model was loaded; those of its last version.
        answers: how it writes tool calls and reasoning, and how that was found; set likewise.
        configured: it is in the configuration, and did not come while the server runs.
        parent: the id of the model that it is an adapter over; None for a model.
        variant: the name with default request fields of its own that it was asked for by; empty for the others.
        created: when its files were written, in seconds since the epoch, else when the server was started.
    """

    id: str
    aliases: tuple[str, ...] = ()
    max_model_len: int | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
    fingerprint: str = ""
    answers: Mapping[str, Any] | None = None
    created: int = 0
    configured: bool = True
    parent: str | None = None
    variant: str = ""
