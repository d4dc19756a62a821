"""Calls from the API to a model. Plain dataclasses of the standard library.

The ingress needs no torch and the engine no pydantic. A stream of `deployments.core.events` answers a call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from deployments.core.reasoning import ReasoningMarkers

LARGE: ContextVar[bool] = ContextVar("large", default=False)
"""Whether the request that is being answered, or its answer, is too large for the event loop to work on all of it."""

MANY_TOKENS = 10_000
"""A request whose answer has more of them at once is a large one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the generated text, compiled by the engine's grammar library.

    Attributes:
        kind: `calls` is a Lark grammar as JSON, whose `parts` the engine writes: it knows which texts are tokens. `any`
            constrains nothing.
        param: the request field it comes from, for error messages; two constraints are equal without it.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark", "calls", "any"]
    source: str
    param: str = field(default="response_format", compare=False)


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """How long a model may reason.

    Attributes:
        tokens: the largest number of them, the markers included.
        message: what is written before the reasoning's forced end.
        calls: what stands around a tool call, which is not cut.
        optional: a model without reasoning may answer at once.
    """

    tokens: int
    message: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    optional: bool = False


Word = Literal["last_prompt", "prompt", "generated", "all"]
Operation = Literal["add", "scale", "zero", "set", "clamp", "hook"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Positions `start` to before `end` of the prompt, or of the generated tokens; None is their end.

    Negative numbers count from the end of the prompt.
    """

    start: int = 0
    end: int | None = None
    of: Literal["prompt", "generated"] = "prompt"


Positions = Word | Window | tuple[int, ...]
"""A word, a window, or indices of tokens; negative ones count from the end of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """States to capture.

    Attributes:
        modules: patterns of module names, with a suffix for what is captured there.
        dtype: of the captured tensors; `native` is what the model computes.
        inline: the tensors come in the answer, not in a file.
        id: of the file.
        prompt_in: id of the capture of the same prompt that has the positions of the prompt.
    """

    modules: tuple[str, ...]
    positions: Positions = "last_prompt"
    dtype: Literal["native", "float32", "float16"] = "native"
    inline: bool = False
    id: str = ""
    prompt_in: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """Numbers of an intervention: `data`, or the `id` of an uploaded vector, or the `name` of one of the loader's.

    Attributes:
        data: little-endian numbers of `dtype` (float32, float16 or bfloat16).
    """

    data: bytes = b""
    dtype: str = "float32"
    shape: tuple[int, ...] = ()
    id: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Intervention:
    """A change of what a module gives, or of what it is given.

    Attributes:
        module: a pattern of module names, with a suffix for what is changed there.
        scale: factor of `add` and `scale`.
        norm_match: `add` brings the vector to the norm of the state first.
        features: columns to change, as ranges [start, end); None changes all.
        value, min, max: what `clamp` brings a coordinate to.
        name: of the loader's hook, for `hook`.
        args: arguments of that hook, as JSON.
    """

    module: str
    op: Operation
    vector: Vector | None = None
    scale: float = 1.0
    norm_match: bool = False
    positions: Positions = "all"
    features: tuple[tuple[int, int], ...] | None = None
    value: float | None = None
    min: float | None = None
    max: float | None = None
    name: str = ""
    args: str = "{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one choice is generated. The defaults are the full distribution, without penalties and without a seed.

    Attributes:
        max_tokens: tokens to generate at most; None means as many as fit in the context.
        min_tokens: no terminator and no stop string ends the text before this many tokens.
        temperature: divides the logits; 0 is greedy.
        top_p, top_k, min_p, typical_p: truncations of the distribution; 1, 0, 0 and 1 are off.
        repetition_penalty: of tokens seen in prompt or text (CTRL, arXiv:1909.05858); 1 is off.
        presence_penalty, frequency_penalty: of tokens seen in the text, OpenAI's formula; 0 is off.
        logit_bias: token id to a number added to its logit.
        allowed_token_ids: only these may be generated; None allows all.
        bad_words: texts that are never generated.
        stop: strings that end the text; they are not part of it unless include_stop_str_in_output.
        stop_token_ids: token ids that end the text, besides the model's own terminators.
        ignore_eos: the model's own terminators are ordinary tokens.
        seed: same seed, same text, whatever the neighbors; None draws fresh randomness.
        logprobs: how many alternatives to report beside each generated token; -1 reports the whole vocabulary, None no
            logprobs.
        prompt_logprobs: the same for every prompt token.
        logprob_token_ids: report these tokens in place of the likeliest alternatives.
        processed_logprobs: report them of the distribution sampled from, not of the raw logits.
        skip_special_tokens: leave special tokens out of the text.
        markers: texts that the reader of the answer looks for; special tokens in them are never left out.
        grammar: a constraint on the text.
        thinking: how long the model may reason; None leaves it to the model.
        num_beams: number of beams of a beam search; 1 is off.
        beam_rank: which of the texts that the search finds, 0 for the best one.
        length_penalty: of beam search; a text's score is its log-probability / length ** length_penalty.
        early_stopping: when beam search ends, see transformers' `GenerationConfig`.
        extra: keyword arguments for the loader's own `generate` hook, as they are.
        capture: states of the model to capture.
        interventions: changes of the model's states, in order.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    processed_logprobs: bool = False
    skip_special_tokens: bool = True
    markers: tuple[str, ...] = ()
    grammar: Grammar | None = None
    thinking: ThinkingBudget | None = None
    num_beams: int = 1
    beam_rank: int = 0
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    capture: Capture | None = None
    interventions: tuple[Intervention, ...] = ()

    @property
    def reports_vocabulary(self) -> bool:
        """Whether the answer has the log-probabilities of all tokens, which is megabytes."""
        return -1 in (self.logprobs, self.prompt_logprobs)

    def given(self) -> dict[str, Any]:
        """The parameters that differ from their defaults, by name."""
        defaults = SamplingParams()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(defaults, name)}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """A prompt given as text, encoded by the loader's `encode`."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensPrompt:
    """A prompt given as token ids, used as they are; `TokenIds` cross to a replica as one block."""

    token_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation, turned into text by the loader's chat template and then encoded.

    Attributes:
        messages: OpenAI messages as plain dicts, as the client sent them; parts of text are `{"type": "text"}`.
        tools: OpenAI tool definitions, passed to the template.
        template_kwargs: further arguments of the template.
        add_generation_prompt: open the assistant's turn.
        continue_final_message: leave the last message open for the model to continue.
        chat_template: replaces the model's template, where the server allows it.
        merge_roles: join neighbors of one role.
        write_tools: write tools as text if the template has no place for them.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    merge_roles: bool = False
    write_tools: bool = False


Prompt = TextPrompt | TokensPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """When a request begins, if it has to wait; the rules are in `deployments/engine/base/turns.py`.

    Attributes:
        priority: a lower one begins earlier.
        client: who asks; clients of one priority take turns.
        group: choices of one group are one turn; empty for a turn of one.
    """

    priority: int = 0
    client: str = ""
    group: str = ""


TURN: ContextVar[Turn] = ContextVar("turn", default=Turn())  # noqa: B039  # it is frozen
"""Of the request that is being answered in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    """One request for text: every prompt answered `n` times.

    Choice `i * n + j` is the j-th answer to prompt i. A given seed is used for the first answer of each prompt,
    seed + j for the j-th.

    Attributes:
        model: a configured id, aliases resolved.
        best_of: number of texts to generate per prompt; the `n` most likely ones are kept.
        echo: begin each choice's text with its prompt.
        truncate_prompt: number of tokens to keep at the end of each prompt; -1 keeps as many as fit, None all.
        reasoning: how the model marks its reasoning, whose tokens are counted apart and in which no stop string counts.
        affinity: conversations with the same key go to the same replica where possible.
        blocks: digests of how the prompt begins: it goes where such a prompt went, if that replica is not busier.
        stream: deltas are wanted as they come; off, each choice may come as one delta at the end.
        expect: the weights that are to answer, `w<12>`; empty accepts any.
        spec: describes the model to a replica, if it came while the server runs; JSON.
        owner: digest of the API key that may read its captures; empty on a server without keys.
        turn: when its choices begin.
    """

    request_id: str
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    truncate_prompt: int | None = None
    reasoning: ReasoningMarkers | None = None
    affinity: str | None = None
    blocks: tuple[str, ...] = ()
    stream: bool = False
    expect: str = ""
    spec: str = ""
    owner: str = ""
    turn: Turn = field(default_factory=Turn)

    @property
    def prompt_param(self) -> str:
        """The request field that holds the prompts, for error messages."""
        return "messages" if isinstance(self.prompts[0], ChatPrompt) else "prompt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TranscribeCall:
    """One request for the text of a recording.

    Answered by `TranscriptionStarted`, `TranscriptSegment`s and `Finished`, or by `Failed`.

    Attributes:
        model: a configured id, aliases resolved.
        audio: an audio file as it was sent.
        task: write down what is said, or translate it into English.
        language: spoken in the recording, a code or an English name; None lets the model guess.
        prompt: what might have been said before, to guide spelling and style.
        segments: report segments with their times.
        words: report words with their times.
        logprobs: report the tokens' log-probabilities.
        max_seconds, max_samples: longer recordings are refused.
        stream: pieces are wanted as they come.
        expect: the weights that are to answer, `w<12>`; empty accepts any.
        spec: describes the model to a replica, if it came while the server runs; JSON.
        turn: when its windows begin.
    """

    request_id: str
    model: str
    audio: bytes
    sampling: SamplingParams
    task: Literal["transcribe", "translate"] = "transcribe"
    language: str | None = None
    prompt: str = ""
    segments: bool = False
    words: bool = False
    logprobs: bool = False
    max_seconds: float = float("inf")
    max_samples: float = float("inf")
    affinity: str | None = None
    stream: bool = False
    expect: str = ""
    spec: str = ""
    turn: Turn = field(default_factory=Turn)


Call = GenerateCall | TranscribeCall
