"""A model as clients see it: its names, its limits and how the API presents it.

Plain dataclasses of the standard library, as in `deployments.core.calls`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """How the API presents one model. The same dataclass is the `api:` section of a model in serve_config.yaml.

    Attributes:
        merge_consecutive_roles: join neighbouring messages of one role, for templates that insist on alternation.
        default_params: request fields for requests that leave them out, such as `temperature`.
        pooling: how embeddings are made of the last layer's states; None takes what a sentence-transformers folder
            says, else the last token's of a model with causal attention, the mean of another's.
        tool_parser: how this model writes its tool calls, a key of `deployments.openai.parsing.families.FAMILIES`; None
            takes it from the chat template.
        usage_timings: report time_to_first_token, total_time and tokens_per_second beside the token counts.
        reasoning_parser: how this model marks its reasoning, a key of `deployments.openai.parsing.reasoning.MARKERS`;
            None leaves it in the content. Either may be `response_template`, the tokenizer's own description of both,
            which is also taken where both are None.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    merge_consecutive_roles: bool = False
    default_params: Mapping[str, Any] = field(default_factory=dict)
    pooling: Literal["mean", "last", "cls", "max", "weighted_mean", "mean_sqrt_len"] | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    usage_timings: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a model without asking a replica, and, once it was loaded, of its limits."""

    id: str
    aliases: tuple[str, ...] = ()
    max_model_len: int | None = None
    options: ModelOptions = field(default_factory=ModelOptions)
