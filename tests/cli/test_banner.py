"""What is printed when the API answers, and what is logged about keys."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from deployments.app import warn_of_plain_keys
from deployments.args import read_args
from deployments.cli.banner import announce

DEMO = {"id": "it's", "loader": "model_loaders.demo:load_model"}
DIGEST = "sha256:" + "0" * 64


class Healthy(BaseHTTPRequestHandler):
    """Answers every GET with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def app(prefix: str, **api: Any) -> dict[str, Any]:
    args = {"models": [DEMO], "api": api}
    return {"name": prefix, "route_prefix": prefix, "import_path": "deployments.app:build_app", "args": args}


def test_the_banner_has_every_application_and_the_header_of_those_with_keys(
    port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    applications = [app("/open"), {"name": "other", "import_path": "x:y"}, app("/closed", api_keys=[DIGEST])]
    announce({"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}, None)
    _, opened, closed = capsys.readouterr().out.split("Troupe answers at ")
    assert opened.startswith(f"http://127.0.0.1:{port}/open/v1\n")
    assert "Authorization" not in opened
    assert closed.startswith(f"http://127.0.0.1:{port}/closed/v1\n")
    assert '-H "Authorization: Bearer $API_KEY"' in closed
    assert "it'\"'\"'s" in closed  # a shell reads the id as it is


@pytest.mark.parametrize(
    ("api", "warns"),
    [
        ({}, False),
        ({"api_keys": [DIGEST], "admin_keys": [DIGEST]}, False),
        ({"api_keys_file": "keys.txt"}, False),
        ({"api_keys": [DIGEST, "secret"]}, True),
        ({"admin_keys": ["secret"]}, True),
    ],
)
def test_keys_that_ray_has_logged_are_reported(api: dict[str, Any], warns: bool) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ray.serve")
    logger.addHandler(handler)
    try:
        warn_of_plain_keys(read_args({"models": [DEMO], "api": api}))
    finally:
        logger.removeHandler(handler)
    assert [("Write digests" in text, "secret" in text) for text in said] == [(True, False)] * warns
