"""The objects of the Messages API: https://docs.anthropic.com/en/api/messages"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from typing_extensions import TypedDict

from deployments.openai.fields.constraint import ResponseFormat
from deployments.openai.fields.fields import MAX_WHOLE, RequestBody, RequestObject, Whole
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import COUNT_TOKENS, MESSAGES
from deployments.openai.fields.sampling import GenerationBody


class Metadata(RequestObject):
    """Who asks."""

    user_id: str | None = Field(default=None, description="Who asks: users take turns.")


class ThinkingConfig(RequestObject):
    """Whether and how long the model reasons."""

    type: Literal["enabled", "disabled", "adaptive"] = Field(
        description="Passed to the chat template as enable_thinking; a model without reasoning answers at once."
    )
    budget_tokens: Annotated[Whole, Field(ge=1, le=MAX_WHOLE)] | None = Field(
        default=None, description="Tokens of the reasoning, its markers included; it is closed then."
    )
    display: str | None = Field(default=None, description="Accepted; the reasoning is always shown.")


class OutputConfig(RequestObject):
    """How the answer is written."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="Passed to the chat template."
    )
    format: ResponseFormat | None = Field(default=None, description="JSON that the answer has to be.")


class PromptFields(RequestBody):
    """What shapes the prompt of a message."""

    messages: list[Any] = Field(
        min_length=1,
        description="Messages with role (user, assistant) and content (a string or a list of blocks).",
        examples=[[{"role": "user", "content": "What is 27 + 15?"}]],
    )
    system: str | list[Any] | None = Field(default=None, description="A text, or a list of blocks of text.")
    tools: list[Any] = Field(default_factory=list, description="Tools that the client runs; each with input_schema.")
    tool_choice: Any = Field(default=None, description="An object with type auto, any, none, or tool and its name.")
    thinking: ThinkingConfig | None = Field(default=None, description="Whether and how long the model reasons.")
    output_config: OutputConfig = Field(default_factory=OutputConfig, description="`effort` and `format`.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )


class CountTokensBody(PromptFields):
    """A message whose prompt is counted."""

    foreign: ClassVar[Rows] = COUNT_TOKENS
    computes: ClassVar[bool] = False


class MessagesBody(PromptFields, GenerationBody):
    """A conversation to be continued by the assistant, in the blocks of the Messages API."""

    foreign: ClassVar[Rows] = MESSAGES
    answer_prefix: ClassVar[str] = "msg_"

    max_tokens: Annotated[Whole, Field(ge=1, le=MAX_WHOLE)] = Field(description="Tokens to generate at most.")
    n: Literal[1] = Field(default=1, description="A message has one answer.")
    metadata: Metadata = Field(default_factory=Metadata, description="`user_id`: who asks; users take turns.")


class TextBlock(TypedDict):
    type: Literal["text"]
    text: str
    citations: None


class ThinkingBlock(TypedDict):
    type: Literal["thinking"]
    thinking: str
    signature: str


class ToolUseBlock(TypedDict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageUsage(TypedDict):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class Message(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int
