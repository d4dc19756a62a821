"""What is proved of a model when it loads: the table, with tolerances and lengths of prompts, and the line in the log.

Each entry of the table names the module that makes the comparison.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from deployments.engine.verify.refused import Different, Unfaithful

logger = logging.getLogger("troupe.engine")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much two results may differ.

    Attributes:
        of: what is compared, in words.
        float32, float16, bfloat16: for each dtype of a model; others are as bfloat16.
        half_share: the share of results in half precision that must agree, since rounding alone can flip an expert's
            choice. In float32 all must.
    """

    of: str
    float32: float = 0.0
    float16: float = 0.0
    bfloat16: float = 0.0
    half_share: float = 1.0

    def at(self, dtype: torch.dtype) -> float:
        """The largest difference for a model of a dtype."""
        return {torch.float32: self.float32, torch.float16: self.float16}.get(dtype, self.bfloat16)

    def share(self, dtype: torch.dtype) -> float:
        """The least share of results that must agree."""
        return 1.0 if dtype is torch.float32 else self.half_share

    def said(self, dtype: torch.dtype) -> str:
        """In words, for a model of a dtype."""
        return f"{self.of} within {limit:g}" if (limit := self.at(dtype)) else self.of


# Of the spread of a row of logits. Rounding of a few layers.
_LOGITS = Tolerance("logits", 1e-3, 0.2, 0.2)
# For each unit of the largest log-probability.
_LOGPROBS = Tolerance("log-probabilities", 1e-4, 4e-3, 3e-2, half_share=0.7)
# For each unit of the largest number of a state.
_STATES = Tolerance("hidden states", 1e-5, 2e-2, 2e-2)
_SAME_BITS = Tolerance("the same bits")
_CONTRACT = Tolerance("types and shapes")


@dataclass(frozen=True, slots=True)
class Proof:
    """An entry of the table.

    Attributes:
        name: in the log.
        claim: what holds for the model if the proof succeeds.
        module: makes the comparison.
        tolerance: of the comparison.
        lengths: tokens of its prompts, or rows of its inputs, beside those that follow from the model's config.
    """

    name: str
    claim: str
    module: str
    tolerance: Tolerance
    lengths: tuple[int, ...] = ()


HOOKS = Proof(
    "hooks",
    "The loader's template, encode, decode and embed hooks return what the contract says.",
    "deployments/host/hook_probe.py",
    _CONTRACT,
)
ROTARY = Proof(
    "rotary frequencies",
    "Rotary frequencies that follow the length of a sequence are found, so that each sequence gets its own.",
    "deployments/engine/model/rotary.py",
    _SAME_BITS,
)
FORWARD = Proof(
    "forward",
    "A prompt has the same logits with a cache, in chunks, padded, and beside another prompt; also beyond every length "
    "that the config names.",
    "deployments/engine/verify/capabilities.py",
    _LOGITS,
    (9, 4),
)
PACKED = Proof(
    "packed linears",
    "A packed weight gives the same products.",
    "deployments/engine/speedups/packed_linear.py",
    _SAME_BITS,
    (1, 8, 33),
)
DETERMINISTIC = Proof(
    "deterministic mode",
    "A decode step gives a sequence the same logits in batches of every size.",
    "deployments/engine/speedups/deterministic.py",
    _SAME_BITS,
    (1, 7, 70, 33, 64),
)
INSIDE = Proof(
    "inside",
    "The slices of what each module gives in a batch are those of each prompt alone; what differs is not offered for "
    "capture and interventions.",
    "deployments/engine/inside/measure.py",
    _LOGITS,
    (12, 7),
)
PARITY = Proof(
    "the answers of generate",
    "Prompts that are batched get the log-probabilities that `generate` gives for each of them alone.",
    "deployments/engine/verify/parity.py",
    _LOGPROBS,
    (33, 1, 12, 9, 70),
)
GENERATE = Proof(
    "generate in batches",
    "`generate` gives padded prompts what it gives each of them alone.",
    "deployments/engine/verify/generate_probe.py",
    _LOGPROBS,
    (33, 12, 70),
)
GENERATE_LENGTHS = Proof(
    "generate beyond lengths",
    "The same beyond every length that the config names.",
    "deployments/engine/verify/generate_lengths.py",
    _LOGITS,
    (12,),
)
RESUMED = Proof(
    "generate resumed",
    "A text that was stopped goes on with the same logits.",
    "deployments/engine/verify/generate_probe.py",
    _LOGPROBS,
    GENERATE.lengths,
)
FIXED_DECODE = Proof(
    "captured steps",
    "The first two decode steps of every captured or compiled shape give the logits of ordinary steps. Not at load.",
    "deployments/engine/speedups/fixed_decode.py",
    _LOGITS,
)
EMBEDDING = Proof(
    "embeddings in batches",
    "Padded texts get the hidden states of each text alone. For a model that also gives text: at its first embedding.",
    "deployments/host/embedding/padding.py",
    _STATES,
    (40, 17, 5),
)
TABLE = (
    *(HOOKS, ROTARY, FORWARD, INSIDE, PACKED, DETERMINISTIC, PARITY, GENERATE, GENERATE_LENGTHS, RESUMED),
    *(FIXED_DECODE, EMBEDDING),
)


class Note:
    """What a proof has found, in words; nothing is logged of one without."""

    found = ""


class Proofs:
    """The proofs of one model while it loads.

    Args:
        known: what was proved of another model of the same kind, by the names of proofs; what is proved now is added.
    """

    def __init__(self, known: dict[str, Any] | None = None) -> None:
        self._made: list[tuple[Proof, str, float]] = []
        self._known: dict[str, Any] = {} if known is None else known
        self._recalled: set[str] = set()

    def recall(self, proof: Proof, prove: Callable[[], T]) -> T:
        """What a proof found for a model of the same kind; else what `prove` finds now.

        Raises:
            Exception: of `prove`. That the model's results differ is remembered and raised again; what may pass, such
                as a lack of memory, is not.
        """
        if proof.name not in self._known:
            try:
                self._known[proof.name] = prove()
            except (Different, Unfaithful) as error:
                self._known[proof.name] = type(error)(str(error))  # Without its traceback, which holds the model.
                raise
        else:
            self._recalled.add(proof.name)
        found = self._known[proof.name]
        if isinstance(found, Different | Unfaithful):
            raise type(found)(str(found))
        value: T = found
        return value

    def recalls(self, proof: Proof) -> bool:
        """Whether what holds for this model was found with another one of its kind."""
        return proof.name in self._recalled

    def forget(self, proof: Proof) -> None:
        """Prove it again, for this model and later ones."""
        self._known.pop(proof.name, None)
        self._recalled.discard(proof.name)

    @contextlib.contextmanager
    def of(self, proof: Proof) -> Iterator[Note]:
        """Time what makes a proof, and note what it finds; an error means that it was not proved."""
        note, begun = Note(), time.monotonic()
        try:
            yield note
        except Exception:
            note.found = "no"
            raise
        finally:
            if note.found:
                note.found += ", as before" if self.recalls(proof) else ""
                self._made.append((proof, note.found, time.monotonic() - begun))

    def log(self, model: str, dtype: torch.dtype) -> None:
        """Write the line of a model that is loaded.

        Args:
            model: its name.
            dtype: of its weights, which the tolerances follow.
        """
        each = [f"{p.name} ({p.tolerance.said(dtype)}): {found}, {seconds:.2f} s" for p, found, seconds in self._made]
        total = sum(seconds for _, _, seconds in self._made)
        logger.info("Model %s was checked at load in %.2f s: %s.", model, total, "; ".join(each) or "nothing to check")


def close(logits: Tensor, expected: Tensor) -> bool:
    """Whether two rows of logits differ by no more than rounding."""
    tolerance = _LOGITS.at(expected.dtype)
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean()).norm()
    return bool((logits - expected).norm() <= tolerance * spread)


def same_distributions(expected: Tensor, found: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits `[..., vocab]` agree: the likeliest tokens, and their log-probabilities but for rounding."""
    if expected.shape != found.shape or not expected.numel():
        return False
    one, other = expected.log_softmax(-1), found.log_softmax(-1)
    best, at = one.max(-1)
    others_best, others_at = other.max(-1)
    tolerance = _LOGPROBS.at(dtype) * best.abs().clamp(min=10.0)
    gap = best - one.gather(-1, others_at[..., None])[..., 0]
    same = ((at == others_at) | (gap <= tolerance)) & ((best - others_best).abs() <= tolerance)
    return bool(same.float().mean() >= _LOGPROBS.share(dtype))
