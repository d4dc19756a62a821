"""A model as it is served: its hooks, its engine, and the thread that encodes for it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from deployments.config.api import CaptureOptions
from deployments.config.model import ModelEntry
from deployments.core.calls import ChatPrompt, Prompt, TextPrompt, TokensPrompt, TranscribeCall
from deployments.core.client import Embeddings, EmbedOptions, TokenPiece
from deployments.core.errors import ModelError, UnsupportedParameter
from deployments.core.events import Event
from deployments.engine.base.admission import check_supported
from deployments.engine.base.protocol import Engine
from deployments.engine.base.running_requests import Interval
from deployments.engine.base.threaded import ThreadedEngine
from deployments.engine.batching.memory import weight_bytes
from deployments.engine.build import build_engine
from deployments.engine.no_text import NoTextEngine
from deployments.engine.text.stop_tokens import terminator_ids
from deployments.engine.text.vocabulary import Vocabulary
from deployments.engine.verify.proofs import EMBEDDING, HOOKS, Proofs
from deployments.host.embedding.embedder import Embedder, check_ids
from deployments.host.embedding.text import EmbeddingTexts
from deployments.host.fingerprint import ModelFingerprint
from deployments.host.hook_probe import probe_hooks
from deployments.host.inside.captures import CaptureStore
from deployments.host.inside.offered import check_inspected, read_vectors
from deployments.host.prompt_limits import PromptLimits, is_long
from deployments.host.template_processes import TemplateProcesses
from deployments.host.worker import Worker
from deployments.media.parts import MediaLimits, split_media
from deployments.media.request_media import READERS, RequestMedia, ShownChat, WrittenChat
from deployments.media.whisper.format import WhisperFormat
from deployments.media.whisper.transcriber import Transcriber
from deployments.media.whisper.word_times import WordAligner
from deployments.openai.parsing.format import answers_of
from model_loaders.contract import ModelInfo
from model_loaders.prompts.encoded import Encoded
from model_loaders.prompts.hooks import Hooks
from model_loaders.prompts.tokenizer_card import tokenizer_card, tokens_of
from model_loaders.sentence_format import format_of

T = TypeVar("T")
P = TypeVar("P", bound=Prompt)

CLOSE_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPrompt:
    """A prompt as text, where there is one, and as token ids and tensors."""

    text: str | None
    encoded: Encoded


Written = TokensPrompt | TextPrompt | WrittenChat


class LoadedModel:
    """A model with its hooks and engine. Encoding runs in a thread of its own.

    Args:
        media: limits on the media of one request.
        templates: render chat templates of requests.
        named: the model's fingerprint.
        captures: of its requests.
        known: what was proved of models of the same kind, see `Proofs`.

    Attributes:
        answers: how it writes tool calls and reasoning, and how that was found; None if it holds no conversations.
        submitting: the thread that queues requests: the engine looks at each of their token ids.
        computing: the context of what is computed beside the engine.
        weight_bytes: of its parameters, as they are loaded.
    """

    def __init__(
        self,
        entry: ModelEntry,
        info: ModelInfo,
        *,
        media: MediaLimits | None = None,
        templates: TemplateProcesses | None = None,
        named: ModelFingerprint | None = None,
        captures: CaptureStore | None = None,
        known: dict[str, Any] | None = None,
    ) -> None:
        self.captures = captures or CaptureStore(CaptureOptions())
        self.entry = entry
        self._templates = templates or TemplateProcesses()
        self.named = named or ModelFingerprint()
        self._media = media or MediaLimits()
        self.info = info
        self.weight_bytes = weight_bytes(info.model)
        proofs = Proofs(known)
        with proofs.of(HOOKS) as note:
            note.found = ", ".join(probe_hooks(info, limit=entry.hook_timeout_s))
        info.vectors = read_vectors(info)
        self.hooks = Hooks(info)
        self._card: dict[str, Any] | None = None
        template = self.hooks.template.source(tools=True)
        self.answers = answers_of(entry.id, entry.api, template, tokens_of(info.tokenizer), info.described_answers)
        self._vocabulary: Vocabulary | None = None
        self.engine: Engine = build_engine(
            info,
            entry.engine,
            self.hooks,
            turn_limit_s=entry.hook_timeout_s,
            proofs=proofs,
            inside=entry.inside != "off" or bool(info.inspect),
        )
        check_inspected(info, self.engine)
        self.speech = WhisperFormat.from_info(info) if info.engine is None and info.generate is None else None
        self._aligner = None if self.speech is None else WordAligner.from_info(info, self.speech)
        self._codec = Worker(f"codec-{entry.id}")
        self._long_codec: Worker | None = None
        self._limits = PromptLimits(info, self.engine.max_model_len, entry.max_prompt_chars)
        self._embedding = Worker(f"embed-{entry.id}")
        self.computing: Callable[[], AbstractContextManager[None]] = nullcontext
        self.submitting = Worker(f"submit-{entry.id}")
        sentence_format = format_of(info)
        self._texts = EmbeddingTexts(info, self._encode_plainly, sentence_format, limit=self.engine.max_model_len)
        self._embedder = Embedder(
            info, sentence_format, pooling=entry.api.pooling, alone=entry.engine.deterministic, proofs=proofs
        )
        if isinstance(self.engine, NoTextEngine):
            with proofs.of(EMBEDDING) as note:
                note.found = self._embedder.probe()
        proofs.log(entry.id, getattr(info.model, "dtype", torch.float32))

    @property
    def fingerprint(self) -> str:
        """The name of the model's fingerprint, for answers."""
        return self.named.name

    async def encode(self, prompts: Sequence[Prompt], *, fits: bool = False) -> list[EncodedPrompt]:
        """Render and encode prompts off the event loop; long ones one at a time, in a thread that no other waits for.

        Args:
            fits: each has to fit into the context, so that one that is far too long is not encoded.

        Raises:
            ContextOverflow: one is too long for the context.
            BadRequest: one is longer than `max_prompt_chars`, or cannot be encoded.
        """
        prompts = [await self._written(prompt, fits) for prompt in prompts]
        return await self._run(self._encoder(prompts), lambda: self._encoded(prompts, fits))

    async def chat_texts(self, prompts: Sequence[ChatPrompt]) -> tuple[str, ...]:
        """Conversations as their template writes them; nothing of their media is decoded.

        Raises:
            BadRequest: one is longer than `max_prompt_chars`, or the template cannot write it.
        """
        prompts = [await self._written(prompt) for prompt in prompts]
        written = await self._run(self._encoder(prompts), lambda: [self._write(prompt) for prompt in prompts])
        return tuple(self.hooks.marks.unmarked(each.text) for each in written)

    def _encoder(self, prompts: Sequence[Prompt]) -> Worker:
        """The thread that encodes these prompts. A loader's own hooks are called by one thread alone."""
        if not is_long(prompts) or self.info.encode is not None or self.info.apply_chat_template is not None:
            return self._codec
        if self._long_codec is None:
            self._long_codec = Worker(f"long-codec-{self.entry.id}")
        return self._long_codec

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return await self._off_loop(lambda: self.hooks.decode(token_ids, skip_special_tokens=False))

    async def tokenizer_card(self) -> dict[str, Any]:
        """What a client needs to know of the tokenizer, as JSON values."""
        if self._card is None:
            self._card = await self._off_loop(lambda: tokenizer_card(self.info, self.hooks.template))
        return self._card

    async def spell(self, token_ids: Sequence[int]) -> tuple[str, ...]:
        """Tokens as the vocabulary spells them; without a tokenizer, as each is decoded alone."""
        convert = getattr(self.info.tokenizer, "convert_ids_to_tokens", None)
        if convert is None:
            return tuple([await self.decode([token_id]) for token_id in token_ids])
        spelled = await self._off_loop(lambda: convert(list(token_ids)))
        return tuple("" if token is None else str(token) for token in spelled)

    async def pieces(self, token_ids: Sequence[int]) -> tuple[TokenPiece, ...]:
        """What each token adds to a text, special tokens included."""
        return await self._off_loop(lambda: self._pieces(token_ids))

    def _pieces(self, token_ids: Sequence[int]) -> tuple[TokenPiece, ...]:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.hooks)
        lookup = self._vocabulary
        return tuple(TokenPiece(lookup.token_text(i), lookup.token_bytes(i)) for i in token_ids)

    async def embed(self, prompts: Sequence[Prompt], options: EmbedOptions) -> Embeddings:
        """A vector for each prompt; computed in batches beside the engine, in a thread of its own.

        Raises:
            TroupeError: a prompt cannot be embedded, or the model gives no embeddings.
        """
        self._refuse_speech()
        if self.entry.adapter is not None and self.info.embed is not None:
            raise UnsupportedParameter(
                f"Adapter {self.entry.id!r} gives no embeddings: the embed hook of its base may use another model."
            )
        prompts = [await self._written(prompt) for prompt in prompts]
        encoder = self._encoder(prompts)
        texts = await self._run(encoder, lambda: [self._texts.encoded(prompt, options) for prompt in prompts])
        for text in texts:
            check_ids(self.info.model, text, options.param)
        vectors: dict[int, bytes] = {}
        for batch in await self._run(self._embedding, lambda: self._embedder.batches(texts)):
            found = await self._compute(partial(self._embedder.vectors, [texts[i] for i in batch], options))
            vectors.update((i, vector.numpy().astype("<f4").tobytes()) for i, vector in zip(batch, found, strict=True))
        return Embeddings(
            vectors=tuple(vectors[i] for i in range(len(texts))),
            prompt_tokens=sum(len(text.ids) for text in texts),
            fingerprint=self.fingerprint,
        )

    def transcribe(self, call: TranscribeCall, *, interval: Interval) -> AsyncGenerator[Event, None]:
        """The events of a transcription.

        Raises:
            UnsupportedParameter: the model is not a Whisper model, or its engine cannot honor a parameter.
        """
        if self.speech is None:
            raise UnsupportedParameter(
                f"Model {self.entry.id!r} does not transcribe audio; this route needs a Whisper model.",
                param="model",
                code="audio_unsupported",
            )
        check_supported(call.sampling, self.engine.supports)
        return Transcriber(
            call,
            self.speech,
            self.engine,
            aligner=self._aligner,
            encode=self._off_loop,
            align=self._compute,
            terminators=terminator_ids(self.hooks),
            interval=interval,
            device=self.info.model.device,
        ).events()

    def check_text(self) -> None:
        """Refuse text for a model that only hears, or only gives embeddings.

        Raises:
            UnsupportedParameter: it names the model's kind.
        """
        self._refuse_speech()
        if isinstance(self.engine, NoTextEngine):
            raise self.engine.refusal(self.entry.id)

    def _refuse_speech(self) -> None:
        if self.speech is not None:
            raise UnsupportedParameter(
                f"Model {self.entry.id!r} turns recordings into text: send it a file at /v1/audio/transcriptions or "
                "/v1/audio/translations.",
                param="model",
                code="text_unsupported",
            )

    def check(self) -> None:
        """Raise TroupeError if the engine has died, or the GPU computes nothing more in this process."""
        self.engine.check()
        self._embedder.check()

    def close(self) -> None:
        """End the engine and run the loader's `close`. Blocks."""
        self.stop()
        if self.info.close is not None:
            self.info.close()

    def stop(self) -> bool:
        """End the engine and the threads; False if the engine still computes. Blocks."""
        self.engine.close(CLOSE_LIMIT_S)
        self._codec.stop()
        if self._long_codec is not None:
            self._long_codec.stop()
        self._embedding.stop()
        self.submitting.stop()
        return not isinstance(self.engine, ThreadedEngine) or self.engine.ended

    def use_text_side(self, hooks: Hooks) -> None:
        """Read and write texts with other hooks, over the same vocabulary."""
        self.hooks, self.info, self._card, self._vocabulary = hooks, hooks.info, None, None
        self._texts = EmbeddingTexts(
            hooks.info, self._encode_plainly, format_of(hooks.info), limit=self.engine.max_model_len
        )

    async def _compute(self, function: Callable[[], T]) -> T:
        """What a function computes with the model beside its engine."""

        def compute() -> T:
            with self.computing():
                return function()

        return await self._run(self._embedding, compute)

    async def _off_loop(self, function: Callable[[], T]) -> T:
        return await self._run(self._codec, function)

    async def _run(self, worker: Worker, function: Callable[[], T]) -> T:
        try:
            return await worker.run(function, self.entry.hook_timeout_s)
        except TimeoutError as error:
            raise ModelError(
                f"A hook of model {self.entry.id!r} has not returned for {self.entry.hook_timeout_s:g} s (at {error})."
            ) from None

    def _encoded(self, prompts: Sequence[Prompt], fits: bool = False) -> list[EncodedPrompt]:
        """The prompts of one request, whose media are counted together and decoded once."""
        ready = [self._write(prompt, fits) if isinstance(prompt, ChatPrompt) else prompt for prompt in prompts]
        media = RequestMedia(
            self._media, rate=self.hooks.audio_rate, max_samples=self.hooks.audio_samples, label=self.entry.id
        )
        for prompt in ready:
            if isinstance(prompt, WrittenChat):
                media.add(prompt.shown.images, prompt.shown.recordings)
        media.open()
        return [self._encode(prompt, media, fits) for prompt in ready]

    def _encode(self, prompt: Written, media: RequestMedia, fits: bool) -> EncodedPrompt:
        match prompt:
            case TokensPrompt():
                return EncodedPrompt(text=None, encoded=Encoded(input_ids=list(prompt.token_ids)))
            case TextPrompt():
                return self._encode_text(prompt, fits)
            case WrittenChat():
                return self._encode_chat(prompt, media)

    async def _written(self, prompt: P, fits: bool = False) -> P | WrittenChat:
        """A conversation that brings its own template is rendered while others are encoded, in another process."""
        if not isinstance(prompt, ChatPrompt) or not self.hooks.template.is_foreign(prompt.chat_template):
            return prompt
        shown = await self._off_loop(lambda: self._shown(prompt, fits))
        text = await self._templates.render(self.info, shown.chat)
        return WrittenChat(messages=prompt.messages, shown=shown, text=text)

    def _write(self, prompt: ChatPrompt, fits: bool = False) -> WrittenChat:
        """A conversation with the text that its template writes, if nobody has written it yet."""
        if not isinstance(prompt, WrittenChat):
            shown = self._shown(prompt, fits)
            prompt = WrittenChat(messages=prompt.messages, shown=shown, text=self.hooks.render(shown.chat))
        self._limits.check(prompt.text, "messages", fits=fits)
        self.hooks.marks.check_places(prompt.text, prompt.shown.chat)
        return prompt

    def _encode_plainly(self, prompt: Prompt) -> tuple[str | None, Encoded]:
        (found,) = self._encoded([prompt])
        return found.text, found.encoded

    def _encode_text(self, prompt: TextPrompt, fits: bool) -> EncodedPrompt:
        self._limits.check(prompt.text, "prompt", fits=fits)

        def encode(text: str, marked: bool) -> Encoded:
            return self.hooks.encode(text, add_special_tokens=prompt.add_special_tokens, marked=marked)

        if not self.hooks.marks.are_in(prompt.text):
            return EncodedPrompt(text=prompt.text, encoded=encode(prompt.text, False))
        marked = self.hooks.marks.marked(prompt.text)
        text, encoded = self.hooks.marks.encode(marked, "prompt", encode)
        return EncodedPrompt(text=text, encoded=encoded)

    def _encode_chat(self, chat: WrittenChat, media: RequestMedia) -> EncodedPrompt:
        shown, text = chat.shown, chat.text
        images = [media.image(source) for source in shown.images]
        sounds = [media.recording(source) for source in shown.recordings]

        def encode(text: str, marked: bool) -> Encoded:
            return self.hooks.encode(text, images=images, audio=sounds, marked=marked)

        if shown.marked is None:
            return EncodedPrompt(text=text, encoded=encode(text, False))
        text, encoded = self.hooks.marks.encode(text, shown.marked, encode, media=bool(images or sounds))
        return EncodedPrompt(text=text, encoded=encoded)

    def _shown(self, prompt: ChatPrompt, fits: bool = False) -> ShownChat:
        """A conversation as its template is to see it, and the media that stand aside."""
        self._limits.check_chat(prompt, fits=fits)
        chat, sources = split_media(prompt, READERS)
        images, recordings = sources["image"], sources["audio"]
        if images:
            self.hooks.check_images(images[0].param)
        if recordings:
            self.hooks.check_audio(recordings[0].param)
        place = self.hooks.marks.find(chat)
        chat = chat if place is None else self.hooks.marks.marked_chat(chat)
        return ShownChat(chat=chat, images=images, recordings=recordings, marked=place)
