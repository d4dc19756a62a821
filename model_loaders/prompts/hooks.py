"""A loaded model's hooks, each resolved once: the loader's own, else the tokenizer's or processor's.

Only this class calls hooks, so that an error names the hook that raised an exception or returned a wrong value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from deployments.core.calls import ChatPrompt
from deployments.core.errors import (
    RAISED_BY_HOOKS,
    BadRequest,
    BrokenHook,
    ModelError,
    TroupeError,
    UnsupportedParameter,
    hook_failure,
)
from deployments.core.token_ids import vocab_size
from model_loaders.contract import Hook, ModelInfo
from model_loaders.prompts.chat_template import ChatTemplate
from model_loaders.prompts.encoded import Encoded as Encoded
from model_loaders.prompts.encoded import as_encoded, check_ids
from model_loaders.prompts.media_marks import MediaMarks
from model_loaders.prompts.text import accepted, as_text, parameters_of


class Hooks:
    """Converts messages to token ids and token ids to text, for one loaded model."""

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.tokenizer = info.tokenizer
        self.template = ChatTemplate(info)
        self._encoder: Hook | None = info.encode or info.processor or info.tokenizer
        self._encoder_decoder = bool(getattr(getattr(info.model, "config", None), "is_encoder_decoder", False))
        self.sees_images = self._takes("images", "image_processor")
        self.hears = self._takes("audio", "feature_extractor")
        kinds = [kind for kind, taken in (("image", self.sees_images), ("audio", self.hears)) if taken]
        self.marks = MediaMarks(info, self.template.render, kinds)

    def render(self, chat: ChatPrompt) -> str:
        """The prompt text of a conversation.

        Raises:
            TemplateFailed: there is no template, it refuses these messages, or it leaves one of them out.
            UnsupportedParameter: it has no place for tools, or for parts of some type.
        """
        return self.template.render(chat)

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = False,
        images: Sequence[Any] = (),
        audio: Sequence[Any] = (),
        marked: bool = False,
    ) -> Encoded:
        """Token ids of a prompt text, and the tensors that belong to it.

        A beginning-of-sequence token is added only where asked for and not already written in the text. The prompt of
        an encoder-decoder ends with the end-of-sequence token, as its tokenizer writes it.

        Args:
            images: `PIL.Image.Image`s in RGB, in the order of the conversation.
            audio: float32 arrays [samples] of `audio_rate` samples per second, in the order of the conversation.
            marked: tokens that `marks` has marked in the text are text.

        Raises:
            UnsupportedParameter: images or recordings for a model whose encoder takes none.
            BrokenHook: the hook returned anything but the ids of one prompt, all of the model's vocabulary.
            ModelError: the hook raised.
        """
        if self._encoder is None:
            raise BadRequest(f"Model {self.info.label!r} has no encoder; send token ids.", param="prompt")
        if marked and self._adds_special_tokens(text, add_special_tokens) and self._adds_bos_alone:
            text, add_special_tokens = f"{self.tokenizer.bos_token}{text}", False
        kwargs: dict[str, Any] = {
            "add_special_tokens": self._adds_special_tokens(text, add_special_tokens),
            "return_tensors": "pt",
            **self.info.encode_kwargs,
        }
        if marked:
            kwargs["sanitize_control_tokens"] = True
        if images:
            self.check_images("messages")
            kwargs["images"] = list(images)
        if audio:
            self.check_audio("messages")
            kwargs["audio"], kwargs["sampling_rate"] = list(audio), self.audio_rate
        try:
            if self._encoder is self.info.processor and self.info.encode is None:
                encoded = self._encoder(text=text, **kwargs)
            else:
                encoded = self._encoder(text, **accepted(self._encoder, kwargs))
        except TroupeError:
            raise
        except RAISED_BY_HOOKS as error:
            raise ModelError(hook_failure("encode", error, self.info.encode)) from error
        found = as_encoded(encoded)
        if not found.input_ids and text.strip() and self.info.encode is not None:
            raise BrokenHook(f"Hook encode returned no token ids for a text of {len(text)} characters.")
        source = "Hook encode" if self.info.encode is not None else "The tokenizer"
        check_ids(found.input_ids, vocab_size(self.info.model), source)
        return found

    def check_images(self, param: str) -> None:
        """Refuse images for a model whose encoder takes none.

        Args:
            param: the request field that brought them.

        Raises:
            UnsupportedParameter: code `images_unsupported`.
        """
        if not self.sees_images:
            raise UnsupportedParameter(
                f"Model {self.info.label!r} takes no images.", param=param, code="images_unsupported"
            )

    def check_audio(self, param: str) -> None:
        """Refuse recordings for a model whose encoder takes none.

        Args:
            param: the request field that brought them.

        Raises:
            UnsupportedParameter: code `audio_unsupported`.
        """
        if not self.hears:
            raise UnsupportedParameter(
                f"Model {self.info.label!r} takes no recordings.", param=param, code="audio_unsupported"
            )

    @property
    def audio_rate(self) -> int:
        """Samples per second of the recordings that the encoder takes."""
        extractor = getattr(self.info.processor, "feature_extractor", None)
        return int(getattr(extractor, "sampling_rate", None) or self.info.encode_kwargs.get("sampling_rate") or 16_000)

    @property
    def audio_samples(self) -> int | None:
        """The longest recording that the processor does not truncate; None if there is no limit."""
        extractor = getattr(self.info.processor, "feature_extractor", None)
        if self.info.encode is not None or self._divides_audio:
            return None
        samples = getattr(extractor, "n_samples", None)
        return samples if isinstance(samples, int) else None

    @property
    def _divides_audio(self) -> bool:
        """Whether the processor itself divides a long recording into windows."""
        processor = self.info.processor
        return hasattr(processor, "max_audio_len") or type(processor).__name__.startswith("Voxtral")

    def _takes(self, argument: str, part: str) -> bool:
        """Whether the encoder takes an argument; a transformers processor names all that any of its kind takes."""
        if self._encoder is None or argument not in (parameters_of(self._encoder) or ()):
            return False
        return (
            self._encoder is not self.info.processor or not _is_composed(self._encoder) or hasattr(self._encoder, part)
        )

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of generated token ids.

        Raises:
            ModelError: the hook raised or returned no str.
        """
        own = getattr(self.tokenizer, "decode", None) or getattr(self.info.processor, "decode", None)
        decoder = self.info.decode or own
        if decoder is None:
            raise ModelError(f"Model {self.info.label!r} has no decoder; give its loader a decode hook.")
        kwargs = {"skip_special_tokens": skip_special_tokens, **self.info.decode_kwargs}
        if not skip_special_tokens:
            kwargs["skip_special_tokens"] = False
        ids: Any = torch.tensor(list(token_ids), dtype=torch.long) if self.info.decode else list(token_ids)
        try:
            text = decoder(ids, **accepted(decoder, kwargs))
        except RAISED_BY_HOOKS as error:
            raise ModelError(hook_failure("decode", error, self.info.decode)) from error
        return as_text(text, "decode")

    def _adds_special_tokens(self, text: str, asked: bool) -> bool:
        if self._encoder_decoder:
            return not _ends(text, getattr(self.tokenizer, "eos_token", None))
        return asked and not self._begins_with_bos(text)

    @property
    def _adds_bos_alone(self) -> bool:
        """Whether the tokenizer's special tokens are a beginning-of-sequence token and nothing else."""
        bos = getattr(self.tokenizer, "bos_token_id", None)
        return bos is not None and self.tokenizer("")["input_ids"] == [bos]

    def _begins_with_bos(self, text: str) -> bool:
        bos = getattr(self.tokenizer, "bos_token", None)
        return isinstance(bos, str) and bool(bos) and text.startswith(bos)


def _ends(text: str, token: Any) -> bool:
    return isinstance(token, str) and bool(token) and text.endswith(token)


def _is_composed(processor: object) -> bool:
    """Whether it is one of transformers' processors, made of a tokenizer and processors of other kinds."""
    return any(base.__name__ == "ProcessorMixin" for base in type(processor).__mro__)
