"""Texts that are far too long: refused before they are encoded, and never one that fits."""

from __future__ import annotations

import asyncio
import threading
from typing import Any
from uuid import uuid4

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from deployments.args import read_args
from deployments.core.calls import ChatPrompt, GenerateCall, SamplingParams, TextPrompt
from deployments.core.errors import BadRequest, ContextOverflow
from deployments.core.events import Failed, Finished
from deployments.host.host import ModelHost
from deployments.host.prompt_limits import LONG_TEXT, longest_token
from model_loaders.contract import ModelInfo
from model_loaders.demo import load_model


def info_of(tokenizer: Tokenizer, **fields: Any) -> ModelInfo:
    return ModelInfo(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer), **fields)


def byte_level(**more: Any) -> Tokenizer:
    """Bytes, and one token of four spaces."""
    letters = sorted(ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, "ĠĠ", "ĠĠĠĠ"])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("Ġ", "Ġ"), ("ĠĠ", "ĠĠ")], **more))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made


def with_parts(**parts: Any) -> Tokenizer:
    made = byte_level()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def with_added(token: AddedToken) -> Tokenizer:
    made = byte_level()
    made.add_tokens([token])
    return made


def byte_fallback(missing: int | None = None) -> Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256) if byte != missing} | {"▁": 300, "ab": 301, "<unk>": 302}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    return made


@pytest.mark.parametrize(
    ("tokenizer", "longest"),
    [
        (byte_level(), 4),
        (with_added(AddedToken("<|a longer one|>")), 16),
        (byte_fallback(), 6),
        (byte_fallback(missing=7), None),
        (with_added(AddedToken("<m>", lstrip=True)), None),
        (with_added(AddedToken("<m>", rstrip=True)), None),
        (with_parts(normalizer=normalizers.Strip()), None),
        (with_parts(normalizer=normalizers.NFC()), None),
        (with_parts(normalizer=normalizers.Replace("    ", " ")), None),
        (with_parts(pre_tokenizer=pre_tokenizers.Whitespace()), None),
        (
            with_parts(
                pre_tokenizer=pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
                )
            ),
            None,
        ),
        (Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")), None),
        (Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), None),
    ],
)
def test_what_a_token_covers(tokenizer: Tokenizer, longest: int | None) -> None:
    info = info_of(tokenizer)
    assert longest_token(info) == longest
    assert longest_token(ModelInfo(tokenizer=info.tokenizer, encode=lambda text: {})) is None
    if longest is not None:
        for text in (" " * 1000, "ab" * 500, "é😀" * 300, "<|a longer one|>" * 50):
            assert len(info.tokenizer(text)["input_ids"]) * longest >= len(text)


class Gated:
    """The demo model's tokenizer, which waits in the middle of every long text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.begun, self.go_on = tokenizer, threading.Event(), threading.Event()
        self.lengths: list[tuple[int, str]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: str, **kwargs: Any) -> Any:
        self.lengths.append((len(text), threading.current_thread().name))
        if len(text) > LONG_TEXT:
            self.begun.set()
            assert self.go_on.wait(60)
            text = text[:10]
        return self.tokenizer(text, **kwargs)


def call(prompt: Any, **more: Any) -> GenerateCall:
    sampling = SamplingParams(max_tokens=1)
    return GenerateCall(request_id=uuid4().hex, model="m", prompts=(prompt,), sampling=sampling, **more)


async def outcome(host: ModelHost, asked: GenerateCall) -> Any:
    events = [event async for event in host.generate(asked)]
    return events[-1].error if isinstance(events[-1], Failed) else events[-1]


def host_of(tokenizer: Any, **entry: Any) -> ModelHost:
    info = load_model("cpu")
    given = ModelInfo(model=info.model, tokenizer=tokenizer or info.tokenizer, model_name="demo")
    return ModelHost(read_args({"models": [{"id": "m", "loader": "x:y", **entry}]}), "cpu", given={"m": given})


LONG = TextPrompt(text="x" * (LONG_TEXT + 1))


def test_a_short_text_does_not_wait_for_a_long_one() -> None:
    async def both() -> None:
        tokenizer = Gated(load_model("cpu").tokenizer)
        host = host_of(tokenizer, max_prompt_chars=2 * LONG_TEXT)
        await host.load("m")
        long = [asyncio.create_task(outcome(host, call(LONG))) for _ in range(2)]
        await asyncio.to_thread(tokenizer.begun.wait, 60)
        assert not isinstance(await outcome(host, call(TextPrompt(text="short"))), Exception)
        assert not any(task.done() for task in long)
        assert [name for length, name in tokenizer.lengths if length > LONG_TEXT] == ["long-codec-m"]  # one at a time
        tokenizer.go_on.set()
        assert [type(each) for each in await asyncio.gather(*long)] == [Finished] * 2
        await host.close()

    asyncio.run(both())


CHAT = ChatPrompt(messages=[{"role": "user", "content": LONG.text}])


@pytest.mark.parametrize(("prompt", "param"), [(LONG, "prompt"), (CHAT, "messages")])
def test_what_cannot_fit_is_not_encoded(prompt: Any, param: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> Any:
        host = host_of(None)
        await host.load("m")
        async with host.lease("m") as model:
            assert longest_token(model.info) is not None
            monkeypatch.setattr(model.hooks, "encode", None)  # Nobody calls it.
        error = await outcome(host, call(prompt))
        await host.close()
        return error

    error = asyncio.run(ask())
    assert isinstance(error, ContextOverflow)
    assert error.param == param


@pytest.mark.parametrize("more", [{}, {"truncate_prompt": 5}])
def test_a_prompt_has_so_many_characters(more: dict[str, Any]) -> None:
    async def ask(text: str) -> Any:
        host = host_of(Gated(load_model("cpu").tokenizer), max_prompt_chars=20)
        answer = await outcome(host, call(TextPrompt(text=text), **more))
        await host.close()
        return answer

    assert not isinstance(asyncio.run(ask("x" * 20)), Exception)
    error = asyncio.run(ask("x" * 21))
    assert isinstance(error, BadRequest)
    assert "21 characters; model 'm' reads at most 20 (max_prompt_chars)" in error.message


@pytest.mark.parametrize(
    ("content", "more"), [("x", {}), ("x", {"truncate_prompt": 5}), ([{"type": "text", "text": "x"}], {})]
)
def test_a_conversation_too_long_to_be_read_is_not_written(content: Any, more: dict[str, Any]) -> None:
    """Its texts alone are longer than what is encoded: no template needs to say so."""
    written: list[int] = []

    def template(messages: Any, **kwargs: Any) -> str:
        written.append(len(messages))
        return "".join(str(message["content"]) for message in messages)

    async def ask(count: int) -> Any:
        info = load_model("cpu")
        given = ModelInfo(model=info.model, tokenizer=info.tokenizer, apply_chat_template=template)
        args = read_args({"models": [{"id": "m", "loader": "x:y", "max_prompt_chars": 500}]})
        host = ModelHost(args, "cpu", given={"m": given})
        await host.load("m")
        written.clear()
        messages = [{"role": "user", "content": content}] * count
        error = await outcome(host, call(ChatPrompt(messages=messages), **more))
        await host.close()
        return error

    assert isinstance(asyncio.run(ask(501)), BadRequest)
    assert not written
    assert not isinstance(asyncio.run(ask(20)), Exception)
    assert written
