"""A loaded model, asked as the server asks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from deployments.cli.doctor.finding import NotApplicable
from deployments.config.app import AppArgs
from deployments.config.model import ModelEntry
from deployments.core.calls import ChatPrompt, GenerateCall, Prompt, SamplingParams, TextPrompt
from deployments.core.client import Rendered
from deployments.core.errors import TroupeError
from deployments.core.events import Delta, Failed
from deployments.core.logprobs import TokenLogprob
from deployments.engine.no_text import NoTextEngine
from deployments.host.host import ModelHost
from deployments.host.loaded_model import LoadedModel
from deployments.openai.chat.prompt import ChatInput, chat_prompt
from deployments.openai.chat.tools import read_tools
from model_loaders.contract import ModelInfo
from model_loaders.prompts.tokenizer_card import tokens_of

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What the checks send to the model.

    Attributes:
        message: of the user.
        max_tokens: of an answer.
        image, audio: files of the user in place of the test image and the test tone.
        modules: list what can be captured and changed inside the model.
        device: where the model is loaded; None takes the first GPU, else the CPU.
    """

    message: str = "Hello"
    max_tokens: int = 32
    image: Path | None = None
    audio: Path | None = None
    modules: bool = False
    device: str | None = None


@dataclass(slots=True, kw_only=True)
class Answer:
    """The answer to a request. Times are in seconds since it was sent; `first` is that of the first token."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    first: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLog:
    """What the server logs when it loads a model: its warnings, and what was proved of the model."""

    warnings: list[str]
    proofs: list[str]


class Subject:
    """A model that the server's host has loaded, and the requests that the checks send to it.

    Args:
        log: what the server logged when it loaded the model.

    Attributes:
        template_error: why a conversation of one user message cannot be written; None if it can.
    """

    def __init__(self, host: ModelHost, args: AppArgs, model: LoadedModel, trial: Trial, log: LoadLog) -> None:
        self.host = host
        self.model = model
        self.trial = trial
        self.log = log
        self.template_error: TroupeError | None = None
        self._args = args
        self._numbers = count(1)

    @property
    def entry(self) -> ModelEntry:
        return self.model.entry

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def tokens(self) -> list[str]:
        """The texts of the tokenizer's special tokens, and of those that were added for markers."""
        return tokens_of(self.info.tokenizer)

    @property
    def gives_text(self) -> bool:
        """Whether the model answers prompts of text."""
        return self.model.speech is None and not isinstance(self.model.engine, NoTextEngine)

    def need_text(self) -> None:
        """Leave a check out for a model that does not answer prompts of text."""
        if self.model.speech is not None:
            raise NotApplicable("The model turns recordings into text.")
        if not self.gives_text:
            raise NotApplicable("The model gives embeddings, not text.")

    def need_chat(self) -> None:
        """Leave a check out for a model that does not answer chats."""
        self.need_text()
        if self.template_error is not None:
            raise NotApplicable("The model answers no chats.")

    def chat(self, messages: Messages, *, tools: Sequence[Any] | None = None, opens: bool = True) -> ChatPrompt:
        """The prompt of a chat request, as the API makes it of the request's fields.

        Args:
            opens: the assistant's turn is opened.

        Raises:
            TroupeError: the API refuses the messages.
        """
        chat = ChatInput(messages=messages, tools=read_tools(tools, None, True), add_generation_prompt=opens)
        prompt, _ = chat_prompt(chat, self.entry.card, self._args.api)
        return prompt

    async def render(self, messages: Messages, *, tools: Sequence[Any] | None = None, opens: bool = True) -> Rendered:
        """The text and the ids of a chat's prompt.

        Raises:
            TroupeError: the request would be refused with it.
        """
        return await self.host.render(self.entry.id, self.chat(messages, tools=tools, opens=opens))

    async def text_of(self, messages: Messages, *, opens: bool = True) -> str:
        """The text of a chat's prompt."""
        return (await self.render(messages, opens=opens)).text or ""

    async def encode(self, text: str, *, special: bool = False) -> tuple[int, ...]:
        """The ids of a text.

        Args:
            special: with the special tokens that the tokenizer adds, as for `/v1/completions`.
        """
        prompt = TextPrompt(text=text, add_special_tokens=special)
        return tuple((await self.host.render(self.entry.id, prompt)).token_ids)

    @property
    def prompt(self) -> Prompt:
        """The user's message as a chat if the model has a template, else as a text."""
        if self.template_error is None:
            return self.chat([user(self.trial.message)])
        return TextPrompt(text=self.trial.message)

    @property
    def scores(self) -> int | None:
        """The number of alternatives to ask for; None if the engine gives no log-probabilities."""
        return 2 if "logprobs" in self.model.engine.supports else None

    async def answer(
        self,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        scores: int | None = None,
        endless: bool = False,
        deadline: float = float("inf"),
        begun: asyncio.Event | None = None,
    ) -> Answer:
        """The greedy answer to a prompt.

        Args:
            scores: alternatives to report for each token.
            endless: the model's own stop tokens do not end it, if the engine can ignore them.
            deadline: by `time.monotonic()`; what is generated later is left out.
            begun: set with the first token.

        Raises:
            TroupeError: the request fails with it.
        """
        sampling = SamplingParams(
            temperature=0,
            max_tokens=max_tokens or self.trial.max_tokens,
            logprobs=scores,
            ignore_eos=endless and "ignore_eos" in self.model.engine.supports,
        )
        call = GenerateCall(
            request_id=f"check-{next(self._numbers)}",
            model=self.entry.id,
            prompts=(prompt,),
            sampling=sampling,
            stream=True,
        )
        found, started = Answer(), time.monotonic()
        async with aclosing(self.host.generate(call)) as events:
            async for event in events:
                found.total = time.monotonic() - started
                match event:
                    case Failed(error):
                        raise error
                    case Delta():
                        _take(found, event)
                        if begun is not None and found.first:
                            begun.set()
                if started + found.total > deadline:
                    break
        return found


def user(content: Any) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    """A message of the assistant."""
    return {"role": "assistant", "content": content}


def refusal(error: TroupeError) -> str:
    """An error as a client gets it: status, code and message."""
    return f"{error.status} {error.code}: {error.message}"


def first_difference(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Where two sequences first differ; None if they are equal."""
    if list(one) == list(other):
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _take(found: Answer, delta: Delta) -> None:
    if delta.token_ids and not found.first:
        found.first = found.total
    found.token_ids += delta.token_ids
    found.text += delta.text
    found.logprobs += delta.logprobs or ()
    found.finish_reason = delta.finish_reason or found.finish_reason
