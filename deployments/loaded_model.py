"""A model as it is served: its hooks, its engine, and the thread that encodes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from deployments.config import ModelEntry
from deployments.engine.choice import build_engine
from deployments.engine.protocol import Engine
from deployments.errors import ModelError
from deployments.images import decode_image, split_images
from deployments.messages import ChatPrompt, Prompt, TextPrompt, TokensPrompt
from deployments.threads import Worker
from model_loaders.contract import ModelInfo
from model_loaders.hooks import Encoded, Hooks

T = TypeVar("T")

CLOSE_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as text, where there is one, and as token ids and tensors."""

    text: str | None
    encoded: Encoded


class LoadedModel:
    """A model with its hooks and engine. Encoding runs in a thread of its own."""

    def __init__(self, entry: ModelEntry, info: ModelInfo) -> None:
        self.entry = entry
        self.info = info
        self.hooks = Hooks(info)
        self.engine: Engine = build_engine(info, entry.engine)
        self._codec = Worker(f"codec-{entry.id}")

    async def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Render and encode prompts off the event loop."""
        return await self._off_loop(lambda: [self._encode(prompt) for prompt in prompts])

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self._off_loop(lambda: self.hooks.decode(token_ids, skip_special_tokens=False))

    def close(self) -> None:
        """End the engine, run the loader's `close`, free memory. Blocks."""
        self.engine.close(CLOSE_LIMIT_S)
        self._codec.stop()
        if self.info.close is not None:
            self.info.close()

    async def _off_loop(self, function: Callable[[], T]) -> T:
        try:
            return await self._codec.run(function, self.entry.hook_timeout_s)
        except TimeoutError as error:
            raise ModelError(
                f"A hook of model {self.entry.id!r} has not returned for {self.entry.hook_timeout_s:g} s (at {error})."
            ) from None

    def _encode(self, prompt: Prompt) -> EncodedPrompt:
        match prompt:
            case TokensPrompt():
                return EncodedPrompt(text=None, encoded=Encoded(input_ids=list(prompt.token_ids)))
            case TextPrompt():
                encoded = self.hooks.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
                return EncodedPrompt(text=prompt.text, encoded=encoded)
            case ChatPrompt():
                return self._encode_chat(prompt)

    def _encode_chat(self, prompt: ChatPrompt) -> EncodedPrompt:
        chat, sources = split_images(prompt)
        if sources:
            self.hooks.check_images(sources[0].param)
        text = self.hooks.render(chat)
        encoded = self.hooks.encode(text, images=[decode_image(source) for source in sources])
        return EncodedPrompt(text=text, encoded=encoded)
