"""The response objects: https://platform.openai.com/docs/api-reference/responses"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from deployments.openai.fields.fields import Alternatives, Count, RequestObject
from deployments.openai.fields.foreign import Rows
from deployments.openai.fields.foreign_table import REASONING, RESPONSES
from deployments.openai.fields.sampling import GenerationBody


class TextFormat(RequestObject):
    """What the text is; a schema stands beside its type here, not in an object of its own."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestObject):
    """How the text is written."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(RequestObject):
    """How long the model thinks; passed to the chat template."""

    foreign: ClassVar[Rows] = REASONING

    effort: str | None = Field(default=None, max_length=32)
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesBody(GenerationBody):
    """A conversation to be continued, in the items of the Responses API. Nothing is stored."""

    foreign: ClassVar[Rows] = RESPONSES
    answer_prefix: ClassVar[str] = "resp_"

    input: str | list[Any] = Field(
        description="A user's text, or a list of items: messages, function calls and their outputs.",
        examples=["What is 27 + 15?"],
    )
    n: Literal[1] = 1
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: Count | None = None
    top_logprobs: Alternatives | None = None
    include: list[str] = Field(default_factory=list, description="message.output_text.logprobs")
    text: TextConfig = Field(default_factory=TextConfig)
    reasoning: ReasoningConfig = Field(default_factory=ReasoningConfig)
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


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
