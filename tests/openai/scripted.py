"""A loader whose model says what the request tells it to, one character a token, behind the real host.

The last user message (or the prompt) may begin with directives, each in brackets, and the answer is what follows:
`[fail out_of_memory]` fails, `[after 3 fail model_error]` fails after three tokens, `[wait 0.5]` thinks so long before
each token, `[hold 2]` so long before the first.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import ModelError, OutOfMemory, TroupeError, Unavailable
from deployments.core.events import Delta, Failed, PromptScores
from deployments.core.logprobs import Candidate, TokenLogprob
from deployments.engine.base.protocol import Emit, EngineRequest, EngineStats
from model_loaders.contract import ModelInfo

EOS = 0
_ERRORS: dict[str, type[TroupeError]] = {
    "out_of_memory": OutOfMemory,
    "model_error": ModelError,
    "unavailable": Unavailable,
}
_DIRECTIVE = re.compile(r"\[(fail|after|wait|hold) ([^\]]*)\]")


def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
    """`<role>content</role>` lines; tools and unknown template arguments stand before them."""
    if any(message["role"] == "narrator" for message in messages):
        raise ValueError("Conversation roles must be system, user, assistant or tool")
    head = "".join(f"<{key}>{value}</{key}>\n" for key, value in kwargs.items() if key != "tokenize")
    closed = messages[:-1] if kwargs.get("continue_final_message") else messages
    lines = [f"<{m['role']}>{m['content']}{m.get('tool_calls', '')}</{m['role']}>\n" for m in closed]
    if len(closed) < len(messages):
        lines.append(f"<{messages[-1]['role']}>{messages[-1]['content']}")
    return head + "".join(lines) + ("<assistant>" if add_generation_prompt else "")


def encode(prompt: str, add_special_tokens: bool = False) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[ord(character) for character in prompt]], dtype=torch.long)}


def decode(token_ids: torch.Tensor) -> str:
    return "".join(chr(token_id) for token_id in token_ids.tolist() if token_id != EOS)


def embed(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(len(text)), 1.0] for text in texts])


class ScriptedEngine:
    """Speaks from scripts in threads, one per request.

    Attributes:
        cancelled: ids of the requests that were cancelled before their end.
        seen: every request.
    """

    supports = frozenset(SamplingParams.__dataclass_fields__)

    def __init__(self, info: ModelInfo, options: EngineOptions) -> None:
        self.max_model_len = options.max_model_len or 2000
        self.cancelled: list[str] = []
        self.seen: list[EngineRequest] = []
        self._stops: dict[str, threading.Event] = {}
        ENGINES.append(self)

    def submit(self, request: EngineRequest, emit: Emit) -> None:
        self.seen.append(request)
        stop = self._stops[request.request_id] = threading.Event()
        threading.Thread(target=self._speak, args=(request, emit, stop), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        if request_id in self._stops:
            self.cancelled.append(request_id)
            self._stops[request_id].set()

    def stats(self) -> EngineStats:
        return EngineStats(kind="scripted", sequences=len(self._stops))

    def check(self) -> None:
        pass

    def close(self, timeout: float = 30.0) -> None:
        for stop in list(self._stops.values()):
            stop.set()

    def _speak(self, request: EngineRequest, emit: Emit, stop: threading.Event) -> None:
        params = request.sampling
        text = request.prompt_text or "".join(map(chr, request.input_ids))
        orders, answer = _script(text)
        if params.prompt_logprobs is not None:
            scores = [None, *(score(token_id, params.prompt_logprobs) for token_id in request.input_ids[1:])]
            emit(PromptScores(scores=tuple(scores)))
        stop.wait(float(orders.get("hold", 0)))
        for count, event in enumerate(_events(answer, params, orders)):
            if stop.wait(float(orders.get("wait", 0))) or (count == 0 and stop.is_set()):
                return
            if isinstance(event, Failed) or event.finish_reason is not None:
                self._stops.pop(request.request_id, None)
            emit(event)


ENGINES: list[ScriptedEngine] = []


def _script(text: str) -> tuple[dict[str, str], str]:
    spoken = re.findall(r"<(?:user|tool)>(.*?)</(?:user|tool)>", text, re.DOTALL)
    last = spoken[-1] if spoken else text
    orders = {}
    while match := _DIRECTIVE.match(last):
        orders[match[1]] = match[2]
        last = last[match.end() :]
    return orders, last


def _events(answer: str, params: SamplingParams, orders: Mapping[str, str]) -> list[Delta | Failed]:
    if "fail" in orders:
        return [Failed(_ERRORS[orders["fail"]]("The device has no memory for these prompt tokens."))]
    events: list[Delta | Failed] = []
    if params.max_tokens == 0:
        return [Delta(finish_reason="length")]
    failing, _, kind = orders.get("after", "1000000 fail ").partition(" fail ")
    cut = min((answer.find(stop) for stop in params.stop if stop in answer), default=len(answer))
    for count, character in enumerate(answer[:cut]):
        if count == int(failing):
            return [*events, Failed(_ERRORS[kind]("The device failed half way through the context."))]
        if params.max_tokens is not None and count == params.max_tokens - 1:
            return [*events, _delta(character, params, finish_reason="length")]
        events.append(_delta(character, params))
    if cut < len(answer):
        stop = next(stop for stop in params.stop if answer.startswith(stop, cut))
        return [*events, Delta(finish_reason="stop", stop_reason=stop)]
    return [*events, _delta("", params, finish_reason="stop")]


def _delta(character: str, params: SamplingParams, **ending: Any) -> Delta:
    token_id = ord(character) if character else EOS
    logprobs = None if params.logprobs is None else (score(token_id, params.logprobs, params.logprob_token_ids),)
    return Delta(text=character, token_ids=(token_id,), logprobs=logprobs, **ending)


def score(token_id: int, alternatives: int, named: Sequence[int] = ()) -> TokenLogprob:
    """The token is likeliest; the alternatives are the characters after it, or those that are named."""
    ids = named or range(token_id, token_id + alternatives)
    top = tuple(_candidate(each, -0.25 * (i + 1)) for i, each in enumerate(ids))
    own = _candidate(token_id, -0.25)
    return TokenLogprob(own.token_id, own.token, own.bytes, own.logprob, rank=1, top=top)


def _candidate(token_id: int, logprob: float) -> Candidate:
    text = chr(token_id) if token_id else ""
    return Candidate(token_id, text, text.encode(), logprob)


def load_model() -> dict[str, Any]:
    hooks = {"apply_chat_template": render, "encode": encode, "decode": decode, "embed": embed}
    return {"engine": ScriptedEngine, **hooks}


class DescribedTokenizer:
    """Nothing but a description of the model's answers."""

    response_template: ClassVar[dict[str, Any]] = {
        "start_anchor": "<assistant>",
        "fields": {
            "content": {},
            "tool_calls": {
                "open": "<call>",
                "close": "</call>",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
        },
    }


def describes_answers() -> dict[str, Any]:
    """A loader that describes the answers in place of a tokenizer."""
    return {**load_model(), "response_template": DescribedTokenizer.response_template}


def with_response_template() -> dict[str, Any]:
    return {**load_model(), "tokenizer": DescribedTokenizer()}
