"""The objects of scores, and of decisions (https://platform.openai.com/docs/api-reference/decisions; vLLM 0.33 too)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, field_validator
from typing_extensions import TypedDict

from deployments.openai.fields.fields import TurnFields
from deployments.openai.fields.inside import CaptureFields, CaptureHandle, InterventionFields
from deployments.openai.fields.other_servers import Rows
from deployments.openai.fields.other_servers_table import DECISIONS, SCORE
from deployments.openai.fields.usage import UsageObject
from deployments.openai.responses.schema import ResponseUsage

MAX_QUESTIONS = 400
_MAX_CHOICES = 256

Instructions = StrictStr | Annotated[list[dict[str, Any]], Field(min_length=1)]


class _Strict(BaseModel):
    # As OpenAI and vLLM have it: a misspelt key of a question must not change its answer silently.
    model_config = ConfigDict(extra="forbid")


class Predicate(_Strict):
    """How likely a statement about the input is true."""

    type: Literal["predicate"] = Field(description="Kind of the question.")
    instructions: Instructions = Field(description="The statement.")
    name: StrictStr | None = Field(default=None, description="Repeated in the answer.")


class Option(_Strict):
    """One of the answers to a choice."""

    value: StrictStr | StrictBool = Field(description="The answer if this option fits.")
    description: StrictStr = Field(default="", description="Shown to the model beside the value.")


class ChoiceQuestion(_Strict):
    """Which option fits the input."""

    type: Literal["choice"] = Field(description="Kind of the question.")
    instructions: Instructions = Field(description="The question.")
    choices: list[Option] = Field(min_length=2, max_length=255, description="The options.")
    name: StrictStr | None = Field(default=None, description="Repeated in the answer.")

    @field_validator("choices")
    @classmethod
    def _are_distinct(cls, choices: list[Option]) -> list[Option]:
        # A string and a boolean of the same text are two values.
        if len({(type(option.value), option.value) for option in choices}) < len(choices):
            raise ValueError("the values of choices should be distinct")
        return choices


class Level(_Strict):
    """One of the ordered steps of a scale."""

    label: StrictStr = Field(description="Name of the level.")
    description: StrictStr = Field(default="", description="Shown to the model beside the label.")


class ScoreQuestion(_Strict):
    """Where on a scale the input is; its first level is 0."""

    type: Literal["score"] = Field(description="Kind of the question.")
    instructions: Instructions = Field(description="What is rated.")
    levels: list[Level] = Field(min_length=2, max_length=10, description="The scale, from its lowest level.")
    name: StrictStr | None = Field(default=None, description="Repeated in the answer.")


Question = Annotated[Predicate | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class DecisionsBody(TurnFields):
    """An input, and questions about it that have fixed answers."""

    foreign: ClassVar[Rows] = DECISIONS

    input: str | list[dict[str, Any]] = Field(
        description="A text, or messages and tool calls as in the Responses API.", examples=["What is 27 + 15?"]
    )
    questions: list[Question] = Field(
        min_length=1, max_length=MAX_QUESTIONS, description="Questions of the types predicate, choice and score."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables of the chat template; enable_thinking is false unless given."
    )
    prompt_cache_key: str | None = Field(default=None, description="Requests with the same key go to the same replica.")


class PredicateAnswer(TypedDict):
    type: Literal["predicate"]
    name: str | None
    probability: float


class OptionProbability(TypedDict):
    value: str | bool
    probability: float


class ChoiceAnswer(TypedDict):
    """`confidence` is the chosen option's probability among all that the model could have written."""

    type: Literal["choice"]
    name: str | None
    choice: str | bool
    probabilities: list[OptionProbability]
    confidence: float


class LevelProbability(TypedDict):
    value: int
    label: str
    probability: float


class ScoreAnswer(TypedDict):
    """`score` is the expected level."""

    type: Literal["score"]
    name: str | None
    score: float
    probabilities: list[LevelProbability]
    confidence: float


Answer = PredicateAnswer | ChoiceAnswer | ScoreAnswer


class Decision(TypedDict):
    model: str
    answers: list[Answer]
    usage: ResponseUsage


class ScoreBody(TurnFields):
    """A text or a conversation, and the continuations to choose from."""

    foreign: ClassVar[Rows] = SCORE

    prompt: str | None = Field(default=None, description="Text before the choices.")
    messages: list[Any] | None = Field(default=None, description="A conversation in place of prompt.")
    choices: list[str] = Field(
        min_length=1, max_length=_MAX_CHOICES, examples=[["42", "43"]], description="Continuations to score."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, such as enable_thinking."
    )
    continue_final_message: bool = Field(default=False, description="The choices continue the last message.")
    capture: CaptureFields | None = Field(
        default=None, description="States to capture; the prompt of each choice is the text with the choice."
    )
    interventions: list[InterventionFields] = Field(
        default_factory=list, max_length=64, description="Changes of the model's states, applied in this order."
    )


class ScoredChoice(TypedDict):
    """A continuation: the sum of its tokens' log-probabilities, their count, and its share among the choices."""

    index: int
    choice: str
    logprob: float
    tokens: int
    probability: float
    capture: NotRequired[CaptureHandle]


class Scores(TypedDict):
    object: str
    model: str
    best: int
    data: list[ScoredChoice]
    usage: UsageObject
