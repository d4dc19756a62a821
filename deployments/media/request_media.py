"""The media of one request: counted together, and each decoded once, however many of its prompts show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from deployments.core.calls import ChatPrompt
from deployments.core.errors import BadRequest
from deployments.media.audio import AUDIO_PARTS, AudioBudget, Samples, audio_source, check_headers, decode_source
from deployments.media.images import IMAGE_PARTS, decode_image, image_source, open_images
from deployments.media.parts import Kind, MediaLimits, MediaSource, Read

READERS: dict[str, tuple[Kind, Read]] = {
    **dict.fromkeys(IMAGE_PARTS, ("image", image_source)),
    **dict.fromkeys(AUDIO_PARTS, ("audio", audio_source)),
}
"""What reads each type of part, and which limits count it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownChat:
    """A conversation with placeholders for its media.

    Attributes:
        chat: tokens of media in its texts are marked as text.
        images, recordings: in the order of the conversation.
        marked: the request field with the first such token; None if there is none.
    """

    chat: ChatPrompt
    images: Sequence[MediaSource]
    recordings: Sequence[MediaSource]
    marked: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenChat(ChatPrompt):
    """A conversation that its template has written as `text`."""

    shown: ShownChat
    text: str


class RequestMedia:
    """The images and recordings of a request's prompts.

    What stands at the same place in several prompts, with the same content, is one medium.

    Args:
        limits: of what the request has together.
        rate: samples per second of the recordings as the model takes them; 0 if it takes none.
        max_samples: of one recording; None has no limit.
        label: the model's name, for errors.
    """

    def __init__(self, limits: MediaLimits, *, rate: int, max_samples: int | None, label: str) -> None:
        self._limits = limits
        self._rate = rate
        self._max_samples = max_samples
        self._label = label
        self._budget = AudioBudget(limits.seconds, limits.samples)
        self._images: Counter[MediaSource] = Counter()
        self._recordings: Counter[MediaSource] = Counter()
        self._opened: dict[MediaSource, Image] = {}
        self._decoded: dict[MediaSource, Image] = {}
        self._samples: dict[MediaSource, Samples] = {}

    def add(self, images: Sequence[MediaSource], recordings: Sequence[MediaSource]) -> None:
        """Count the media of a prompt.

        Raises:
            BadRequest: the request has too many.
        """
        self._images.update(images)
        self._recordings.update(recordings)
        self._limits.check_parts([*self._images, *self._recordings])

    def open(self) -> None:
        """Check the headers of all media before any is decoded.

        Raises:
            UnsupportedParameter: one is not in the request itself.
            BadRequest: one cannot be read, or they are too large together.
        """
        sources = list(self._images)
        opened = open_images(sources, max_pixels=self._limits.pixels)
        self._opened.update(zip(sources, opened, strict=True))
        check_headers(list(self._recordings), max_seconds=self._limits.seconds, max_samples=self._limits.samples)

    def image(self, source: MediaSource) -> Image:
        """An image of a prompt, in RGB; only this prompt has the object. Takes one of its uses.

        Raises:
            BadRequest: it cannot be decoded.
        """
        if source in self._opened:
            self._decoded[source] = decode_image(self._opened.pop(source), source)
        return self._decoded.pop(source) if _is_last(self._images, source) else self._decoded[source].copy()

    def recording(self, source: MediaSource) -> Samples:
        """A recording of a prompt; only this prompt has the array. Takes one of its uses.

        Returns:
            float32 [samples]

        Raises:
            BadRequest: it cannot be decoded, or the model's processor would cut it short in silence.
        """
        if source not in self._samples:
            self._samples[source] = self._heard(source)
        return self._samples.pop(source) if _is_last(self._recordings, source) else self._samples[source].copy()

    def _heard(self, source: MediaSource) -> Samples:
        samples = decode_source(source, self._rate, max_seconds=self._limits.seconds, budget=self._budget)
        if self._max_samples is not None and len(samples) > self._max_samples:
            raise BadRequest(
                f"Invalid '{source.param}': the recording has {len(samples) / self._rate:.2f} s; model "
                f"{self._label!r} hears at most {self._max_samples / self._rate:g} s.",
                param=source.param,
                code="audio_too_long",
            )
        return samples


def _is_last(uses: Counter[MediaSource], source: MediaSource) -> bool:
    """Take one of the uses of a medium; whether no other is left."""
    uses[source] -= 1
    return uses[source] == 0
