"""One request and its answer: who asks, for which model, and what the response's headers will say."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast
from urllib.parse import quote
from uuid import uuid4

from fastapi import Request, Response

from deployments.config.api import ApiOptions
from deployments.core.calls import LARGE, MANY_TOKENS, Call, Turn
from deployments.core.client import ModelClient
from deployments.core.collector import large_request
from deployments.core.errors import BadRequest, TroupeError, Unavailable, UnsupportedParameter
from deployments.core.events import Accepted, Delta, Event, Failed, Finished
from deployments.core.fingerprint import EXPECT_HEADER, expected_weights
from deployments.core.model_card import ModelCard
from deployments.core.one_version import OneVersion
from deployments.openai.fields.fields import Body, TurnFields, parse_fields
from deployments.openai.fields.inside import NEVER_LEFT_OUT, check_variant
from deployments.openai.fields.other_servers import Settled
from deployments.openai.fields.sampling import GenerationBody
from deployments.openai.http.api import Api
from deployments.openai.http.body import LARGE_BYTES, aside, forget, parse_object, read_body
from deployments.openai.http.form import read_form
from deployments.openai.record.answered import RESUME_HEADER, RESUMED_HEADER, resumes

logger = logging.getLogger(__name__)

T = TypeVar("T")

SAMPLING_HEADER = "x-troupe-sampling"
IGNORED_HEADER = "x-troupe-ignored"
FINGERPRINT_HEADER = "x-troupe-fingerprint"
_CLIENT = 256
# Keys that were logged as unknown: one line each, however many requests have them.
_LOGGED: set[str] = set()
_LOGGED_MOST = 1000


@dataclass(slots=True)
class Exchange:
    """A request being answered.

    Attributes:
        request_id: as the client sees it in `x-request-id`.
        headers: further headers of the response.
        given: the request's JSON body.
        form: the fields of its form, with the file.
        size: of the body in bytes.
        many_tokens: its answer has so many that it is large.
        answer_id: the id in the answer's body; empty if it has none.
        settled: its keys, translated to fields.
        owner: digest of the API key, which captures belong to.
        turn: when its calls begin, if they have to wait.
        rename: lets an error about messages name what they were made of.
    """

    api: Api
    request: Request
    request_id: str
    headers: dict[str, str] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    form: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    many_tokens: bool = False
    answer_id: str = ""
    settled: Settled = field(default_factory=Settled)
    turn: Turn = field(default_factory=Turn)
    rename: Callable[[TroupeError], None] | None = None
    client: OneVersion = field(init=False)
    owner: str = field(init=False)
    _ignored: list[str] = field(default_factory=list)
    _defaults: set[str] = field(default_factory=set)
    _yielded: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.client = OneVersion(self.api.client)
        self.owner = self.request.scope["state"]["owner"]

    @property
    def models(self) -> ModelClient:
        """The models, for what is asked of them beside one request's answer."""
        return self.api.client

    @property
    def fingerprint(self) -> str:
        """Of the model that answers; known with its first event."""
        return self.client.fingerprint

    @property
    def options(self) -> ApiOptions:
        return self.api.options

    async def read(self, schema: type[Body]) -> tuple[Body, ModelCard]:
        """The request's fields and the model they are for; unknown keys go into a header.

        Raises:
            TroupeError: the body cannot be read, or a field or the model is unknown.
        """
        # Read already if the route begins again without a default.
        raw = bytearray() if self.given else await self.receive()

        def read() -> tuple[Body, ModelCard]:
            self.given = self.given or self._parse(raw)
            return self._accept(schema, self.given)

        return await self.aside(read)

    async def read_object(self) -> dict[str, Any]:
        """The request's JSON object as it is."""
        raw = await self.receive()
        self.given = await self.aside(lambda: self._parse(raw))
        return self.given

    async def receive(self) -> bytearray:
        """The request's body."""
        raw = await read_body(self.request, self.options)
        self.size = len(raw)
        LARGE.set(self.large)
        if self.large:
            self._at_end.enter_context(large_request())
        return raw

    @property
    def _at_end(self) -> ExitStack:
        """What is done when the answer is sent."""
        return cast(ExitStack, self.request.scope["state"]["at_end"])

    def _parse(self, raw: bytearray) -> dict[str, Any]:
        given = parse_object(raw)
        if self.large:
            self._at_end.callback(forget, [given])
        return given

    def keep(self, *values: Sequence[Any]) -> None:
        """Let JSON values that were made of a large request live until its answer is sent. They go in a thread then."""
        if self.large:
            self._at_end.callback(forget, list(values))

    @property
    def large(self) -> bool:
        """Whether work on all of the request, or of its answer, is too much for the event loop."""
        return self.size > LARGE_BYTES or self.many_tokens

    async def aside(self, function: Callable[[], T], *, weight: int = 1) -> T:
        """The result of what takes longer the larger the request is: off the event loop if it is large.

        Args:
            weight: how much longer than reading as many bytes.
        """
        return await aside(weight * self.size, function)

    async def read_form(self, schema: type[Body], lists: frozenset[str]) -> tuple[Body, ModelCard]:
        """The same of a form with a file.

        Args:
            lists: the fields that are lists.

        Raises:
            TroupeError: the form cannot be read, or a field or the model is unknown.
        """
        if not self.form:  # Read already if the route begins again.
            self.form = await read_form(self.request, self.options, lists)
        given = self.form
        self.given = {key: value for key, value in given.items() if not isinstance(value, bytes)}
        return self._accept(schema, given)

    def _accept(self, schema: type[Body], given: dict[str, Any]) -> tuple[Body, ModelCard]:
        card = self.find_model(given.get("model"))
        body, unknown = parse_fields(schema, given, self.defaults(card))
        self.settled = body.settled
        body.model = body.model or card.variant or card.id
        if isinstance(body, TurnFields):
            self.take_turn(body.priority, body.user)
        self.ignore(unknown)
        if issubclass(schema, GenerationBody):
            self._defaults = set(self.defaults(card)) - self.settled.fields.keys() - NEVER_LEFT_OUT
        check_variant(schema, card)
        return body, card

    def defaults(self, card: ModelCard) -> dict[str, Any]:
        """The model's values for fields that the request leaves out, except those that do not go with it."""
        return {key: value for key, value in card.options.default_params.items() if key not in self._yielded}

    def without_default(self, error: TroupeError) -> bool:
        """Whether an error is about a default of the model; the route may begin again without this default."""
        if (name := re.split(r"[.\[]", error.param or "")[0]) not in self._defaults:
            return False
        self._defaults.remove(name)
        self._yielded.add(name)
        self._ignored.clear()
        return True

    def ignore(self, unknown: Sequence[str]) -> None:
        """List keys that nobody reads in a header, and each one once in the log.

        Raises:
            UnsupportedParameter: the server is strict about parameters.
        """
        if unknown and self.options.strict_parameters:
            raise UnsupportedParameter(
                f"Unknown field {unknown[0][:100]!r}; remove it (this server is strict about parameters).",
                param=unknown[0][:100],
                code="unknown_parameter",
            )
        self._ignored += [key[:100] for key in unknown if key[:100] not in self._ignored]
        if self._ignored:
            self.headers[IGNORED_HEADER] = ",".join(quote(key, safe="[]") for key in self._ignored[:50])
        for key in self._ignored:
            if key not in _LOGGED and len(_LOGGED) < _LOGGED_MOST:
                _LOGGED.add(key)
                logger.warning("The request field %r is unknown and has no effect (request %s)", key, self.request_id)

    def find_model(self, name: object) -> ModelCard:
        """The model of the path, else of the body, else the default one."""
        scoped = self.request.path_params.get("model_id")
        if scoped is not None:
            return self.models.resolve(scoped)
        if name is not None and not isinstance(name, str):
            raise BadRequest(f"Invalid 'model': input should be a string; got {type(name).__name__}.", param="model")
        if name:
            return self.models.resolve(name)
        if self.options.default_model is not None:
            return self.models.resolve(self.options.default_model)
        cards = [card for card in self.models.models() if card.configured and card.parent is None]
        if len(cards) == 1:
            return cards[0]
        raise BadRequest(
            f"Missing required field 'model'; this server has {', '.join(card.id for card in cards[:20])}.",
            param="model",
            code="missing_required_parameter",
        )

    def read_headers(self) -> None:
        """Read from the headers which weights are to answer, and whether the record may.

        Raises:
            BadRequest: a header cannot be read.
        """
        self._resumes()
        asked = self.request.headers.get(EXPECT_HEADER)
        if asked is not None:
            self.client = OneVersion(self.api.client, expected_weights(asked))

    def name_call(self, body: GenerationBody) -> str:
        """The id of the call. That of the answer, from which it is made, is the request's own after a prefix.

        The field `request_id` counts if the request has no header `x-request-id`.
        """
        state = self.request.scope["state"]
        if body.request_id is not None and state["request_id_is_new"]:
            self.request_id = state["request_id"] = body.request_id
        self.answer_id = body.answer_prefix + self.request_id.removeprefix("req_")
        # Clients may send one id several times; engines tell requests apart by theirs.
        return f"{self.answer_id}-{uuid4().hex[:8]}"

    def affinity(self, body: GenerationBody) -> str | None:
        """The key by which the client says which requests belong together."""
        return self.request.headers.get("x-session-affinity") or body.prompt_cache_key or body.session_id

    def take_turn(self, priority: int, user: str | None) -> None:
        """Let the calls of this request take turns with those of other clients."""
        client = self.request.headers.get("x-session-affinity") or user or self.owner
        self.turn = Turn(priority=priority, client=client[:_CLIENT])

    async def generate(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call, the last one being `Finished`; recorded if that is wanted.

        Raises:
            TroupeError: the call failed, or ended without saying how.
        """
        self._defaults.clear()  # The request's own fields go with the defaults: it is the model that cannot do this.
        call = replace(call, turn=self.turn)
        state = self.request.scope["state"]  # for the access log
        state["model"] = call.model
        events = self.client.generate(call) if self.api.recorder is None else await self._recorded(call)
        tokens = 0
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Failed):
                    state["error"] = event.error.code
                    raise event.error
                tokens = _tokens(event) + (0 if call.stream else tokens)
                if tokens > MANY_TOKENS:
                    self.many_tokens = True
                if isinstance(event, Finished):
                    state["usage"] = event.usage
                    yield event
                    return
                yield event
        raise Unavailable("The model's replica stopped before the answer was complete; try again.")

    async def _recorded(self, call: Call) -> AsyncGenerator[Event, None]:
        """The events of a call: those of the record if it has them and may answer, else the model's, recorded."""
        recorder = self.api.recorder
        assert recorder is not None
        resume = self._resumes()
        if resume and (found := await recorder.answered.find(call, self.client)) is not None:
            self.headers[RESUMED_HEADER] = found.record
            return found.events()
        named = {"id": self.answer_id, "variant": self.find_model(self.given.get("model")).variant}
        asked = {"request_id": self.request_id, "path": self.request.scope["path"], "request": self.given}
        asked |= {key: name for key, name in named.items() if name}
        return recorder.tap(self.client.generate(call), call, asked, whole=resume)

    def _resumes(self) -> bool:
        """Whether the record may answer.

        Raises:
            BadRequest: the header that says so cannot be followed.
        """
        asked = self.request.headers.get(RESUME_HEADER)
        return resumes(asked, default=self.options.resume, records=self.api.recorder is not None)

    def as_sent(self, error: TroupeError) -> TroupeError:
        """An error that names what the request has sent, and not what was made of it."""
        if self.rename is not None:
            self.rename(error)
        error = self.settled.as_sent(error)
        if error.param != "num_beams" or "num_beams" in self.given or not self.given.get("use_beam_search"):
            return error
        return UnsupportedParameter(
            "This model cannot honor 'use_beam_search': its engine has no beams. Leave it out, or serve the model "
            "with engine.kind generate.",
            param="use_beam_search",
        )


def _tokens(event: Event) -> int:
    """How many token ids an event has."""
    if isinstance(event, Accepted):
        return sum(map(len, event.prompt_token_ids))
    return len(event.token_ids) if isinstance(event, Delta) else 0


Handler = Callable[[Exchange], Awaitable[Response]]
