"""The chat completion objects: https://platform.openai.com/docs/api-reference/chat"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from deployments.openai.fields.fields import Alternatives, Count, RequestBody
from deployments.openai.fields.logprobs import ChatLogprobs
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import CHAT
from deployments.openai.fields.sampling import GenerationBody
from deployments.openai.fields.usage import UsageObject


class TemplateFields(RequestBody):
    """What shapes the prompt that a chat template writes."""

    tools: list[Any] | None = Field(default=None, description="Functions the model may call.")
    tool_choice: Any = Field(default=None, description="none, auto, required, or the function to call.")
    add_generation_prompt: bool | None = Field(default=None, description="Open the assistant's turn.")
    continue_final_message: bool = Field(default=False, description="Continue the last message.")
    chat_template: str | None = Field(
        default=None, max_length=65536, description="Template in place of the model's; only if the server allows it."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )
    documents: list[Any] | None = Field(default=None, description="Passed to the chat template.")
    reasoning_effort: str | None = Field(default=None, max_length=32, description="Passed to the chat template.")


class AnswerFields(TemplateFields):
    """Fields of a chat that a response has under other names, or from the model's defaults only."""

    max_tokens: Count | None = Field(default=None, description="None generates as many as fit.")
    max_completion_tokens: Count | None = Field(default=None, description="The same as max_tokens.")
    include_reasoning: bool = Field(default=True, description="False leaves reasoning_content out.")

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most."""
        limits = [limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None]
        return min(limits, default=None)


class ChatBody(AnswerFields, GenerationBody):
    """A conversation to be continued by the assistant."""

    foreign: ClassVar[Rows] = CHAT
    answer_prefix: ClassVar[str] = "chatcmpl-"

    messages: list[Any] = Field(
        description="Messages with role (system, user, assistant, tool) and content (a string or a list of parts).",
        examples=[[{"role": "user", "content": "What is 27 + 15?"}]],
    )
    logprobs: bool = Field(default=False, description="Report the log-probabilities of the answer's tokens.")
    top_logprobs: Alternatives | None = Field(
        default=None, description="Number of tokens to report beside each; -1 reports all."
    )
    echo: bool = Field(default=False, description="Begin the answer with the final message that it continues.")
    parallel_tool_calls: bool = Field(default=True, description="False keeps the first call alone.")
    return_prompt_text: bool = Field(default=False, description="Report the prompt as the chat template wrote it.")


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None
    token_ids: NotRequired[Sequence[int]]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_text: NotRequired[str | None]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: NotRequired[str]


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class MessageDelta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChunkChoice(TypedDict):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[Sequence[int]]


class ChatCompletionChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: NotRequired[UsageObject | None]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]
