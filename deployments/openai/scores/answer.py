"""POST /v1/score and /v1/decisions: how likely a model finds fixed continuations, or the labels of fixed answers.

Each question of a decision becomes a prompt that lists its options with a label, and one forward tells how likely the
model begins its reply with each label. Labels that are not single tokens of a model, or too many for letters, are
scored as texts.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from fastapi import Response

from deployments.core.calls import ChatPrompt, GenerateCall, Prompt, SamplingParams, TextPrompt
from deployments.core.client import Rendered
from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.core.events import Usage
from deployments.core.model_card import ModelCard
from deployments.openai.chat.messages import Media
from deployments.openai.fields.choices import Choice, gather
from deployments.openai.fields.inside import capture_handle, inside_header, read_interventions
from deployments.openai.fields.logprobs import UNLIKELY
from deployments.openai.fields.usage import usage_object
from deployments.openai.http.exchange import Exchange
from deployments.openai.http.streaming import json_answer, written
from deployments.openai.responses.answer import usage_of
from deployments.openai.scores.continuations import score_continuations, shares
from deployments.openai.scores.plan import decision_plan, question_labels, score_plan
from deployments.openai.scores.schema import (
    Answer,
    ChoiceQuestion,
    Decision,
    DecisionsBody,
    Predicate,
    Question,
    ScoreBody,
    Scores,
)

# Long enough that the tokens at its end are those of the whole prompt.
_TAIL = 200


async def create_score(exchange: Exchange) -> Response:
    """The log-probability of each of some fixed continuations."""
    body, card = await exchange.read(ScoreBody)
    prompt = await score_plan(exchange, body, card)
    return await json_answer(exchange, _scores(exchange, body, card, prompt))


async def _scores(exchange: Exchange, body: ScoreBody, card: ModelCard, prompt: Prompt) -> bytes:
    rendered = await exchange.client.render(card.id, prompt)
    if not rendered.token_ids:
        raise BadRequest("The prompt is empty: nothing to continue.", param="prompt")
    plain = isinstance(prompt, TextPrompt)
    sampling = SamplingParams(
        capture=None if body.capture is None else body.capture.read(),
        interventions=read_interventions(body.interventions),
    )
    exchange.headers.update(inside_header(sampling.capture, sampling.interventions))
    sums, usage = await score_continuations(
        exchange, card, rendered, body.choices, param="choices", plain=plain, sampling=sampling
    )
    probabilities = shares([total for total, *_ in sums])
    shape: Scores = {
        "object": "list",
        "model": body.model,
        "best": max(range(len(sums)), key=lambda index: sums[index][0]),
        "data": [
            {"index": index, "choice": choice, "logprob": total, "tokens": count, "probability": probabilities[index]}
            for index, (choice, (total, count, _)) in enumerate(zip(body.choices, sums, strict=True))
        ],
        "usage": usage_object(usage),
    }
    for scored, (_, _, handle) in zip(shape["data"], sums, strict=True):
        if handle is not None:
            scored["capture"] = capture_handle(handle)
    return await written(shape)


async def create_decision(exchange: Exchange) -> Response:
    """Answer questions that have fixed answers with the probability of each."""
    body, card = await exchange.read(DecisionsBody)
    prompts = await decision_plan(exchange, body, card)
    return await json_answer(exchange, _decision(exchange, body, card, prompts))


@dataclass(frozen=True, slots=True)
class Reading:
    """The log-probability of each label of a question, in order, and what they cost."""

    logprobs: list[float]
    usage: Usage


async def _decision(
    exchange: Exchange, body: DecisionsBody, card: ModelCard, planned: list[tuple[ChatPrompt, Media]]
) -> bytes:
    prompts = [prompt for prompt, _ in planned]
    labels = [question_labels(question) for question in body.questions]
    texts = await exchange.client.chat_texts(card.id, prompts)
    finder = LabelFinder(exchange, card)
    found = [await finder.ids(text, wanted) for text, wanted in zip(texts, labels, strict=True)]
    single = [index for index, ids in enumerate(found) if ids is not None]
    readings: dict[int, Reading] = {}
    if single:
        chosen = [(prompts[index], found[index] or []) for index in single]
        readings.update(zip(single, await _read(exchange, body, card, chosen), strict=True))
    for index in set(range(len(prompts))).difference(single):
        if planned[index][1]:
            raise UnsupportedParameter(
                f"The answers of 'questions[{index}]' are not single tokens of model {card.id!r}; such questions are "
                "answered about texts only.",
                param=f"questions[{index}]",
            )
        rendered = await exchange.client.render(card.id, prompts[index])
        sums, usage = await score_continuations(
            exchange, card, rendered, labels[index], param=f"questions[{index}]", plain=False
        )
        readings[index] = Reading([total for total, *_ in sums], usage)
    ordered = [readings[index] for index in range(len(prompts))]
    answers = [_answer(question, each.logprobs) for question, each in zip(body.questions, ordered, strict=True)]
    usage = Usage(
        prompt_tokens=sum(each.usage.prompt_tokens for each in ordered),
        completion_tokens=sum(each.usage.completion_tokens for each in ordered),
        cached_tokens=sum(each.usage.cached_tokens for each in ordered),
    )
    shape: Decision = {"model": body.model, "answers": answers, "usage": usage_of(usage)}
    return await written(shape)


class LabelFinder:
    """Finds the token that each label is at the beginning of a reply."""

    def __init__(self, exchange: Exchange, card: ModelCard) -> None:
        self._exchange = exchange
        self._model = card.id
        self._known: dict[tuple[str, str], int | None] = {}

    async def ids(self, prompt: str, labels: Sequence[str]) -> list[int] | None:
        """The labels' token ids after a prompt; None if one of them is not one token, or two are the same."""
        tail = prompt[-_TAIL:]
        # The bound text is what follows the last of the question: for all questions of a model the same few tails.
        missing = [label for label in labels if (tail, label) not in self._known]
        if missing:
            base = (await self._encoded(tail)).token_ids
            wholes = await asyncio.gather(*(self._encoded(tail + label) for label in missing))
            for label, whole in zip(missing, wholes, strict=True):
                fits = whole.token_ids[:-1] == base
                self._known[tail, label] = whole.token_ids[-1] if fits else None
        ids = [self._known[tail, label] for label in labels]
        single = [token_id for token_id in ids if token_id is not None]
        return single if len(set(single)) == len(labels) else None

    async def _encoded(self, text: str) -> Rendered:
        return await self._exchange.client.render(self._model, TextPrompt(text=text, add_special_tokens=False))


async def _read(
    exchange: Exchange, body: DecisionsBody, card: ModelCard, chosen: Sequence[tuple[ChatPrompt, list[int]]]
) -> list[Reading]:
    """One forward for each prompt: how likely its reply begins with each of its label tokens."""
    wanted = tuple(sorted({token_id for _, ids in chosen for token_id in ids}))
    call = GenerateCall(
        request_id=f"decision-{uuid4().hex}",
        model=card.id,
        prompts=tuple(prompt for prompt, _ in chosen),
        sampling=SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=wanted),
        affinity=exchange.request.headers.get("x-session-affinity") or body.prompt_cache_key,
    )
    gathered = await gather(exchange.generate(call), len(chosen))
    counts = [len(ids) for ids in gathered.accepted.prompt_token_ids]
    cached = [gathered.usage.cached_tokens if index == 0 else 0 for index in range(len(chosen))]
    return [
        Reading(_label_logprobs(choice, ids), Usage(prompt_tokens=count, completion_tokens=1, cached_tokens=reused))
        for choice, (_, ids), count, reused in zip(gathered.choices, chosen, counts, cached, strict=True)
    ]


def _label_logprobs(choice: Choice, ids: Sequence[int]) -> list[float]:
    (first,) = choice.logprobs[:1]
    known = {candidate.token_id: candidate.logprob for candidate in first.top}
    return [max(known.get(token_id, UNLIKELY), UNLIKELY) for token_id in ids]


def _answer(question: Question, logprobs: Sequence[float]) -> Answer:
    probabilities = shares(logprobs)
    best = max(range(len(logprobs)), key=lambda index: logprobs[index])
    confidence = math.exp(logprobs[best])
    if isinstance(question, Predicate):
        return {"type": "predicate", "name": question.name, "probability": probabilities[0]}
    if isinstance(question, ChoiceQuestion):
        return {
            "type": "choice",
            "name": question.name,
            "choice": question.choices[best].value,
            "probabilities": [
                {"value": option.value, "probability": share}
                for option, share in zip(question.choices, probabilities, strict=True)
            ],
            "confidence": confidence,
        }
    return {
        "type": "score",
        "name": question.name,
        "score": math.fsum(value * share for value, share in enumerate(probabilities)),
        "probabilities": [
            {"value": value, "label": level.label, "probability": share}
            for value, (level, share) in enumerate(zip(question.levels, probabilities, strict=True))
        ],
        "confidence": confidence,
    }
