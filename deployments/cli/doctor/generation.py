"""Checks of the answers: that there is one, and that it is the model's own, alone and beside other requests."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import string
from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList

from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.media import image_prompts
from deployments.cli.doctor.subject import Answer, Subject, first_difference, refusal
from deployments.core.calls import Prompt, TextPrompt
from deployments.core.errors import TroupeError, last_line
from deployments.engine.batching.engine import BatchingEngine
from deployments.engine.model.neutral_config import LEFT_OUT
from deployments.engine.text.stop_tokens import terminator_ids
from deployments.engine.verify.proofs import PARITY
from model_loaders.prompts.encoded import Encoded

_NEIGHBORS, _LONGER = 7, 16
"""Requests beside the one that is compared, and how many times as long their answers may be."""
_PATIENCE_S = 30.0
"""Seconds until the others have their first token."""
# What `generate` is to leave alone of a checkpoint's generation_config; the server does so, too.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), 1.0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length"), 0),
}
_UNSET = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length", "forced_eos_token_id"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
    *LEFT_OUT,
)


async def generate(subject: Subject) -> Finding:
    """The greedy answer to the user's message."""
    subject.need_text()
    try:
        answer = await subject.answer(subject.prompt)
    except TroupeError as error:
        broken = error.message.startswith("Hook ") and " returned " in error.message
        return fault("hook-contract" if broken else "request-failed", f"A client gets {refusal(error)}")
    figures: dict[str, Any] = {
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "text": answer.text,
    }
    text = f"{len(answer.token_ids)} tokens, finish_reason {answer.finish_reason}."
    stops = terminator_ids(subject.model.hooks)
    if not set(answer.token_ids) - stops:
        return fault("empty-answer", f"The answer is empty: {text}", **figures)
    return fine(text, repr(answer.text), **figures)


async def parity(subject: Subject) -> Finding:
    """Whether the server gives the tokens of the model's own `generate`, for an image too if the model takes one."""
    subject.need_text()
    if subject.info.generate is not None or subject.info.engine is not None:
        raise NotApplicable("The loader's own generate hook or engine makes the tokens.")
    if not callable(getattr(subject.info.model, "generate", None)):
        raise NotApplicable("The model has no generate to compare with.")
    if subject.info.generate_kwargs:
        raise NotApplicable("The loader's generate_kwargs change what generate gives.")
    prompts = [("", subject.prompt), *(("with an image, ", prompt) for prompt in await image_prompts(subject))]
    compared = 0
    for kind, prompt in prompts:
        served = await subject.answer(prompt, scores=subject.scores)
        own = await _own(subject, prompt)
        compared += len(own)
        place = first_difference(served.token_ids, own)
        if place is not None:
            text = f"{kind}token {place + 1} of {len(own)} differs from that of generate".capitalize()
            figures = {"prompts": len(prompts), "compared_tokens": compared}
            return _differs(subject, "parity-rounding", "not-parity", text, (served, own, place), figures)
    with_image = " for a text, and for an image" if len(prompts) > 1 else ""
    text = f"The {compared} tokens of generate, greedy{with_image}."
    return fine(text, prompts=len(prompts), compared_tokens=compared)


async def batch(subject: Subject) -> Finding:
    """Whether a greedy request gets the same tokens again, and beside seven others."""
    subject.need_text()
    scores = subject.scores
    alone, again = [await subject.answer(subject.prompt, scores=scores, endless=True) for _ in range(2)]
    figures: dict[str, Any] = {"batch": _NEIGHBORS + 1, "compared_tokens": len(alone.token_ids)}
    place = first_difference(alone.token_ids, again.token_ids)
    if place is not None:
        text = f"Token {place + 1} of {len(alone.token_ids)} differs when the request is sent again"
        return _differs(subject, "batch-rounding", "not-repeatable", text, (alone, again.token_ids, place), figures)
    together = await _beside_others(subject, scores)
    place = first_difference(alone.token_ids, together.token_ids)
    if place is None:
        return fine(f"{len(alone.token_ids)} tokens are the same alone and beside {_NEIGHBORS} requests.", **figures)
    text = f"Token {place + 1} of {len(alone.token_ids)} differs beside {_NEIGHBORS} requests"
    return _differs(subject, "batch-rounding", "batch-dependent", text, (alone, together.token_ids, place), figures)


async def _beside_others(subject: Subject, scores: int | None) -> Answer:
    """The answer to a request that comes while others are computed, or wait for their turn."""
    batches = isinstance(subject.model.engine, BatchingEngine)
    length = subject.trial.max_tokens * (_LONGER if batches else 1)
    begun = [asyncio.Event() for _ in range(_NEIGHBORS)]
    neighbors = [
        asyncio.create_task(subject.answer(prompt, max_tokens=length, endless=True, begun=event))
        for prompt, event in zip(random_prompts(subject, _NEIGHBORS), begun, strict=True)
    ]
    try:
        if batches:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), _PATIENCE_S)
        answer = await subject.answer(subject.prompt, scores=scores, endless=True)
        for neighbor in neighbors:
            if neighbor.done():
                neighbor.result()
        return answer
    finally:
        for neighbor in neighbors:
            neighbor.cancel()
        await asyncio.gather(*neighbors, return_exceptions=True)


def random_prompts(subject: Subject, count: int, words: int = 12) -> list[Prompt]:
    """Texts of random words, the same at every run, of different lengths."""
    chance = random.Random(count)
    texts = [
        " ".join(
            "".join(chance.choices(string.ascii_lowercase, k=chance.randint(1, 8)))
            for _ in range(chance.randint(1, words))
        )
        for _ in range(count)
    ]
    longest = subject.model.engine.max_model_len - subject.trial.max_tokens
    return [TextPrompt(text=text[: max(1, longest // 2)]) for text in texts]


def _differs(
    subject: Subject,
    tie: str,
    real: str,
    text: str,
    difference: tuple[Answer, Sequence[int], int],
    figures: dict[str, Any],
) -> Finding:
    """The finding for answers that differ, by how likely the two tokens are where they first do.

    Args:
        tie, real: the codes for two tokens that are equally likely within rounding, and for all else.
        difference: the answer with log-probabilities, the other tokens, and the place.
    """
    answer, others, place = difference
    figures = {**figures, "first_difference": place, "tokens": answer.token_ids, "other_tokens": list(others)}
    gap = _gap(answer, others, place)
    if gap is None:
        return fault(real, f"{text}.", **figures)
    largest = max(10.0, *(abs(candidate.logprob) for candidate in answer.logprobs[place].top))
    allowed = largest * PARITY.tolerance.at(getattr(subject.info.model, "dtype", torch.float32))
    text = f"{text}; the two tokens are {gap:.2g} apart (log-probability)."
    return fault(tie if gap <= allowed else real, text, gap=gap, tolerance=allowed, **figures)


def _gap(answer: Answer, others: Sequence[int], place: int) -> float | None:
    """How far apart the two tokens are in log-probability; None if that is not known."""
    if place >= len(answer.logprobs) or place >= len(others):
        return None
    entry = answer.logprobs[place]
    known = {candidate.token_id: candidate.logprob for candidate in entry.top}
    return abs(entry.logprob - known[others[place]]) if others[place] in known else None


async def _own(subject: Subject, prompt: Prompt) -> list[int]:
    """The greedy tokens of the model's own `generate`, ended by the stop tokens of the server."""
    (encoded,) = await subject.model.encode([prompt])
    try:
        return await asyncio.to_thread(_generated, subject, encoded.encoded)
    except Exception as error:
        raise NotApplicable(f"The model's own generate fails: {last_line(error)}") from error


def _generated(subject: Subject, prompt: Encoded) -> list[int]:
    model: Any = subject.info.model
    config = copy.deepcopy(model.generation_config)
    for name, value in {**dict.fromkeys(_UNSET), **_GREEDY}.items():
        setattr(config, name, value)
    stops = sorted(terminator_ids(subject.model.hooks))
    config.eos_token_id = stops or None
    config.pad_token_id = config.pad_token_id if config.pad_token_id is not None else (stops or [0])[0]
    ids = torch.tensor([prompt.input_ids], device=model.device)
    media = {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in prompt.model_inputs.items()
    }
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            max_new_tokens=subject.trial.max_tokens,
            logits_processor=LogitsProcessorList(subject.info.logits_processors),
            **media,
        )
    begun = 1 if model.config.is_encoder_decoder else len(prompt.input_ids)
    found: list[int] = made[0].tolist()
    return found[begun:]
