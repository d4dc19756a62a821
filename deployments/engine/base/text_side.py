"""What an engine needs of a loaded model's text: its chat template, its encoder and its decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from deployments.core.calls import ChatPrompt
from model_loaders.contract import ModelInfo

if TYPE_CHECKING:
    import torch


class EncodedText(Protocol):
    """A prompt as token ids, the encoder's other tensors (batch dimension 1), and a digest of those."""

    @property
    def input_ids(self) -> list[int]: ...

    @property
    def model_inputs(self) -> Mapping[str, torch.Tensor]: ...

    @property
    def content_key(self) -> str: ...


class TextSide(Protocol):
    """Turns conversations into token ids and token ids into text. `model_loaders.prompts.hooks.Hooks` is the one.

    Every method raises a TroupeError if the loader's hook fails.

    Attributes:
        info: the loaded model.
        sees_images, hears: whether the encoder takes images, recordings.
    """

    info: ModelInfo
    sees_images: bool
    hears: bool

    @property
    def audio_rate(self) -> int:
        """Samples per second of the recordings that the encoder takes."""

    def render(self, chat: ChatPrompt) -> str:
        """The prompt text of a conversation."""

    def encode(self, text: str, *, images: Sequence[Any] = (), audio: Sequence[Any] = ()) -> EncodedText:
        """Token ids of a prompt text with images (RGB) and recordings (float32 [samples])."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
