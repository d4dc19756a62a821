"""The text completion objects: https://platform.openai.com/docs/api-reference/completions"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import BeforeValidator, Field, SkipValidation
from typing_extensions import TypedDict

from deployments.openai.fields.fields import Alternatives, Count, TokenId, Whole, is_token_id
from deployments.openai.fields.inside import CaptureHandle
from deployments.openai.fields.logprobs import CompletionLogprobs
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import COMPLETIONS
from deployments.openai.fields.sampling import GenerationBody
from deployments.openai.fields.usage import UsageObject

PromptInput = str | list[int]


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(map(is_token_id, value))


def prompt_inputs(value: object) -> list[PromptInput]:
    """Any of the four shapes of a prompt as a list of texts and lists of token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("input should be a string, a list of strings, a list of token ids or a list of such lists")
    if _is_ids(value):
        return [value]
    for item in value:
        if not isinstance(item, str) and not _is_ids(item):
            raise ValueError("every item should be a string or a list of token ids (whole numbers from 0)")
    return value


class CompletionBody(GenerationBody):
    """Prompts to be continued."""

    foreign: ClassVar[Rows] = COMPLETIONS
    answer_prefix: ClassVar[str] = "cmpl-"

    prompt: Annotated[
        list[PromptInput],
        SkipValidation,
        BeforeValidator(prompt_inputs, json_schema_input_type=str | list[str] | list[TokenId] | list[list[TokenId]]),
    ] = Field(description="One or several prompts, as text or as token ids.", examples=["Once upon a time"])
    max_tokens: Count = Field(default=16, description="0 generates nothing, for echo with logprobs.")
    logprobs: Alternatives | None = Field(
        default=None, description="Number of tokens to report beside each; -1 reports all."
    )
    echo: bool = Field(
        default=False, description="Begin the text with the prompt; with logprobs, report those of the prompt too."
    )
    best_of: Annotated[Whole, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Number of answers to compute; the n most likely ones are returned."
    )
    add_special_tokens: bool = Field(default=True, description="Begin a text with the tokenizer's BOS.")


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[Sequence[int]]
    prompt_token_ids: NotRequired[Sequence[int]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    capture: NotRequired[CaptureHandle]


class TextCompletion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: NotRequired[UsageObject | None]
