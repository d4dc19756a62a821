"""One interface of token ids for the library's two kinds of model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from model_loaders.backends.ctranslate2.folder import Folder
from model_loaders.backends.ctranslate2.settings import Settings

# (row, token id, logits of the step or None) -> whether the row has ended. Logits are float32 [vocab].
OnToken = Callable[[int, int, torch.Tensor | None], bool]

# Prompts whose lengths differ step through the difference token by token; up to so much is computed together.
_SPREAD = 64
_FLOATS = 1 << 26


class Backend(Protocol):
    """A loaded model.

    Attributes:
        source_size, target_size: how many token ids prompts and texts may have.
        scores_prompts: whether `prompt_logits` is there.
    """

    source_size: int
    target_size: int
    scores_prompts: bool

    def length_class(self, length: int, params_alike: bool) -> int:
        """Prompts of one class may be computed together; with `params_alike` only where rows go in step."""

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Settings, max_tokens: int, on_token: OnToken
    ) -> list[list[int]]:
        """Decode a batch; tokens are reported as they come, and returned for a beam search, which reports none."""

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """float32 [length, vocab] of each prompt."""

    def choice_logprobs(self, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the tokens of every choice after the prompt, the end token's last."""

    def unload(self) -> None:
        """Free the weights."""


class GeneratorBackend:
    """A decoder. See `Backend`."""

    scores_prompts = True

    def __init__(self, model: Any, folder: Folder) -> None:
        self._model = model
        self._tokens = folder.source_tokens
        self._end = self._tokens.index(folder.config["eos_token"]) if folder.config.get("eos_token") else None
        self.source_size = self.target_size = len(self._tokens)

    def length_class(self, length: int, in_step: bool) -> int:
        return length if in_step else length // _SPREAD

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Settings, max_tokens: int, on_token: OnToken
    ) -> list[list[int]]:
        # The penalty counts only what the decoding loop has seen, so the prompt has to go through it.
        looped = settings.repetition_penalty != 1
        before = max(map(len, prompts)) - 1 if looped else 0
        steps = _Steps([len(prompt) - 1 if looped else 0 for prompt in prompts], on_token, self.target_size)
        try:
            results = self._model.generate_batch(
                [[self._tokens[i] for i in prompt] for prompt in prompts],
                max_length=before + max_tokens,
                min_length=before + settings.min_tokens if settings.min_tokens else 0,
                include_prompt_in_result=looped,
                callback=steps if settings.beam_size == 1 else None,
                **settings.options(),
            )
        finally:
            steps.release()
        return [
            list(result.sequences_ids[0][len(prompt) if looped else 0 :])
            for result, prompt in zip(results, prompts, strict=True)
        ]

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for batch in _bounded(prompts, self.target_size):
            logits = _tensor(self._model.forward_batch([list(prompt) for prompt in batch]))
            found += [logits[row, : len(prompt), : self.target_size] for row, prompt in enumerate(batch)]
        return found

    def choice_logprobs(self, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        ends = [] if self._end is None else [self._end]
        wanted = [[*choice, *ends] for choice in choices]
        logits = self.prompt_logits([[*prompt, *tokens[:-1]] for tokens in wanted])
        return [
            each[len(prompt) - 1 :].log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            for each, tokens in zip(logits, wanted, strict=True)
        ]

    def unload(self) -> None:
        self._model.unload_model()


class TranslatorBackend:
    """An encoder-decoder. See `Backend`.

    Args:
        prefix: tokens that every text begins with; they are not reported.
    """

    scores_prompts = False

    def __init__(self, model: Any, folder: Folder, prefix: Sequence[str]) -> None:
        self._model = model
        self._source = folder.source_tokens
        self._target = folder.target_tokens
        self._ids = {token: i for i, token in enumerate(self._target)}
        self._prefix = list(prefix)
        self._adds = tuple(folder.config.get(name) for name in ("add_source_bos", "add_source_eos"))
        self._marks = tuple(folder.config.get(name) for name in ("bos_token", "eos_token"))
        self.source_size, self.target_size = len(self._source), len(self._target)

    def length_class(self, length: int, in_step: bool) -> int:
        return 0

    def generate(
        self, prompts: Sequence[Sequence[int]], settings: Settings, max_tokens: int, on_token: OnToken
    ) -> list[list[int]]:
        before = len(self._prefix)
        steps = _Steps([before] * len(prompts), on_token, self.target_size)
        try:
            results = self._model.translate_batch(
                [self._words(prompt) for prompt in prompts],
                [self._prefix] * len(prompts) if self._prefix else None,
                max_input_length=0,
                max_decoding_length=before + max_tokens,
                min_decoding_length=before + settings.min_tokens if settings.min_tokens else 0,
                callback=steps if settings.beam_size == 1 else None,
                **settings.options(),
            )
        finally:
            steps.release()
        return [[self._ids[token] for token in result.hypotheses[0][before:]] for result in results]

    def prompt_logits(self, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        raise NotImplementedError("an encoder's prompt has no log-probabilities")

    def choice_logprobs(self, prompt: Sequence[int], choices: Sequence[Sequence[int]]) -> list[list[float]]:
        targets = [[*self._prefix, *(self._target[i] for i in choice)] for choice in choices]
        results = self._model.score_batch([self._words(prompt)] * len(targets), targets, max_input_length=0)
        return [list(result.log_probs)[len(self._prefix) :] for result in results]

    def unload(self) -> None:
        self._model.unload_model()

    def _words(self, prompt: Sequence[int]) -> list[str]:
        """The prompt's tokens, without those that the library adds by itself."""
        words = [self._source[i] for i in prompt]
        if self._adds[0] and words[:1] == [self._marks[0]]:
            words = words[1:]
        if self._adds[1] and words[-1:] == [self._marks[1]]:
            words = words[:-1]
        return words


class _Steps:
    """The library's callback: leaves out the steps of the prompt, and finds each row's logits.

    The library hands the logits of a step, [rows alive, vocab], to the first row it reports in it; the others follow
    in the order of the rows.
    """

    def __init__(self, skipped: Sequence[int], on_token: OnToken, vocab: int) -> None:
        self._left = list(skipped)
        self._on_token: OnToken = on_token
        self._vocab = vocab
        self._step = -1
        self._place = 0
        self._logits: torch.Tensor | None = None

    def release(self) -> None:
        """Hold nothing any more.

        The library's thread drops the callback after the batch was returned. If that were the last way to the model,
        the thread would have to wait for its own end, and the process would be aborted.
        """
        self._on_token = _nothing
        self._logits = None

    def __call__(self, result: Any) -> bool:
        if result.step != self._step:
            self._step, self._place = result.step, 0
            self._logits = None if result.logits is None else _tensor(result.logits)
        place, self._place = self._place, self._place + 1
        row = result.batch_id
        if self._left[row] > 0:
            self._left[row] -= 1
            return False
        logits = None if self._logits is None else self._logits[place, : self._vocab]
        return self._on_token(row, result.token_id, logits)


def _nothing(row: int, token_id: int, logits: torch.Tensor | None) -> bool:
    return True


def _tensor(view: Any) -> torch.Tensor:
    """A StorageView as a float32 tensor of its own on the CPU."""
    import ctranslate2

    if view.device != "cpu":
        view = view.to_device(ctranslate2.Device.cpu)
    return torch.from_numpy(np.array(view.to(ctranslate2.DataType.float32)))


def _bounded(prompts: Sequence[Sequence[int]], vocab: int) -> list[Sequence[Sequence[int]]]:
    """Batches of neighboring prompts whose padded logits stay within a memory bound; at least one prompt each."""
    batches: list[Sequence[Sequence[int]]] = []
    start = 0
    for end in range(1, len(prompts) + 1):
        longest = max(map(len, prompts[start : end + 1]))
        if end == len(prompts) or (end + 1 - start) * longest * vocab > _FLOATS:
            batches.append(prompts[start:end])
            start = end
    return batches
