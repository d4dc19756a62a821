"""A model's forward with nothing around it, behind the route that lm_eval asks for log-probabilities: what scoring can
cost at least. `python -m deployments.cli.bench.forward FOLDER --port PORT`."""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Scorer:
    """A model and its tokenizer."""

    def __init__(self, name: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        self._tokenizer = AutoTokenizer.from_pretrained(name)
        self._lock = threading.Lock()

    @torch.inference_mode()
    def score(self, prompts: list[str]) -> dict[str, Any]:
        """The answer to a request: one forward over all its prompts, padded on the right."""
        ids = [self._tokenizer(prompt)["input_ids"] for prompt in prompts]
        longest = max(map(len, ids))
        padded = torch.tensor([each + [0] * (longest - len(each)) for each in ids])
        mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids])
        with self._lock:
            logits = self._model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            scores = logits.log_softmax(-1).gather(-1, padded[:, 1:, None])[..., 0]
        choices = [
            {"index": i, "logprobs": {"token_logprobs": [None, *row[: len(each) - 1]]}}
            for i, (each, row) in enumerate(zip(ids, scores.tolist(), strict=True))
        ]
        return {"choices": choices, "usage": {"prompt_tokens": sum(map(len, ids))}}


class Handler(BaseHTTPRequestHandler):
    """Answers `POST …/completions` and `GET …/models`."""

    protocol_version = "HTTP/1.1"
    scorer: Scorer

    def do_GET(self) -> None:
        self._send(200, {"data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/chat/completions"):
            self._send(404, {"error": {"message": "A bare forward does not chat."}})
        else:
            self._send(200, self.scorer.score(body["prompt"]))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def _send(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    given = parser.parse_args()
    Handler.scorer = Scorer(given.model)
    ThreadingHTTPServer(("127.0.0.1", given.port), Handler).serve_forever()
