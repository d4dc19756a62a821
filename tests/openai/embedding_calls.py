"""Requests for embeddings, and the hidden states that the answers are made of."""

from __future__ import annotations

from typing import Any

import requests
import torch
from torch import Tensor

from tests.openai.conftest import Serve, Server
from tests.sentence_models import SIZE, tokenizer
from tests.tiny import bert

TEXTS = ["abc", "hello world", "a somewhat longer text of a few words", "z", "the quick brown fox", "ab ab ab"]
DENSE = ("Dense", {"in_features": SIZE, "out_features": 8, "bias": True})


ENGINE = {"pack_linears": False, "threads": 1}


def states(text: str, model: Any = None) -> Tensor:
    """The last hidden states [tokens, SIZE] of a text by itself."""
    with torch.inference_mode():
        found: Tensor = (model or bert())(**tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
    return found


def serve_folder(serve: Serve, folder: str, **api: Any) -> Server:
    entry = {"id": "a", "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": folder}, "engine": ENGINE}
    return serve([{**entry, "api": api}])


def post(server: Server, path: str = "/v1/embeddings", **body: Any) -> requests.Response:
    return requests.post(server.url + path, json=body, timeout=60)


def vectors(server: Server, given: Any, **fields: Any) -> Tensor:
    answer = post(server, input=given, **fields)
    assert answer.status_code == 200, answer.text
    return torch.tensor([item["embedding"] for item in answer.json()["data"]])


def refusal(server: Server, **body: Any) -> dict[str, Any]:
    answer = post(server, **body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error
