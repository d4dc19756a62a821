"""What a checkpoint's generation_config bans or forces as part of the model's format."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Phrase = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FormatRules:
    """Tokens that a model's format bans or forces.

    Attributes:
        suppressed: ids never generated (`suppress_tokens`, and the words of `bad_words_ids` that are one token).
        first_suppressed: ids that are not the first free token (`begin_suppress_tokens`).
        first: the id the text begins with (`forced_bos_token_id`, of a decoder that has only its start token).
        phrases: ids never generated one after the other (the longer words of `bad_words_ids`), by the last but one.
    """

    suppressed: tuple[int, ...] = ()
    first_suppressed: tuple[int, ...] = ()
    first: int | None = None
    phrases: dict[int, list[Phrase]] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Any, eos_ids: Collection[int], vocab_size: int) -> FormatRules:
        """The rules of a generation_config; None has none.

        Args:
            eos_ids: the model's terminators, which no bad word bans.
            vocab_size: width of the logits.
        """
        words = [tuple(word) for word in getattr(config, "bad_words_ids", None) or ()]
        phrases: dict[int, list[Phrase]] = {}
        for word in words:
            if len(word) > 1 and 0 <= word[-1] < vocab_size:
                phrases.setdefault(word[-2], []).append(word)
        alone = {word[0] for word in words if len(word) == 1} - set(eos_ids)
        suppressed = alone.union(getattr(config, "suppress_tokens", None) or ())
        first_suppressed = getattr(config, "begin_suppress_tokens", None) or ()
        return cls(
            suppressed=tuple(sorted(token for token in suppressed if 0 <= token < vocab_size)),
            first_suppressed=tuple(token for token in first_suppressed if 0 <= token < vocab_size),
            first=getattr(config, "forced_bos_token_id", None),
            phrases=phrases,
        )

    def after(self, prompt_ids: Sequence[int]) -> FormatRules:
        """The rules after a prompt: a first token is only forced after a single one."""
        return self if len(prompt_ids) == 1 else replace(self, first=None)

    @property
    def always(self) -> bool:
        """Whether some rule holds at every token."""
        return bool(self.suppressed or self.phrases)

    @property
    def beginning(self) -> int:
        """The number of tokens at the start that have special rules."""
        return (self.first is not None) + bool(self.first_suppressed)

    def banned(self, prompt: Sequence[int], generated: Sequence[int]) -> npt.NDArray[np.int64]:
        """Token ids that are forbidden after a prompt and some generated tokens."""
        at_first = len(generated) == (self.first is not None)
        return np.array(
            [
                *self.suppressed,
                *(self.first_suppressed if at_first else ()),
                *(self._completing(prompt, generated) if self.phrases else ()),
            ],
            dtype=np.int64,
        )

    def forced(self, generated: int) -> int | None:
        """The only id that may come next, if there is one."""
        return self.first if generated == 0 else None

    def for_generate(self) -> dict[str, Any]:
        """The rules as arguments of transformers' `generate`."""
        phrases = [list(word) for words in self.phrases.values() for word in words]
        given = {
            "suppress_tokens": list(self.suppressed),
            "begin_suppress_tokens": list(self.first_suppressed),
            "forced_bos_token_id": self.first,
            "bad_words_ids": phrases,
        }
        return {name: value for name, value in given.items() if value not in ([], None)}

    def _completing(self, prompt: Sequence[int], generated: Sequence[int]) -> list[int]:
        """The last ids of the phrases of which all others have just been written."""
        last = generated[-1] if generated else prompt[-1] if prompt else -1
        found = []
        for phrase in self.phrases.get(last, ()):
            count = len(phrase) - 1
            tail = [*prompt[-count:], *generated[-count:]][-count:]
            if tuple(tail) == phrase[:-1]:
                found.append(phrase[-1])
        return found
