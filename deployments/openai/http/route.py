"""What a route is: where, what comes in, what goes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.openai.fields.fields import RequestBody
from deployments.openai.http.exchange import Handler


def methods(method: str) -> list[str]:
    """The methods that a route answers: HEAD wherever it answers GET (RFC 9110, 9.3.2)."""
    return ["GET", "HEAD"] if method == "GET" else [method]


@dataclass(frozen=True, slots=True)
class Route:
    """A path and what answers there; it is served as it is, under /v1, and under a model's own path.

    Attributes:
        verb: GET, POST, or FORM for a POST of a form with a file, not of JSON.
        tag: the family, for the page at /docs.
        body: the schema of the request's JSON.
        answer: the type of the response's JSON; str for a text.
        event: the type of a stream's events.
        query: names of query parameters.
        scoped: also served under /models/{id}.
    """

    verb: str
    path: str
    tag: str
    handler: Handler
    body: type[RequestBody] | None
    answer: Any
    event: Any = None
    query: tuple[str, ...] = ()
    scoped: bool = True

    @property
    def form(self) -> bool:
        return self.verb == "FORM"

    @property
    def method(self) -> str:
        return "POST" if self.form else self.verb

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").partition("\n")[0]
