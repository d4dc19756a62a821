"""Checks of the prompt: what the chat template writes, and which tokens the model gets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from deployments.cli.doctor.finding import Finding, NotApplicable, fault, fine
from deployments.cli.doctor.subject import Subject, assistant, refusal, user
from deployments.core.errors import TroupeError
from deployments.core.token_ids import vocab_size
from deployments.engine.text.stop_tokens import special_tokens, terminator_ids

_SHOWN, _WIDTH = 48, 88
_ANSWER = "ANSWERWORD"
_MARKER = re.compile(r"<\|[^<>|\s]+\|>")
# Letters that a tokenizer without them cannot keep, each as part of a word: json, code, other languages.
_CHARACTERS = ("\n", "\t", "  ", "{", "}", "<", ">", "[", "\\", "_", "`", "~", "A", "é", "ß", "я", "日", "ا", "😀")


async def template(subject: Subject) -> Finding:
    """Whether chats have a prompt, and which one."""
    subject.need_text()
    try:
        written = await subject.render([user(subject.trial.message)])
    except TroupeError as error:
        subject.template_error = error
        if subject.info.apply_chat_template is None and subject.model.hooks.template.describe() is None:
            return fault("no-chat-template", f"Chats are refused: {refusal(error)}")
        return fault("template-fails", f"Chats are refused: {refusal(error)}")
    source = "the loader's hook" if subject.info.apply_chat_template else "a chat template"
    text = written.text or ""
    return fine(f"A prompt of {len(text)} characters, written by {source}.", repr(text), text=text)


async def tokens(subject: Subject) -> Finding:
    """The ids of the prompt and the text of each."""
    subject.need_text()
    written = await subject.host.render(subject.entry.id, subject.prompt)
    ids, special = written.token_ids, set(special_tokens(subject.info.tokenizer).values())
    found = [token_id for token_id in ids if token_id in special]
    plain = [mark for mark in sorted({*_MARKER.findall(written.text or "")}) if len(await subject.encode(mark)) > 1]
    details = await _table(subject, ids, special)
    if plain:
        details.append(f"written as ordinary text, not as one token: {', '.join(plain)}")
    return fine(
        f"{len(ids)} tokens, {len(found)} of them special (without quotes).",
        *details,
        token_ids=list(ids),
        special_token_ids=found,
        markers_as_text=plain,
    )


async def vocabulary(subject: Subject) -> Finding:
    """Whether the model has an embedding for every token of its tokenizer."""
    subject.need_text()
    rows, tokenizer = vocab_size(subject.info.model), subject.info.tokenizer
    if rows is None or not hasattr(tokenizer, "__len__"):
        raise NotApplicable("The number of tokens or of embeddings is not known.")
    figures: dict[str, Any] = {"tokens": len(tokenizer), "embeddings": rows}
    if len(tokenizer) <= rows:
        return fine(f"The tokenizer has {len(tokenizer)} tokens, the model {rows} embeddings.", **figures)
    lost = range(rows, len(tokenizer))
    named = ", ".join(await subject.host.spell(subject.entry.id, lost[:3]))
    text = f"The model has {rows} embeddings, so {len(lost)} of {len(tokenizer)} tokens have none: {named}"
    return fault("tokens-without-embedding", f"{text}{' …' if len(lost) > 3 else '.'}", **figures)


async def bos(subject: Subject) -> Finding:
    """Whether prompts begin with the beginning-of-sequence token as often as they should."""
    subject.need_text()
    token, token_id = (getattr(subject.info.tokenizer, name, None) for name in ("bos_token", "bos_token_id"))
    if token_id is None:
        raise NotApplicable("The tokenizer has no beginning-of-sequence token.")
    plain = await subject.encode(subject.trial.message, special=True)
    prompts = {"completion": plain}
    if subject.template_error is None:
        prompts = {"chat": tuple((await subject.render([user(subject.trial.message)])).token_ids), **prompts}
    counts = {kind: _leading(ids, token_id) for kind, ids in prompts.items()}
    figures: dict[str, Any] = {"bos_token": str(token), "bos_token_id": int(token_id), "leading": counts}
    doubled = [kind for kind, count in counts.items() if count > 1]
    if doubled:
        kind = doubled[0]
        return fault("double-bos", f"The prompt of a {kind} begins with {counts[kind]} x {token}.", **figures)
    if counts["completion"] and not counts.get("chat", 1):
        text = f"The prompt of a completion begins with {token}, and that of a chat does not."
        return fault("missing-bos", text, **figures)
    has = " and ".join(f"of a {kind}" for kind, count in counts.items() if count)
    return fine(f"The prompt {has} begins with {token}." if has else f"No prompt begins with {token}.", **figures)


async def generation_prompt(subject: Subject) -> Finding:
    """Whether the prompt opens the assistant's turn, if the template marks such turns."""
    subject.need_chat()
    messages = [user(subject.trial.message)]
    opened, base = await subject.text_of(messages), await subject.text_of(messages, opens=False)
    opening = opened.removeprefix(base) if opened.startswith(base) else opened
    if opened != base:
        return fine(f"The prompt opens the assistant's turn with {opening!r}.", opening=opening)
    try:
        answered = await subject.text_of([*messages, assistant(_ANSWER)], opens=False)
    except TroupeError as error:
        raise NotApplicable(f"The template writes no answer: {refusal(error)}") from error
    before = answered.partition(_ANSWER)[0]
    mark = before.removeprefix(base) if before.startswith(base) else ""
    if not mark.strip():
        return fine("The template marks no assistant's turn that a prompt could open.", opening="")
    return fault(
        "no-generation-prompt",
        f"The template writes {mark!r} before an answer, and the prompt does not end with it.",
        opening="",
        expected=mark,
    )


async def prompt_end(subject: Subject) -> Finding:
    """Whether a prompt ends with a token that ends answers."""
    subject.need_text()
    if getattr(getattr(subject.info.model, "config", None), "is_encoder_decoder", False):
        raise NotApplicable("The prompt of an encoder-decoder ends with such a token.")
    stops = terminator_ids(subject.model.hooks)
    prompts = {"completion": await subject.encode(subject.trial.message, special=True)}
    if subject.template_error is None:
        prompts["chat"] = tuple((await subject.render([user(subject.trial.message)])).token_ids)
    for kind, ids in prompts.items():
        if ids and ids[-1] in stops:
            (text,) = await subject.host.spell(subject.entry.id, ids[-1:])
            found = f"The prompt of a {kind} ends with {text} ({ids[-1]}), which is a stop token."
            return fault("stop-in-prompt", found, last_token_id=ids[-1])
    return fine("No prompt ends with a stop token.", last_token_id=None)


async def round_trip(subject: Subject) -> Finding:
    """Whether the ids of the prompt are decoded to its text."""
    subject.need_text()
    written = await subject.host.render(subject.entry.id, subject.prompt)
    decoded = await subject.host.detokenize(subject.entry.id, written.token_ids)
    text = written.text or ""
    if text in decoded:
        return fine("The ids of the prompt are decoded to its text.")
    details = (f"encoded: {text!r}", f"decoded: {decoded!r}")
    if _letters(text) in _letters(decoded):
        return fault("lossy-text", "White space or capital letters of the prompt are lost.", *details, decoded=decoded)
    return fault("round-trip", "The ids of the prompt are decoded to another text.", *details, decoded=decoded)


async def characters(subject: Subject) -> Finding:
    """Which of the characters that benchmarks use do not reach the model."""
    subject.need_text()
    lost = [character for character in _CHARACTERS if not await _kept(subject, character)]
    if not lost:
        return fine(f"{len(_CHARACTERS)} characters of code, JSON and other languages are kept.", lost=[])
    return fault("lossy-text", f"These characters are lost: {' '.join(map(repr, lost))}.", lost=lost)


async def _kept(subject: Subject, character: str) -> bool:
    ids = await subject.encode(f"a{character}b")
    return character in await subject.host.detokenize(subject.entry.id, ids)


async def _table(subject: Subject, ids: Sequence[int], special: set[int]) -> list[str]:
    """Ids and texts, several in a line, texts of ordinary tokens in quotes; the middle of a long prompt is left out."""
    half = _SHOWN // 2
    lines = [""]
    for part in [ids] if len(ids) <= _SHOWN else [ids[:half], ids[-half:]]:
        cells = [f"… {len(ids) - _SHOWN} more …"] if lines[0] else []
        for token_id in part:
            text = await subject.host.detokenize(subject.entry.id, [token_id])
            cells.append(f"{token_id} {text if token_id in special else repr(text)}")
        for cell in cells:
            lines += [""] if len(lines[-1]) + len(cell) > _WIDTH else []
            lines[-1] += ("   " if lines[-1] else "") + cell
    return lines


def _leading(ids: Sequence[int], token_id: int) -> int:
    """How often a token stands at the beginning."""
    return next((i for i, each in enumerate(ids) if each != token_id), len(ids))


def _letters(text: str) -> str:
    return "".join(text.split()).casefold()
