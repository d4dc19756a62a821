"""The proof at load: a few prompts through the model's own `generate` one by one, and through an engine together.

One of them shows an image, where the loader's template and encoder make a prompt of one.

Both sides go through the same sampler and output, so that all that can differ is the model's computation.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from deployments.core.calls import ChatPrompt, SamplingParams
from deployments.core.events import Delta, EngineEvent, Failed, is_last
from deployments.core.logprobs import TokenLogprob
from deployments.engine.base.protocol import Engine, EngineRequest
from deployments.engine.base.text_side import EncodedText, TextSide
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.encoder_inputs import encoder_inputs, shorter
from deployments.engine.verify.prompts import drawn_ids, in_turn
from deployments.engine.verify.proofs import PARITY
from deployments.engine.verify.refused import Different, Refused

logger = logging.getLogger(__name__)

_TOKENS = 5
# Tokens of a text before it crosses a length.
_BEFORE = 2
PATIENCE = 2.0
"""Seconds after which no further prompt is tried."""
# A first step may be compiled.
_WAIT = 600.0

Answer = list[TokenLogprob]

Reference = Callable[[EngineRequest], Sequence[EngineEvent]]
"""The events of a request that `generate` computes by itself."""


def compare_with_generate(
    model: Any, vocabulary: Vocabulary, engine: Engine, generate: Reference, crossed: Sequence[int] = ()
) -> int:
    """Compare an engine's logits with those of `generate`.

    Args:
        model: a transformers model whose prompts are token ids.
        vocabulary: of the model; its `text_side` makes the prompt that shows an image.
        engine: an engine of the same model, idle.
        generate: the model's own.
        crossed: lengths to be crossed by a text while it grows, and by a prompt.

    Returns:
        How many prompts were compared.

    Raises:
        Refused: they differ by more than rounding, or the engine fails.
    """
    lengths = [
        *PARITY.lengths,
        *(length - _BEFORE for length in crossed),
        *(length + _TOKENS for length in crossed[-1:]),
    ]
    prompts = in_turn(drawn_ids(model, vocabulary, sum(lengths)), lengths)
    room = engine.max_model_len - _TOKENS
    media = _media(model, vocabulary.text_side)
    requests = [
        _request(f"text-{i}", prompt, media[i % len(media)], f"parity-{i}" if media[0] else "")
        for i, prompt in enumerate(prompts)
    ]
    # Second, as a slow model is asked the first two only.
    requests[1:1] = [
        _request("image", shown.input_ids, shown.model_inputs, shown.content_key)
        for shown in image_prompt(vocabulary.text_side)
    ]
    requests = [request for request in requests if len(request.input_ids) <= room]
    alone = _alone(generate, requests)
    if len(requests) - len(alone) > 1:
        logger.info("%d of %d prompts were tried at load, because generate is slow here.", len(alone), len(requests))
    together = _together(engine, [request for request, _ in alone])
    _compare(alone, together, model.dtype)
    return len(alone)


def _media(model: Any, text_side: TextSide) -> list[Mapping[str, torch.Tensor]]:
    """Inputs that the prompts have in turn: of an encoder that takes no tokens, a whole one and a shorter one."""
    inputs = encoder_inputs(model, text_side)
    return [inputs, (inputs and shorter(model, inputs)) or inputs]


def image_prompt(text_side: TextSide) -> list[EncodedText]:
    """A prompt with an image, as the model's own template and encoder write it; none where they make none."""
    if not text_side.sees_images:
        return []
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB")
    parts: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    texts: list[Callable[[], str]] = [
        lambda: text_side.render(ChatPrompt(messages=[{"role": "user", "content": parts}])),
        lambda: f"{text_side.info.processor.image_token}What is this?",
    ]
    for text in texts:
        try:
            encoded = text_side.encode(text(), images=[picture])
        except Exception as error:
            logger.debug("No prompt with an image: %s: %s", type(error).__name__, error)
            continue
        if encoded.model_inputs:
            return [encoded]
    return []


def _request(name: str, ids: Sequence[int], inputs: Mapping[str, torch.Tensor], key: str) -> EngineRequest:
    return EngineRequest(
        request_id=f"parity-{name}",
        input_ids=list(ids),
        sampling=SamplingParams(max_tokens=_TOKENS, temperature=0.0, ignore_eos=True, logprobs=2),
        model_inputs=inputs,
        content_key=key,
    )


def _alone(generate: Reference, requests: Sequence[EngineRequest]) -> list[tuple[EngineRequest, Answer]]:
    """What each prompt gets by itself; on a slow model, fewer of them, and no image that `generate` refuses."""
    answers = []
    begun = time.monotonic()
    for request in requests:
        try:
            events = generate(request)
        except Exception as error:
            if not request.model_inputs:
                raise
            logger.debug("generate refuses a prompt with an image: %s: %s", type(error).__name__, error)
            continue
        answers.append((request, _scores(events)))
        if len(answers) > 1 and time.monotonic() - begun > PATIENCE:
            break
    return answers


def _together(engine: Engine, requests: Sequence[EngineRequest]) -> list[Answer]:
    """What the prompts get when half of them join the other half on its way."""
    queues: list[queue.Queue[EngineEvent]] = [queue.Queue() for _ in requests]
    events: list[list[EngineEvent]] = [[] for _ in requests]
    half = (len(requests) + 1) // 2
    try:
        for i in range(half):
            engine.submit(requests[i], queues[i].put)
        events[0].append(queues[0].get(timeout=_WAIT))
        for i in range(half, len(requests)):
            engine.submit(requests[i], queues[i].put)
        for i, seen in enumerate(events):
            while not (seen and is_last(seen[-1])):
                seen.append(queues[i].get(timeout=_WAIT))
    except queue.Empty:
        raise Refused("the engine has not answered") from None
    except Exception as error:
        raise Refused(f"the engine failed: {type(error).__name__}: {error}") from error
    for event in itertools.chain.from_iterable(events):
        if isinstance(event, Failed):
            raise Refused(f"the engine failed: {event.error}")
    return [_scores(seen) for seen in events]


def _scores(events: Sequence[EngineEvent]) -> Answer:
    return [entry for event in events if isinstance(event, Delta) for entry in event.logprobs or ()]


def _compare(alone: Sequence[tuple[EngineRequest, Answer]], together: Sequence[Answer], dtype: torch.dtype) -> None:
    unit = PARITY.tolerance.at(dtype)
    compared, worst, place = 0, 0.0, ""
    off = 0
    for (request, expected), found in zip(alone, together, strict=True):
        for position, (one, other) in enumerate(zip(expected, found, strict=False)):
            scale = max(10.0, *(abs(candidate.logprob) for candidate in one.top))
            tolerance = unit * scale
            tied = one.token_id == other.token_id or _gap(one, other.token_id) <= tolerance
            distance = abs(_best(one) - _best(other))
            compared += 1
            if not tied or distance > tolerance:
                off += 1
                if distance >= worst:
                    worst = distance
                    image = " with an image" if request.model_inputs else ""
                    place = f"token {position + 1} after a prompt of {len(request.input_ids)} tokens{image}"
            if one.token_id != other.token_id:
                # From here on the two have different histories.
                break
    if not compared:
        raise Refused("nothing could be compared: generate gave no log-probabilities")
    if (compared - off) / compared < PARITY.tolerance.share(dtype):
        raise Different(f"{off} of {compared} log-probabilities differ from generate's, by {worst:.3g} at {place}")


def _best(entry: TokenLogprob) -> float:
    return entry.top[0].logprob if entry.top else entry.logprob


def _gap(entry: TokenLogprob, token_id: int) -> float:
    """How far below the likeliest token another one is."""
    known = {candidate.token_id: candidate.logprob for candidate in entry.top}
    return _best(entry) - known[token_id] if token_id in known else float("inf")
