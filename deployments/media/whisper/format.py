"""How Whisper writes what it hears: the tokens of its prompt, its rules for times, and segments from its answers.

Radford et al., Robust Speech Recognition via Large-Scale Weak Supervision (arXiv:2212.04356), sections 2.3 and 3.8. The
ids are the checkpoint's own, from its generation_config and tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import (
    LogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from deployments.core.errors import BadRequest, UnsupportedParameter
from deployments.media.audio import Samples
from model_loaders.contract import ModelInfo

FRAMES_PER_SECOND = 100
# Two frames of the spectrogram are one position of the encoder, which one time token stands for.
_FRAMES_PER_POSITION = 2
_SECONDS_PER_POSITION = _FRAMES_PER_POSITION / FRAMES_PER_SECOND


@dataclass(frozen=True, slots=True)
class Span:
    """A segment within a window: times in seconds from the window's beginning, and its tokens."""

    start: float
    end: float
    token_ids: tuple[int, ...]


class WhisperFormat:
    """The tokens and sizes of one checkpoint.

    Attributes:
        rate: samples per second of its recordings.
        frames: of a window.
        limit: positions of the decoder, prompt and text together.
        languages: ISO codes and their token ids; empty where the model knows only one.
        no_speech: the token that says that nobody speaks.
    """

    def __init__(self, info: ModelInfo) -> None:
        config = info.model.generation_config
        self._tokenizer = info.tokenizer
        self._extractor = info.processor.feature_extractor
        self._name = info.label
        self._start = int(config.decoder_start_token_id)
        self._no_times = int(config.no_timestamps_token_id)
        self._config = config
        tasks = getattr(config, "task_to_id", None) or self._known(["transcribe", "translate"])
        named = getattr(config, "lang_to_id", None) or self._known(LANGUAGES)
        multilingual = getattr(config, "is_multilingual", True)
        self._tasks: Mapping[str, int] = tasks if multilingual else {}
        self.languages = {token.strip("<|>"): token_id for token, token_id in named.items()} if multilingual else {}
        self.no_speech = self._no_times - 1
        self.rate = int(self._extractor.sampling_rate)
        self.frames = _FRAMES_PER_POSITION * int(info.model.config.max_source_positions)
        self.limit = int(info.model.config.max_target_positions)

    @staticmethod
    def from_info(info: ModelInfo) -> WhisperFormat | None:
        """The format of a model that is a Whisper, else None."""
        config = getattr(info.model, "generation_config", None)
        hears = hasattr(info.processor, "feature_extractor") and getattr(info.model, "main_input_name", "") == (
            "input_features"
        )
        whisper = hears and hasattr(config, "no_timestamps_token_id") and hasattr(info.model.config, "num_mel_bins")
        return WhisperFormat(info) if whisper and info.model.config.is_encoder_decoder else None

    def features(self, samples: Samples) -> tuple[torch.Tensor, int]:
        """The spectrogram of a recording and how many of its frames are sound.

        Returns:
            float32 [1, bins, frames]: one window where the recording fits in, filled up with silence before the
            spectrum is taken; else as long as the recording.
        """
        fits = len(samples) <= self._extractor.n_samples
        padding = {} if fits else {"padding": "longest", "truncation": False}
        found = self._extractor(samples, sampling_rate=self.rate, return_tensors="pt", **padding).input_features
        frames = -(-len(samples) * FRAMES_PER_SECOND // self.rate)
        return found, min(frames, int(found.shape[-1]))

    def window(self, features: torch.Tensor, seek: int) -> torch.Tensor:
        """The window that begins at a frame, float32 [1, bins, frames], filled up with zeros."""
        piece = features[..., seek : seek + self.frames]
        return torch.nn.functional.pad(piece, (0, self.frames - piece.shape[-1]))

    def language_id(self, language: str, param: str = "language") -> int | None:
        """The token of a language given by code or English name; None where the model has no such tokens.

        Raises:
            BadRequest: the model does not know it.
        """
        given = language.strip().lower()
        code = TO_LANGUAGE_CODE.get(given, given)
        if not self.languages:
            if code == "en":
                return None
            raise UnsupportedParameter(f"Model {self._name!r} knows English only; leave {param} out.", param=param)
        if code not in self.languages:
            raise BadRequest(
                f"Invalid '{param}': model {self._name!r} does not know {language[:40]!r}; it knows "
                f"{', '.join(sorted(self.languages))}.",
                param=param,
            )
        return self.languages[code]

    def opening(self) -> list[int]:
        """The prompt after which the model names the language, or says that nobody speaks."""
        return [self._start]

    def after_opening(self, prompt: Sequence[int]) -> int | None:
        """Where in a prompt the model's answer to the opening stands; None where the prompt ends with the opening."""
        place = len(prompt) - list(reversed(prompt)).index(self._start)
        return place if place < len(prompt) else None

    def prompt(
        self, language: int | None, task: Literal["transcribe", "translate"], *, times: bool, before: Sequence[int] = ()
    ) -> list[int]:
        """The decoder's prompt.

        Args:
            times: the model writes times.
            before: tokens of what might have been said before, from `context`.

        Raises:
            UnsupportedParameter: the model cannot translate.
        """
        ids = [*before, self._start]
        if self.languages:
            ids += [] if language is None else [language]
            ids.append(self._task(task))
        elif task == "translate":
            self._task(task)
        return ids if times else [*ids, self._no_times]

    def context(self, text: str) -> list[int]:
        """A request's prompt as tokens.

        Raises:
            BadRequest: it has special tokens in it, or is too long.
        """
        if not text.strip():
            return []
        try:
            ids = [int(i) for i in self._tokenizer.get_prompt_ids(text, return_tensors="np")]
        except ValueError as error:
            raise BadRequest(f"Invalid 'prompt': {error}", param="prompt") from error
        most = self.limit // 2 - 1
        if len(ids) > most:
            raise BadRequest(
                f"Invalid 'prompt': model {self._name!r} takes at most {most - 1} tokens of it; got {len(ids) - 1}.",
                param="prompt",
            )
        return ids

    def processors(self, prompt: Sequence[int], device: torch.device, *, times: bool) -> list[LogitsProcessor]:
        """The rules of what may be written after a prompt, in the order of Whisper's own `generate`."""
        config, rules = self._config, []
        if config.begin_suppress_tokens is not None:
            first = SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, len(prompt), device=device)
            rules.append(first)
        if config.suppress_tokens is not None:
            rules.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
        if times:
            rules.append(WhisperTimeStampLogitsProcessor(config, begin_index=len(prompt)))
        return rules

    def spans(self, token_ids: Sequence[int], frames: int) -> tuple[list[Span], int]:
        """The segments of a window's answer, and by how many frames to move on.

        A segment ends where two times follow each other. What comes after the last such pair is cut off by the
        window's end, so it is left for the next window, which begins there; unless it ends with a single time, which
        says that nobody speaks after it.

        Args:
            token_ids: without the end of the text.
            frames: how many of the window are sound.
        """
        is_time = [token_id > self._no_times for token_id in token_ids]
        cuts = [i + 1 for i in range(len(token_ids) - 1) if is_time[i] and is_time[i + 1]]
        silent_end = is_time[-2:] == [False, True]
        if not cuts:
            return [Span(0.0, self._last_time(token_ids, frames), tuple(token_ids))], frames
        if silent_end:
            cuts.append(len(token_ids))
        pieces = [token_ids[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
        spans = [Span(self._time(piece[0]), self._time(piece[-1]), tuple(piece)) for piece in pieces]
        moved = (token_ids[cuts[-1] - 1] - self._no_times - 1) * _FRAMES_PER_POSITION
        return spans, frames if silent_end or moved <= 0 else moved

    def words_only(self, token_ids: Sequence[int]) -> list[int]:
        """The tokens that are text."""
        return [token_id for token_id in token_ids if token_id < self._first_special]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, times and other special ones left out."""
        ids = self.words_only(token_ids)
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _known(self, names: Iterable[str]) -> dict[str, int]:
        """The tokens <|name|> of the tokenizer, for a checkpoint whose generation_config has no maps of them."""
        found = {name: self._tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names}
        unknown = (None, self._tokenizer.unk_token_id)
        return {name: token_id for name, token_id in found.items() if token_id not in unknown}

    @property
    def _first_special(self) -> int:
        """Whisper's vocabularies have the text first, then the end of the text, languages, tasks and times."""
        end = self._config.eos_token_id
        return min(self._start, int(end[0] if isinstance(end, list) else end))

    def _time(self, token_id: int) -> float:
        return (token_id - self._no_times - 1) * _SECONDS_PER_POSITION

    def _last_time(self, token_ids: Sequence[int], frames: int) -> float:
        times = [token_id for token_id in token_ids if token_id > self._no_times]
        if times and times[-1] > self._no_times + 1:
            return self._time(times[-1])
        return frames // _FRAMES_PER_POSITION * _SECONDS_PER_POSITION

    def _task(self, task: str) -> int:
        if task not in self._tasks:
            raise UnsupportedParameter(f"Model {self._name!r} cannot {task}.", param="model")
        return self._tasks[task]


def language_name(code: str) -> str:
    """The English name of a language, as OpenAI's answers have it; the code itself where it has none."""
    return str(LANGUAGES.get(code, code))
