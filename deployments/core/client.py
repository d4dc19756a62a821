"""The interface between the OpenAI routes and the models.

Implemented by a Ray Serve handle (`deployments.ingress`) and by the models of this process (`deployments.local`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from deployments.core.calls import Call, ChatPrompt, Prompt, Turn
from deployments.core.events import Event
from deployments.core.model_card import ModelCard


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt in the form that the model gets. `text` is None for a prompt of token ids."""

    text: str | None
    token_ids: Sequence[int]
    max_model_len: int
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTexts:
    """Conversations as the chat template writes them."""

    texts: tuple[str, ...]
    fingerprint: str = ""


class TokenPiece(NamedTuple):
    """What a token adds to a text: its characters, and its exact bytes, which may be a part of one."""

    token: str
    bytes: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings:
    """A vector for each prompt, as little-endian float32, and the tokens they took."""

    vectors: tuple[bytes, ...]
    prompt_tokens: int
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions:
    """How a request wants its vectors computed; None takes the model's own setting.

    Attributes:
        normalize: bring vectors to length 1; None does what the model's folder says, else brings them to it.
        dimensions: keep only the first; they are brought to length 1 unless `normalize` is False.
        truncate: keep at most this many tokens of a text; -1 keeps what the model takes, None refuses longer ones.
        truncation_side: where tokens are left out, "left" or "right"; None leaves it to the tokenizer.
        prompt_name: which of the model's own prompts goes before every text; None takes its default.
        param: the request field that has the texts.
        turn: when the texts are encoded and computed.
    """

    normalize: bool | None = None
    dimensions: int | None = None
    truncate: int | None = None
    truncation_side: str | None = None
    prompt_name: str | None = None
    param: str = "input"
    turn: Turn = field(default_factory=Turn)


class CaptureClient(Protocol):
    """The captures and the uploaded vectors of all replicas.

    Args named `owner` are digests of API keys: a capture is there for the key that made it alone.
    """

    async def handles(self, owner: str) -> list[dict[str, Any]]:
        """The handles of a key's captures."""

    async def info(self, capture_id: str, owner: str) -> dict[str, Any] | None:
        """The handle of a capture whose file is complete; None if there is none.

        Raises:
            CapturePending: the file is not complete in time.
        """

    async def piece(self, capture_id: str, owner: str, offset: int, size: int) -> bytes | None:
        """Bytes of a capture's file; None if there is none."""

    async def delete(self, capture_id: str, owner: str) -> bool:
        """Drop a capture; False if there is none."""

    async def put_vector(self, data: bytes) -> str:
        """Keep a vector on every replica; its id.

        Raises:
            BadRequest: it is not a safetensors file with one tensor `vector`.
        """


class ModelClient(Protocol):
    """The configured models, wherever they are loaded. Every method raises errors of `deployments.core.errors`.

    A method that takes `expect` raises VersionMismatch if the model's weights are not those, `w<12>`; empty accepts
    any.
    """

    @property
    def captures(self) -> CaptureClient:
        """Captured states, and vectors for interventions."""

    def models(self) -> Sequence[ModelCard]:
        """Every configured model, in the order of the configuration."""

    def resolve(self, name: str) -> ModelCard:
        """The model with this id or alias.

        Raises:
            ModelNotFound: there is none.
        """

    def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a generation. Closing the generator stops the computation."""

    async def render(self, model: str, prompt: Prompt, *, expect: str = "") -> Rendered:
        """A prompt's text after the chat template, and its token ids."""

    async def chat_texts(self, model: str, prompts: Sequence[ChatPrompt], *, expect: str = "") -> ChatTexts:
        """Conversations as the chat template writes them; nothing is encoded, and no medium decoded."""

    async def detokenize(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> str:
        """The text of token ids, special tokens included."""

    async def spell(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[str, ...]:
        """Token ids as they are written in the vocabulary, such as `Ġthe`."""

    async def pieces(self, model: str, token_ids: Sequence[int], *, expect: str = "") -> tuple[TokenPiece, ...]:
        """What each token adds to a text, special tokens included; the same as in log-probabilities."""

    async def embed(
        self, model: str, prompts: Sequence[Prompt], options: EmbedOptions, *, expect: str = ""
    ) -> Embeddings:
        """A vector for each prompt."""

    async def modules(self, model: str, pattern: str) -> dict[str, Any]:
        """What can be captured and changed inside a model, as JSON values.

        Args:
            pattern: of the modules' names; empty lists all.
        """

    async def tokenizer_info(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """What a client needs to know of the tokenizer, `model_max_length` and `fingerprint`, as JSON values."""

    async def fingerprint_parts(self, model: str, *, expect: str = "") -> dict[str, Any]:
        """The model's `fingerprint` and what it is made of, as JSON values. Loads the model."""

    async def discover(self, name: str) -> bool:
        """Whether there is a model of this name after all, which came while the server runs; `resolve` knows it then.

        Raises:
            Unavailable: nobody knows now.
        """

    async def add_model(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Add the model that a request describes; its state, and whether it is new.

        Raises:
            TroupeError: it cannot be added.
        """

    async def remove_model(self, name: str) -> int:
        """Remove a model that was added; on how many replicas it was loaded.

        Raises:
            ModelNotFound: there is none.
            NameTaken: it was not added, but comes from elsewhere.
        """

    async def model_states(self, *, refresh: bool = False) -> list[dict[str, Any]]:
        """Every model and every folder that is not one, with its state, as JSON values.

        Args:
            refresh: search all folders first.
        """

    async def ready(self) -> None:
        """Raise TroupeError if no request can be answered now."""

    async def metrics(self) -> str:
        """The metrics of all models and replicas, in Prometheus' text format."""

    async def status(self) -> list[dict[str, Any]]:
        """The state of each replica, as JSON values."""

    async def load(self, model: str) -> None:
        """Load a model now."""

    async def unload(self, model: str) -> bool:
        """Unload a model when it is no longer in use; False if it is not loaded. A later request loads it again."""

    async def drain(self, on: bool = True) -> None:
        """Refuse new calls and finish the running ones, or accept calls again."""
