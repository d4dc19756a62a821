"""What an engine with default options answers, against `generate` for each prompt by itself on a model of its own.

Prompts come staggered and at once, after a common prefix, with a second turn, drawn by seed, beside one that is
cancelled, and with media where the model has them. All go through one engine: what a request leaves there counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from deployments.engine.base.protocol import Engine
from tests.engine.running import Answer, built_engine, generate_alone, model_info, prompt, start
from tests.engine.zoo import MEDIA_TOKENS, Specimen

LENGTHS = (5, 40, 63, 64, 65, 130)
BRIEF, TOKENS = 7, 12
"""Tokens of an answer."""
_PREFIX = 48


@dataclass(frozen=True)
class Prompt:
    """Tokens, and the tensors beside them."""

    ids: list[int]
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    content_key: str = ""


class AsAlone:
    """One engine of a model, and the checks that its answers are those of `generate` alone.

    Args:
        specimen: what to build.
        tolerance: of log-probabilities.
        options: of the engine, beside its defaults.
    """

    def __init__(self, specimen: Specimen, *, tolerance: float = 1e-3, **options: Any) -> None:
        self.specimen = specimen
        self._tolerance = tolerance
        self._tokens = TOKENS
        self._untouched = specimen.build()
        self.model = specimen.build()
        self.engine: Engine = built_engine(model_info(self.model), **options)

    def prompts(self, lengths: Sequence[int], *, seed: int = 0, begin: Sequence[int] = (), media: bool) -> list[Prompt]:
        """Prompts of some lengths, which may begin alike or show something, each something else."""
        made = []
        for i, length in enumerate(lengths):
            ids = [*begin, *prompt(seed + i, length)]
            if media:
                ids = [*[MEDIA_TOKENS["image"]] * self.specimen.media_tokens, *ids]
                made.append(Prompt(ids, self.specimen.inputs(len(ids), seed + i), f"media-{seed + i}"))
            else:
                made.append(Prompt(ids))
        return made

    def send(self, asked: Prompt, **sampling: Any) -> Answer:
        settings = {"max_tokens": self._tokens, "ignore_eos": True, "logprobs": 0, **sampling}
        return start(self.engine, asked.ids, inputs=asked.inputs, content_key=asked.content_key, **settings)

    def check(self, prompts: Sequence[Prompt], runs: Sequence[Answer]) -> None:
        """Wait for greedy answers, and compare them once the engine is idle: some forwards set torch's global seed."""
        for run in runs:
            run.wait(timeout=120.0)
        for asked, run in zip(prompts, runs, strict=True):
            self._compare(asked, run)

    def _compare(self, asked: Prompt, run: Answer) -> None:
        model, count = copy.deepcopy(self._untouched), len(run.token_ids)
        alone = generate_alone(model, asked.ids, count, generate=self.specimen.generate(model), **asked.inputs)
        assert run.token_ids == alone.token_ids, f"a prompt of {len(asked.ids)} tokens"
        assert run.logprobs == pytest.approx(alone.logprobs, abs=self._tolerance)

    def at_once(self, prompts: Sequence[Prompt]) -> None:
        self.check(prompts, [self.send(asked) for asked in prompts])

    def staggered(self, prompts: Sequence[Prompt]) -> None:
        """Each prompt comes once the one before it has some tokens, or is done."""
        runs: list[Answer] = []
        for i, asked in enumerate(prompts):
            runs.append(self.send(asked, max_tokens=self._tokens + 3 * i))
            while not runs[-1].ended and len(runs[-1].token_ids) < 3:
                runs[-1].next()
        self.check(prompts, runs)

    def second_turn(self, asked: Prompt) -> None:
        """A prompt that goes on from an answer and from the prompt that it answers."""
        first = self.send(asked)
        self.check([asked], [first])
        ids = [*asked.ids, *first.token_ids, *prompt(77, 20)]
        inputs = self.specimen.inputs(len(ids), 0) if asked.inputs else {}
        again = Prompt(ids, {**asked.inputs, **self._of_length(inputs, asked.inputs)}, asked.content_key)
        self.check([again], [self.send(again)])

    def _of_length(self, longer: Mapping[str, torch.Tensor], first: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The tensors whose size follows the prompt's."""
        return {name: value for name, value in longer.items() if value.shape != first[name].shape}

    def seeds(self, prompts: Sequence[Prompt]) -> None:
        """Drawn tokens depend on the seed, not on the neighbors."""
        settings = {"temperature": 0.8, "top_p": 0.95}
        alone = [self.send(asked, seed=i, **settings).wait().token_ids for i, asked in enumerate(prompts)]
        runs = [self.send(asked, seed=i, **settings) for i, asked in enumerate(prompts)]
        assert [run.wait().token_ids for run in runs] == alone

    def cancelled(self, prompts: Sequence[Prompt]) -> None:
        """The second of some requests leaves midway."""
        runs = [self.send(asked) for asked in prompts]
        while not runs[1].ended and len(runs[1].token_ids) < 4:
            runs[1].next()
        self.engine.cancel(runs[1].request_id)
        self.check([prompts[0], *prompts[2:]], [runs[0], *runs[2:]])

    def queued(self, prompts: Sequence[Prompt], counts: Sequence[int]) -> None:
        """Answers of different lengths, of which more are asked for than run at once."""
        runs = [self.send(asked, max_tokens=count) for asked, count in zip(prompts, counts, strict=True)]
        self.check(prompts, runs)

    def everything(self) -> None:
        """All of it."""
        for media in ([False] if self.specimen.text else []) + ([True] if self.specimen.shapes else []):
            prompts = self.prompts(LENGTHS, media=media)
            self.at_once(prompts)
            self.staggered(self.prompts(LENGTHS[::-1], seed=10, media=media))
            self.at_once(self.prompts((9, 30, 12, 50), seed=20, begin=prompt(99, _PREFIX), media=media))
            self.second_turn(prompts[2])
            self.seeds(self.prompts((20, 7, 33), seed=30, media=media))
            self.cancelled(self.prompts((44, 21, 12), seed=40, media=media))
            for asked in prompts[:3]:
                self.check([asked], [self.send(asked)])

    def briefly(self) -> None:
        """The parts that show most."""
        self._tokens = BRIEF
        media = not self.specimen.text
        self.at_once(self.prompts((9, 65), media=media))
        self.staggered(self.prompts((40, 63, 5), seed=10, media=media))
        self.second_turn(self.prompts((70,), seed=20, media=media)[0])


@contextmanager
def as_alone(specimen: Specimen, **kwargs: Any) -> Iterator[AsAlone]:
    """The checks of a model, whose engine is closed after them."""
    checks = AsAlone(specimen, **kwargs)
    try:
        yield checks
    finally:
        checks.engine.close(5.0)
