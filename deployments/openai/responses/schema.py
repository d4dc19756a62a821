"""The response objects: https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from deployments.openai.fields.fields import Alternatives, Count, RequestObject
from deployments.openai.fields.inside import CaptureHandle
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import REASONING, RESPONSES
from deployments.openai.fields.sampling import GenerationBody


class TextFormat(RequestObject):
    """What the text is; a schema stands beside its type here, not in an object of its own."""

    type: Literal["text", "json_object", "json_schema"] = Field(description="What the text is.")
    name: str | None = Field(default=None, description="Name of the schema; no effect.")
    description: str | None = Field(default=None, description="Description of the schema; no effect.")
    schema_: dict[str, Any] | None = Field(default=None, alias="schema", description="The JSON schema.")
    strict: bool | None = Field(default=None, description="Accepted; the schema is always enforced.")


class TextConfig(RequestObject):
    """How the text is written."""

    format: TextFormat | None = Field(default=None, description="What the text is.")
    verbosity: Literal["medium"] | None = Field(default=None, description="Only medium; no effect.")


class ReasoningConfig(RequestObject):
    """How long the model thinks; passed to the chat template."""

    foreign: ClassVar[Rows] = REASONING

    effort: str | None = Field(default=None, max_length=32, description="Passed to the chat template.")
    summary: str | None = Field(default=None, description="Accepted, no effect.")
    generate_summary: str | None = Field(default=None, description="Accepted, no effect.")


class ResponsesBody(GenerationBody):
    """A conversation to be continued, in the items of the Responses API. Nothing is stored."""

    foreign: ClassVar[Rows] = RESPONSES
    answer_prefix: ClassVar[str] = "resp_"

    input: str | list[Any] = Field(
        description="A user's text, or a list of items: messages, function calls and their outputs.",
        examples=["What is 27 + 15?"],
    )
    n: Literal[1] = Field(default=1, description="A response has one answer.")
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: Count | None = Field(default=None, description="None generates as many as fit.")
    top_logprobs: Alternatives | None = Field(
        default=None, description="Number of tokens to report beside each; -1 reports all."
    )
    include: list[str] = Field(default_factory=list, description="message.output_text.logprobs")
    text: TextConfig = Field(default_factory=TextConfig, description="`format`: text, or JSON that follows a schema.")
    reasoning: ReasoningConfig = Field(
        default_factory=ReasoningConfig, description="`effort`: passed to the chat template."
    )
    tools: list[Any] = Field(default_factory=list, description="Functions the model may call.")
    tool_choice: Any = Field(default=None, description="none, auto, required, or the function to call.")
    parallel_tool_calls: bool = Field(default=True, description="False keeps the first call alone.")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )


Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(TypedDict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningText(TypedDict):
    type: Literal["reasoning_text"]
    text: str


class MessageItem(TypedDict):
    type: Literal["message"]
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class FunctionCallItem(TypedDict):
    type: Literal["function_call"]
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class ReasoningItem(TypedDict):
    type: Literal["reasoning"]
    id: str
    status: Status
    summary: list[Any]
    content: list[ReasoningText]


Item = MessageItem | FunctionCallItem | ReasoningItem


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    reason: Literal["max_output_tokens"]


class ResponseObject(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int | None]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    error: Any
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    model: str
    output: list[Item]
    parallel_tool_calls: bool
    previous_response_id: None
    reasoning: dict[str, Any]
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    metadata: dict[str, Any]
    capture: NotRequired[CaptureHandle]
