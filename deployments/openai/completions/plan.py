"""POST /v1/completions: from the request to the call."""

from __future__ import annotations

from dataclasses import replace

from deployments.config.api import ApiOptions
from deployments.core.calls import GenerateCall, Prompt, SamplingParams, TextPrompt, TokensPrompt
from deployments.core.errors import BadRequest
from deployments.core.model_card import ModelCard
from deployments.core.token_ids import TokenIds
from deployments.openai.completions.schema import CompletionBody, PromptInput
from deployments.openai.fields.sampling import check_choices, check_logprobs, check_no_budget
from deployments.openai.http.exchange import Exchange
from deployments.routing.hint import text_blocks, token_blocks


def completion_plan(exchange: Exchange, body: CompletionBody, card: ModelCard) -> GenerateCall:
    """What the model is asked.

    Raises:
        BadRequest: something in the request cannot be used.
    """
    best_of = _best_of(body)
    check_choices(len(body.prompt) * (best_of or body.n), exchange.options)
    prompts = tuple(completion_prompt(prompt, body) for prompt in body.prompt)
    sampling = _sampling(body, exchange.options)
    affinity = exchange.affinity(body)
    return GenerateCall(
        request_id=exchange.name_call(body),
        model=card.id,
        prompts=prompts,
        sampling=sampling,
        n=body.n,
        best_of=best_of,
        echo=body.echo,
        truncate_prompt=body.truncate_prompt_tokens,
        affinity=affinity,
        blocks=() if affinity else prompt_blocks(card.id, prompts[0]),
        stream=body.stream,
        owner=exchange.owner,
    )


def completion_prompt(prompt: PromptInput, body: CompletionBody) -> Prompt:
    """One prompt of a completion."""
    if isinstance(prompt, str):
        return TextPrompt(text=prompt, add_special_tokens=body.add_special_tokens)
    return TokensPrompt(token_ids=TokenIds(prompt))


def prompt_blocks(model: str, prompt: Prompt) -> tuple[str, ...]:
    """How a prompt begins, for the router."""
    if isinstance(prompt, TokensPrompt):
        return token_blocks(model, prompt.token_ids)
    return text_blocks(model, prompt.text) if isinstance(prompt, TextPrompt) else ()


def _sampling(body: CompletionBody, options: ApiOptions) -> SamplingParams:
    check_logprobs("logprobs", body.logprobs, options)
    check_no_budget(body)
    sampling = body.sampling(options, max_tokens=body.max_tokens, logprobs=body.logprobs)
    if not body.echo or body.logprobs is None:
        return sampling
    both = (body.logprobs, body.prompt_logprobs or 0)
    return replace(sampling, prompt_logprobs=-1 if -1 in both else max(both))


def _best_of(body: CompletionBody) -> int | None:
    if body.best_of is None or body.best_of == body.n:
        return None
    if body.use_beam_search or body.num_beams > 1:
        raise BadRequest("Invalid 'best_of': a beam search ranks its texts itself; leave it out.", param="best_of")
    if body.best_of < body.n:
        raise BadRequest(f"Invalid 'best_of': {body.best_of} is less than n, {body.n}.", param="best_of")
    if body.stream:
        raise BadRequest(
            "Invalid 'best_of': a stream cannot choose the best afterwards; leave it out.", param="best_of"
        )
    return body.best_of
