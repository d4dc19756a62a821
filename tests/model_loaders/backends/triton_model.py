"""A model for Triton's Python backend with the tensors of TensorRT-LLM's backend, over a small Llama in numpy.

Run by the Triton server, not by pytest: its process knows neither torch nor this repository. Parameters of
config.pbtxt: `folder` (a Llama as `save_pretrained` writes it, float32), `record` (a file that gets a JSON line per
request), `accumulated` and `delay` (seconds per token).
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb  # type: ignore[import-not-found]
from safetensors.numpy import load_file
from tokenizers import Tokenizer


class Llama:
    """Logits of the last position."""

    def __init__(self, folder: Path) -> None:
        self.config = json.loads((folder / "config.json").read_text())
        self.weights = load_file(str(folder / "model.safetensors"))
        self.size = self.config["hidden_size"] // self.config["num_attention_heads"]

    def logits(self, ids: list[int]) -> Any:
        w, cfg, length = self.weights, self.config, len(ids)
        theta = (cfg.get("rope_parameters") or cfg).get("rope_theta", 10000.0)
        angles = np.arange(length)[:, None] / theta ** (np.arange(0, self.size, 2) / self.size)
        cos, sin = (np.concatenate([f(angles)] * 2, -1).astype(np.float32) for f in (np.cos, np.sin))
        mask = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        x = w["model.embed_tokens.weight"][ids]
        for i in range(cfg["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            h = self.norm(x, layer + "input_layernorm.weight")
            q, k, v = (self.heads(h @ w[f"{layer}self_attn.{name}_proj.weight"].T) for name in "qkv")
            q, k = (each * cos + self.turned(each) * sin for each in (q, k))
            k, v = (np.repeat(each, len(q) // len(each), 0) for each in (k, v))
            scores = q @ k.transpose(0, 2, 1) / np.sqrt(self.size) + mask
            mixed = self.softmax(scores) @ v
            x = x + mixed.transpose(1, 0, 2).reshape(length, -1) @ w[layer + "self_attn.o_proj.weight"].T
            h = self.norm(x, layer + "post_attention_layernorm.weight")
            gate = h @ w[layer + "mlp.gate_proj.weight"].T
            up = h @ w[layer + "mlp.up_proj.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
        head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
        return self.norm(x[-1:], "model.norm.weight")[0] @ head.T

    def norm(self, x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config["rms_norm_eps"]) * self.weights[name]

    def heads(self, x: Any) -> Any:
        return x.reshape(len(x), -1, self.size).transpose(1, 0, 2)

    def turned(self, x: Any) -> Any:
        half = self.size // 2
        return np.concatenate([-x[..., half:], x[..., :half]], -1)

    @staticmethod
    def softmax(x: Any) -> Any:
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


class Request:
    """A request's tensors, whatever names they go by."""

    def __init__(self, raw: Any, names: list[str]) -> None:
        self.raw = raw
        self.given: dict[str, Any] = {}
        for name in names:
            tensor = pb.get_input_tensor_by_name(raw, name)
            if tensor is not None:
                values = tensor.as_numpy()[0]
                self.given[name] = (
                    [each.decode() for each in values.reshape(-1)] if values.dtype == object else values.tolist()
                )

    def one(self, *names: str, default: Any = None) -> Any:
        """The only value of the first of these tensors that is there."""
        found = next((self.given[name] for name in names if name in self.given), None)
        return default if found is None else found[0] if isinstance(found, list) else found


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(given["folder"])
        self.llama = Llama(folder)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.record = Path(given["record"])
        self.accumulated = given.get("accumulated") == "true"
        self.delay = float(given.get("delay", "0"))
        self.names = [each["name"] for each in config["input"]]
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.lock = threading.Lock()

    def execute(self, requests: list[Any]) -> list[Any] | None:
        if not self.decoupled:
            return [self.answer(raw) for raw in requests]
        for raw in requests:
            threading.Thread(target=self.stream, args=(raw, raw.get_response_sender())).start()
        return None

    def stream(self, raw: Any, sender: Any) -> None:
        try:
            self.send(Request(raw, self.names), sender)
        except Exception as error:
            sender.send(pb.InferenceResponse(error=pb.TritonError(repr(error))))
            sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def send(self, request: Request, sender: Any) -> None:
        if (error := self.fault(request)) is not None:
            sender.send(error, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        tokens: list[int] = []
        logprobs: list[float] = []
        if request.one("streaming", "stream"):
            for token, logprob in self.tokens(request):
                tokens, logprobs = [*tokens, token], [*logprobs, logprob]
                whole = tokens if self.accumulated else [token]
                sender.send(self.response(request, whole, logprobs))
        else:
            for token, logprob in self.tokens(request):
                tokens, logprobs = [*tokens, token], [*logprobs, logprob]
            sender.send(self.response(request, tokens, logprobs))
        sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, raw: Any) -> Any:
        request = Request(raw, self.names)
        if (error := self.fault(request)) is not None:
            return error
        found = list(self.tokens(request))
        tokens = [token for token, _ in found]
        if not request.one("exclude_input_in_output", default=False):
            tokens = self.prompt(request) + tokens
        return self.response(request, tokens, [logprob for _, logprob in found])

    def fault(self, request: Request) -> Any:
        prompt = self.prompt(request)
        self.note({"prompt": prompt, **{k: v for k, v in request.given.items() if k != "input_ids"}})
        if len(prompt) > 200:
            text = f"Prompt length ({len(prompt)}) exceeds maximum input length (200). Set log level to info."
            return pb.InferenceResponse(error=pb.TritonError(text))
        if prompt[:3] == [1, 2, 3]:
            return pb.InferenceResponse(error=pb.TritonError("Exceeds maximum queue size"))
        return None

    def note(self, entry: dict[str, Any]) -> None:
        with self.lock, self.record.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def prompt(self, request: Request) -> list[int]:
        text = request.one("text_input")
        return list(request.given["input_ids"]) if text is None else self.tokenizer.encode(text).ids

    def tokens(self, request: Request) -> Any:
        """Token by token, until an end or a cancellation, with the log-probability of each."""
        prompt = self.prompt(request)
        chance = np.random.default_rng(request.one("seed", "random_seed"))
        words = self.words(request.given.get("stop_words_list"))
        texts = request.given.get("stop_words") or []
        bad = [word for word in self.words(request.given.get("bad_words_list")) if len(word) == 1]
        done: list[int] = []
        for step in range(request.one("max_tokens", "request_output_len")):
            if request.raw.is_cancelled():
                self.note({"cancelled": prompt, "after": step})
                return
            logits = self.llama.logits(prompt + done)
            open_logits = logits.copy()
            open_logits[[word[0] for word in bad]] = -np.inf
            if step < request.one("min_tokens", "min_length", default=0):
                open_logits[request.one("end_id")] = -np.inf
            shaped = self.shaped(open_logits, request, prompt, done)
            token = int(chance.choice(len(shaped), p=self.llama.softmax(shaped.astype(np.float64))))
            done.append(token)
            time.sleep(self.delay)
            yield token, float(np.log(self.llama.softmax(logits.astype(np.float64)))[token])
            ended = any(done[-len(word) :] == word for word in words)
            if token == request.one("end_id") or ended or any(each in self.text(done) for each in texts):
                return

    def shaped(self, logits: Any, request: Request, prompt: list[int], done: list[int]) -> Any:
        """The logits to draw from, after penalties, temperature and truncations."""
        penalty = request.one("repetition_penalty", default=1.0)
        for token in {*prompt, *done}:
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        for token in done:
            logits[token] -= request.one("frequency_penalty", default=0.0)
        for token in set(done):
            logits[token] -= request.one("presence_penalty", default=0.0)
        logits = logits / request.one("temperature", default=1.0)
        top_k, top_p = (
            request.one("runtime_top_k", "top_k", default=0),
            request.one("runtime_top_p", "top_p", default=0),
        )
        if top_k == 0 and top_p == 0:
            top_k = 1
        order = np.argsort(-logits, kind="stable")
        if top_k:
            logits[order[top_k:]] = -np.inf
        if 0 < top_p < 1:
            kept = np.cumsum(self.llama.softmax(logits[order])) - self.llama.softmax(logits[order]) < top_p
            logits[order[~kept]] = -np.inf
        return logits

    @staticmethod
    def words(given: Any) -> list[list[int]]:
        if given is None:
            return []
        ids, ends = given
        starts = [0, *[end for end in ends if end >= 0]]
        return [ids[a:b] for a, b in itertools.pairwise(starts)]

    def response(self, request: Request, tokens: list[int], logprobs: list[float]) -> Any:
        """Text where text was given, else ids, of which TensorRT-LLM has one row per beam."""
        if "text_input" in request.given:
            outputs = {"text_output": np.array([self.text(tokens).encode()], dtype=object)}
        else:
            padded = [*tokens, *[request.one("pad_id", default=0)] * 2]
            outputs = {
                "output_ids": np.array([[padded]], dtype=np.int32),
                "sequence_length": np.array([[len(tokens)]], dtype=np.int32),
            }
            if request.one("return_log_probs"):
                outputs["output_log_probs"] = np.array([[logprobs]], dtype=np.float32)
        return pb.InferenceResponse([pb.Tensor(name, array) for name, array in outputs.items()])

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
