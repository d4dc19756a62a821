"""What Serve's proxy answers when no application does, as clients of the OpenAI API get it."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Message

from deployments.proxy import middlewares


def answer(response: Response) -> tuple[int, dict[str, str], bytes]:
    """What a client gets if Serve answers so."""
    (middleware,) = middlewares()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    app = middleware.cls(response)
    asyncio.run(app({"type": "http", "method": "GET", "path": "/v1/models", "headers": []}, receive, send))
    start, *rest = sent
    headers = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message.get("body", b"") for message in rest)


@pytest.mark.parametrize("text", ["OpenAIIngress is unavailable because it failed to deploy.", "", "x\ny"])
def test_nobody_to_answer_is_an_error_object(text: str) -> None:
    status, headers, body = answer(PlainTextResponse(text, 503))
    error = json.loads(body)["error"]
    assert (status, headers["content-type"], headers["retry-after"]) == (503, "application/json", "5")
    assert int(headers["content-length"]) == len(body)
    assert error["type"] == "server_error"
    assert error["message"].startswith("The application has no replica that answers: ")
    assert (text.splitlines() or ["no reason is known"])[-1] in error["message"]
    assert "serve status" in error["message"]


def test_an_unknown_path_is_an_error_object() -> None:
    status, _, body = answer(
        PlainTextResponse("Path '/x' not found. Ping http://.../-/routes for available routes.", 404)
    )
    assert status == 404
    assert "No application is served at /v1/models" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(
    "response", [PlainTextResponse("ok"), JSONResponse({"error": 1}, 503), PlainTextResponse("x", 404)]
)
def test_other_answers_stay(response: Response) -> None:
    assert answer(response)[::2] == (response.status_code, response.body)
