"""When each word is said: Whisper's cross-attention aligned with its tokens by dynamic time warping.

The decoder attends to the place in the recording that it writes down. Its attention weights are not kept while rows
decode, so a window's tokens are given to the model once more, in one forward with eager attention, and transformers'
own alignment reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from deployments.core.transcript import Word
from deployments.engine.library.transformers_internals import token_times, words_of_tokens
from deployments.media.whisper.format import Span, WhisperFormat, language_name
from model_loaders.contract import ModelInfo


class WordAligner:
    """Aligns the tokens of one model. Shares its weights, but not its attention implementation."""

    def __init__(self, info: ModelInfo, form: WhisperFormat) -> None:
        self._model = _eager_twin(info.model)
        self._heads = info.model.generation_config.alignment_heads
        self._tokenizer = info.tokenizer
        self._format = form

    @staticmethod
    def from_info(info: ModelInfo, form: WhisperFormat) -> WordAligner | None:
        """None where nobody has found out which heads of the checkpoint follow the recording (`alignment_heads`)."""
        return WordAligner(info, form) if getattr(info.model.generation_config, "alignment_heads", None) else None

    def words(
        self,
        window: torch.Tensor,
        frames: int,
        prompt: Sequence[int],
        token_ids: Sequence[int],
        spans: Sequence[Span],
        *,
        language: str,
    ) -> list[list[Word]]:
        """The words of each segment of a window, times in seconds from the window's beginning. Blocks.

        Args:
            window: float32 [1, bins, frames].
            frames: how many of its frames are sound.
            prompt: the decoder's prompt.
            token_ids: what the decoder wrote, without the end of the text.
            spans: the segments; they cover the first of the tokens.
            language: code of the text's language, which says whether spaces part its words.
        """
        times = self._token_times(window, frames, prompt, token_ids)
        words: list[list[Word]] = []
        place = 0
        for span in spans:
            # A token lasts from when the one before it was said until it is said itself.
            lasting = list(zip([0.0, *times][place:], times[place:], strict=False))[: len(span.token_ids)]
            place += len(span.token_ids)
            spoken = [(i, t) for i, t in zip(span.token_ids, lasting, strict=True) if self._format.words_only([i])]
            words.append(self._grouped([i for i, _ in spoken], [t for _, t in spoken], language))
        return words

    def _grouped(self, ids: list[int], times: Sequence[tuple[float, float]], language: str) -> list[Word]:
        if not ids:
            return []
        texts, places = words_of_tokens(self._tokenizer, ids, language_name(language))
        return [
            Word(text.strip(), times[place[0]][0], times[place[-1]][1])
            for text, place in zip(texts, places, strict=True)
            if text.strip()
        ]

    def _token_times(
        self, window: torch.Tensor, frames: int, prompt: Sequence[int], token_ids: Sequence[int]
    ) -> list[float]:
        """When each token has been said."""
        # Fewer than two tokens, or no position of sound: nothing to align.
        if len(token_ids) < 2 or frames < 2:
            return [0.0] * len(token_ids)
        device = self._model.device
        ids = torch.tensor([[*prompt, *token_ids]], device=device)
        with torch.inference_mode():
            seen = self._model(
                input_features=window.to(device, self._model.dtype),
                decoder_input_ids=ids,
                output_attentions=True,
                use_cache=False,
            )
            times = token_times(self._model, ids, seen.cross_attentions, self._heads, frames=frames, prompt=len(prompt))
        return [round(time, 2) for time in times[0, len(prompt) : ids.shape[1]].tolist()]


def _eager_twin(model: Any) -> Any:
    """A copy of a model's modules and config around the same weights, with an attention that returns its weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin.eval()
