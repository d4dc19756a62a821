"""What is printed when the API answers, and what is logged about keys."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.app import warn_of_plain_keys
from deployments.args import read_args
from deployments.cli.banner import banner

DEMO = {"id": "it's", "loader": "model_loaders.demo:load_model"}
DIGEST = "sha256:" + "0" * 64
KEYS = {"api_keys": [DIGEST]}


class Healthy(BaseHTTPRequestHandler):
    """Answers every GET with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def listening(host: str) -> Iterator[int]:
    with ThreadingHTTPServer((host, 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def port() -> Iterator[int]:
    with listening("127.0.0.1") as port:
        yield port


def app(prefix: str, **api: Any) -> dict[str, Any]:
    args = {"models": [DEMO], "api": api}
    return {"name": prefix, "route_prefix": prefix, "import_path": "deployments.app:build_app", "args": args}


def test_the_banner_has_every_application(port: int, tmp_path: Path) -> None:
    applications = [app("/open"), {"name": "other", "import_path": "x:y"}, app("/closed", api_keys=[DIGEST])]
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": applications}
    assert banner(config, tmp_path) == [
        f"Troupe answers at http://127.0.0.1:{port}/open/v1, its page is http://127.0.0.1:{port}/open/",
        "  models:    it's",
        f"Troupe answers at http://127.0.0.1:{port}/closed/v1, its page is http://127.0.0.1:{port}/closed/",
        "  models:    it's",
        f"  logs:      {tmp_path}",
        f"  stop:      Ctrl-C, or kill {os.getpid()}",
    ]


def test_the_banner_has_every_name_and_what_can_join(port: int, tmp_path: Path) -> None:
    steered = {**DEMO, "aliases": ["other"], "variants": {"kind": {"temperature": 0}}}
    args = {"models": [steered], "folders": [{"glob": "runs/*", "like": "it's"}]}
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [{**app("/"), "args": args}]}
    assert banner(config, tmp_path)[1:3] == ["  models:    it's (also other, kind)", "  later:     what matches runs/*"]


@pytest.mark.parametrize(
    ("api", "line"), [({}, "  WARNING: listens on 0.0.0.0 and does not"), (KEYS, "  network:   listens")]
)
def test_the_banner_says_who_else_can_reach_it(api: dict[str, Any], line: str, tmp_path: Path) -> None:
    with listening("0.0.0.0") as port:
        config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app("/", **api)]}
        assert banner(config, tmp_path)[-1].startswith(line)


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
