"""Request fields of generation that chats and completions share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator

from deployments.config.api import ApiOptions
from deployments.core.calls import GenerateCall, Grammar, SamplingParams, ThinkingBudget
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.core.token_ids import TokenIds
from deployments.openai.fields.constraint import (
    Choices,
    ResponseFormat,
    StructuredOutputs,
    guided_grammar,
    only_one,
    response_grammar,
    structured_grammar,
)
from deployments.openai.fields.fields import (
    MAX_STRINGS,
    MAX_WHOLE,
    Alternatives,
    Count,
    IdList,
    Real,
    RequestId,
    RequestObject,
    Seed,
    Strings,
    TurnFields,
    Whole,
    check_count,
)
from deployments.openai.fields.inside import CaptureFields, InterventionFields, read_interventions
from deployments.openai.fields.usage import RunningUsage

_MAX_BIASES = 300_000
_MOST_BEAMS = 64
_PART = 1000
# Fields that the engine gets as they are, and those that it gets as tuples.
_SAME = (
    *("min_tokens", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "include_stop_str_in_output", "ignore_eos", "seed", "prompt_logprobs", "skip_special_tokens"),
    *("length_penalty", "early_stopping"),
)
_LISTS = ("bad_words", "stop", "stop_token_ids", "logprob_token_ids")


class StreamOptions(RequestObject):
    """Options for what a stream reports in addition to the answer."""

    include_usage: bool | None = Field(default=None, description="Send token counts in a last chunk without choices.")
    continuous_usage_stats: bool | None = Field(
        default=None, description="With include_usage: send token counts in every chunk."
    )
    include_obfuscation: bool | None = Field(default=None, description="Accepted; chunks are never padded.")

    def usage(self, options: ApiOptions) -> RunningUsage:
        """The counts that a stream reports."""
        wanted = options.stream_usage or bool(self.include_usage)
        return RunningUsage(last=wanted, every=bool(self.continuous_usage_stats))


class GenerationBody(TurnFields):
    """What chats and completions have in common. Names and meanings are OpenAI's, then vLLM's, then transformers'.

    Attributes:
        answer_prefix: what the answer's id begins with.
    """

    answer_prefix: ClassVar[str] = ""

    n: Annotated[Whole, Field(ge=1, le=1024)] = Field(default=1, description="Number of answers to every prompt.")
    temperature: Annotated[Real, Field(ge=0)] = Field(default=1.0, description="0 is greedy.", examples=[0])
    top_p: Annotated[Real, Field(ge=0, le=1)] = Field(
        default=1.0, description="Sample from the most likely tokens that together have this probability; 1 is off."
    )
    top_k: Annotated[Whole, Field(ge=-1, le=MAX_WHOLE)] = Field(default=0, description="0 and -1 are off.")
    min_p: Annotated[Real, Field(ge=0, le=1)] = Field(
        default=0.0, description="Drop tokens less likely than this share of the most likely one; 0 is off."
    )
    typical_p: Annotated[Real, Field(gt=0, le=1)] = Field(
        default=1.0, description="Sample from the most typical tokens that together have this probability; 1 is off."
    )
    repetition_penalty: Annotated[Real, Field(gt=0)] = Field(
        default=1.0,
        description="Divides positive logits of tokens in prompt and answer, multiplies negative ones; 1 is off.",
    )
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] = Field(
        default=0.0, description="Subtracted from the logits of tokens that are in the answer."
    )
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] = Field(
        default=0.0, description="Subtracted from the logits of tokens once for each time that they are in the answer."
    )
    logit_bias: dict[int, Annotated[Real, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, description="Token id to a number added to its logit."
    )
    allowed_token_ids: IdList | None = Field(
        default=None, min_length=1, description="The only tokens that can be generated."
    )
    bad_words: Strings = Field(default_factory=list, description="Texts that are never generated.")
    stop: Strings = Field(default_factory=list, description="Texts that end the answer.")
    stop_token_ids: IdList = Field(
        default_factory=list,
        max_length=MAX_STRINGS,
        description="Tokens that end the answer, in addition to the model's own.",
    )
    include_stop_str_in_output: bool = Field(default=False, description="Keep the stop text at the end of the answer.")
    ignore_eos: bool = Field(default=False, description="Continue after the model's end tokens.")
    min_tokens: Count = Field(default=0, description="Number of tokens before the answer can end.")
    seed: Seed = Field(default=None, description="-1 is the same as no seed.")
    num_beams: Annotated[Whole, Field(ge=1, le=_MOST_BEAMS)] = Field(
        default=1, description="Beam search; the n best texts are answered."
    )
    use_beam_search: bool = Field(default=False, description="Beam search with n beams, and all n texts as answers.")
    length_penalty: Real = Field(default=1.0, description="For beam search: a score is logprob / length ** this.")
    early_stopping: bool | Literal["never"] = Field(default=False, description="For beam search, as in transformers.")
    skip_special_tokens: bool = Field(default=True, description="Leave special tokens out of the text.")
    prompt_logprobs: Alternatives | None = Field(
        default=None, description="Number of tokens to report beside each prompt token; -1 reports all."
    )
    logprob_token_ids: IdList = Field(
        default_factory=list,
        max_length=MAX_STRINGS,
        description="Alternatives to report in place of the most likely ones.",
    )
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=MAX_WHOLE)] | None = Field(
        default=None, description="Number of tokens to keep at the end of the prompt; -1 keeps as many as fit."
    )
    return_token_ids: bool = Field(default=False, description="Report the token ids of prompt and answer.")
    return_tokens_as_token_ids: bool = Field(default=False, description="Write tokens of logprobs as `token_id:<id>`.")
    stream: bool = Field(default=False, description="Send the answer as events while it is generated.")
    stream_options: StreamOptions = Field(
        default_factory=StreamOptions, description="What a stream reports in addition."
    )
    generate_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Keyword arguments for the loader's own generate hook."
    )
    capture: CaptureFields | None = Field(default=None, description="States of the model to capture.")
    interventions: list[InterventionFields] = Field(
        default_factory=list, max_length=64, description="Changes of the model's states, applied in this order."
    )
    response_format: ResponseFormat | None = Field(default=None, description="JSON that the answer has to be.")
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="One of json, regex, choice, grammar, json_object: a constraint on the text."
    )
    guided_json: dict[str, Any] | str | None = Field(default=None, description="structured_outputs.json")
    guided_regex: str | None = Field(default=None, description="structured_outputs.regex")
    guided_choice: Choices | None = Field(default=None, description="structured_outputs.choice")
    guided_grammar: str | None = Field(default=None, description="structured_outputs.grammar")
    thinking_token_budget: Annotated[Whole, Field(ge=-1, le=MAX_WHOLE)] | None = Field(
        default=None,
        description="Tokens of the reasoning, its markers included; it is closed then. -1 does not limit it.",
    )
    thinking_budget_message: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="Text before the end of a reasoning that `thinking_token_budget` closes."
    )
    request_id: RequestId | None = Field(
        default=None,
        description="Id of the answer, after the prefix of its kind; the header x-request-id overrides it.",
    )
    prompt_cache_key: str | None = Field(default=None, description="Requests with the same key go to the same replica.")
    session_id: str | None = Field(default=None, description="The same as prompt_cache_key.")

    @field_validator("logit_bias", mode="wrap")
    @classmethod
    def _in_parts(cls, bias: object, validate: ValidatorFunctionWrapHandler) -> dict[int, float]:
        """pydantic holds Python's lock for all that it gets, and makes an error of everything that is wrong in it."""
        items = iter(bias.items()) if isinstance(bias, dict) else iter(())
        read: dict[int, float] = {}
        while part := dict(itertools.islice(items, _PART)):
            read.update(validate(part))
        return read or validate(bias)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _pairs(cls, bias: object) -> object:
        """llama.cpp's list of pairs as an object; PHP writes an empty object as an empty list."""
        if isinstance(bias, dict | list):
            check_count(bias, _MAX_BIASES)
        if not isinstance(bias, list) or not all(_is_pair(item) for item in bias):
            return bias
        return {token_id: value for token_id, value in bias}  # noqa: C416  # dict() holds Python's lock

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, bias: dict[int, float]) -> dict[int, float]:
        if any(not 0 <= token_id <= MAX_WHOLE for token_id in bias):
            raise ValueError("keys should be token ids")
        return bias

    def grammar(self) -> Grammar | None:
        """The constraint on the text.

        Raises:
            BadRequest: there are several, or it cannot be followed.
        """
        found = [
            response_grammar(self.response_format),
            structured_grammar(self.structured_outputs),
            guided_grammar(dict(self)),
        ]
        return only_one([grammar for grammar in found if grammar is not None])

    def sampling(self, options: ApiOptions, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The parameters of every choice.

        Raises:
            BadRequest: more alternatives are asked for than the server reports.
        """
        check_logprobs("prompt_logprobs", self.prompt_logprobs, options)
        if self.logprob_token_ids and logprobs is None and self.prompt_logprobs is None:
            raise BadRequest("Invalid 'logprob_token_ids': it needs logprobs.", param="logprob_token_ids")
        if self.truncate_prompt_tokens == 0:
            raise BadRequest(
                "Invalid 'truncate_prompt_tokens': nothing would be left; got 0.", param="truncate_prompt_tokens"
            )
        if max_tokens is not None and self.min_tokens > max_tokens:
            raise BadRequest(
                f"Invalid 'min_tokens': {self.min_tokens} is more than max_tokens, {max_tokens}.", param="min_tokens"
            )
        beams = self._beams()
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME}
        same |= {name: tuple(getattr(self, name)) for name in _LISTS}
        return SamplingParams(
            **same,
            max_tokens=max_tokens,
            temperature=0.0 if self.use_beam_search and beams == 1 else self.temperature,
            top_k=max(self.top_k, 0),
            allowed_token_ids=None if self.allowed_token_ids is None else TokenIds(self.allowed_token_ids),
            logprobs=logprobs,
            grammar=self.grammar(),
            thinking=self._thinking(),
            num_beams=beams,
            extra=self.generate_kwargs,
            capture=None if self.capture is None else self.capture.read(),
            interventions=read_interventions(self.interventions),
        )

    def _thinking(self) -> ThinkingBudget | None:
        if self.thinking_token_budget is None and self.thinking_budget_message:
            raise BadRequest(
                "Invalid 'thinking_budget_message': it needs thinking_token_budget; add it, or leave this out.",
                param="thinking_budget_message",
            )
        if self.thinking_token_budget is None or self.thinking_token_budget < 0:
            return None
        return ThinkingBudget(self.thinking_token_budget, self.thinking_budget_message)

    def _beams(self) -> int:
        """The width of the beam search; 1 without one.

        Raises:
            BadRequest: there are more answers than beams, or settings of a search that is not asked for.
        """
        beams = max(self.num_beams, self.n if self.use_beam_search else 1)
        if beams > _MOST_BEAMS or 1 < beams < self.n:
            most = f"num_beams, {beams}" if beams < self.n else f"{_MOST_BEAMS} beams"
            raise BadRequest(f"Invalid 'n': a beam search gives at most {most} answers; got {self.n}.", param="n")
        for name, neutral in (("length_penalty", 1.0), ("early_stopping", False)):
            if not self.use_beam_search and beams == 1 and (value := getattr(self, name)) != neutral:
                raise BadRequest(
                    f"Invalid {name!r}: it is for beam search; add use_beam_search or leave it out; got {value!r}.",
                    param=name,
                )
        return beams


def _is_pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], int | str)


def check_logprobs(name: str, asked: int | None, options: ApiOptions) -> None:
    """Refuse more alternatives per token than the server reports; -1, all of them, needs a server without a limit."""
    most = options.max_logprobs
    if asked is None or most == -1 or 0 <= asked <= most:
        return
    raise BadRequest(
        f"Invalid {name!r}: at most {most} alternatives (max_logprobs"
        f"{', which would have to be -1' if asked == -1 else ''}); got {asked}.",
        param=name,
    )


def check_no_budget(body: GenerationBody) -> None:
    """Refuse a budget of the reasoning on a route that does not read reasoning."""
    if body.thinking_token_budget is not None and body.thinking_token_budget >= 0:
        raise UnsupportedParameter(
            "This route does not tell reasoning from other text; leave thinking_token_budget out, or send a chat.",
            param="thinking_token_budget",
        )


def check_stream_options(given: Mapping[str, Any]) -> None:
    """Refuse options of a stream in a request without one.

    Args:
        given: the request's JSON; the server's defaults may name such options.
    """
    options = given.get("stream_options")
    asked = isinstance(options, dict) and any(value is not None for value in options.values())
    if asked and not given.get("stream"):
        raise BadRequest(
            "Invalid 'stream_options': the request does not stream; send \"stream\": true, or leave it out.",
            param="stream_options",
        )


def check_choices(count: int, options: ApiOptions) -> None:
    """Refuse more choices than the server computes for one request."""
    if count > options.max_choices:
        raise BadRequest(
            f"Invalid 'n': the request asks for {count} choices, this server computes at most {options.max_choices} "
            "(max_choices).",
            param="n",
        )


_HIDDEN = ("extra", "grammar", "markers", "capture", "interventions")
_HEADER_LIMIT = 4096


def effective(call: GenerateCall) -> str:
    """The parameters a call is computed with, as one line of ASCII JSON; the longest are left out beyond 4 KiB."""
    params = call.sampling
    values: dict[str, Any] = {"n": call.n}
    for each in fields(params):
        value = getattr(params, each.name)
        if each.name not in _HIDDEN and value is not None and value != {} and value != () and not _is_long(value):
            value = asdict(value) if isinstance(value, ThinkingBudget) else value
            values[each.name] = list(value) if isinstance(value, TokenIds) else value
    while len(line := json.dumps(values, separators=(",", ":"))) > _HEADER_LIMIT:
        del values[max(values, key=lambda name: len(json.dumps(values[name])))]
    return line


def _is_long(value: Any) -> bool:
    """Whether a parameter alone is too long for the header, without writing it."""
    return isinstance(value, Mapping | tuple | TokenIds) and (
        2 * len(value) > _HEADER_LIMIT or sum(len(item) for item in value if isinstance(item, str)) > _HEADER_LIMIT
    )
