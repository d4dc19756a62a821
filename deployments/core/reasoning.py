"""How models mark their reasoning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The markers of a model's reasoning, which is at the beginning of a text.

    Attributes:
        opening, closing: the texts around the reasoning.
        begins: in a format of channels, the text that begins any message; empty in others.
        answer: in a format of channels, the texts after which, all of them in this order, the answer begins.
        between: in a format of channels, what stands between the end of the reasoning and those.
        closed: the end of a prompt after which there is no reasoning; by default `last`.
    """

    opening: str
    closing: str
    begins: str = ""
    answer: tuple[str, ...] = ()
    between: str = ""
    closed: str = ""

    @property
    def first(self) -> str:
        """The text that the model writes first, unless it begins with the answer."""
        return self.begins or self.opening

    @property
    def last(self) -> tuple[str, ...]:
        """The texts after which the answer begins."""
        return self.answer or (self.closing,)

    @property
    def end(self) -> str:
        """The texts that end the reasoning or begin the answer."""
        return self.closing + self.between + "".join(self.answer)

    def opened_by(self, prompt: str | None, *, continued: bool) -> bool:
        """Whether a prompt leaves the reasoning open.

        Args:
            continued: the prompt ends within a message.
        """
        if prompt is None:
            return False
        ends = prompt.rstrip().endswith(self.opening)
        return ends or (continued and prompt.rfind(self.opening) > prompt.rfind(self.closing))

    def closed_by(self, prompt: str | None, *, continued: bool) -> bool:
        """Whether a prompt excludes reasoning, because it ends after closed reasoning or within an answer.

        Args:
            continued: the prompt ends within a message.
        """
        if prompt is None or self.opened_by(prompt, continued=continued):
            return False
        return continued or prompt.rstrip().endswith(self.closed or "".join(self.last))
