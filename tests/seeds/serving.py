"""An application of `deployments.local` on a real socket."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from openai import OpenAI


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The address at which an application answers, without /v1."""
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        bound.close()


def client(address: str) -> OpenAI:
    """The official client, which checks every answer against its types."""
    return OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120, _strict_response_validation=True
    )
