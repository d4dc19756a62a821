"""Embeddings of encoders and decoders, one by one and in batches."""

from __future__ import annotations

import struct
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize

from tests.openai.conftest import Serve, Server
from tests.openai.embedding_calls import ENGINE, post, refusal, serve_folder, states, vectors
from tests.sentence_models import SIZE, pooling, tokenizer, write
from tests.tiny import bert, byte_tokenizer, llama

FORWARDS: list[int] = []


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory, serve: Serve) -> Server:
    folder = write(
        tmp_path_factory.mktemp("prompted"),
        pooling("mean", include_prompt=False),
        prompts={"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"},
        transformer={"max_seq_length": 24, "do_lower_case": True},
    )
    return serve_folder(serve, folder)


def test_prompts(prompted: Server) -> None:
    begins = len(tokenizer()("find: ").input_ids) - 1
    expected = states("find: abc")[begins:].mean(0)
    assert torch.allclose(vectors(prompted, "abc")[0], expected, atol=1e-5)
    assert torch.allclose(vectors(prompted, "abc", prompt_name="query")[0], expected, atol=1e-5)
    assert torch.allclose(vectors(prompted, "ABC", prompt_name="document")[0], states("abc").mean(0), atol=1e-5)
    ids = tokenizer()("abc").input_ids
    assert torch.allclose(vectors(prompted, [ids])[0], states("abc").mean(0), atol=1e-5)
    error = refusal(prompted, input="abc", prompt_name="passage")
    assert error["param"] == "prompt_name"
    assert "it has document, query" in error["message"]
    assert refusal(prompted, input=[ids], prompt_name="query")["param"] == "prompt_name"


def test_truncation(prompted: Server) -> None:
    text = "abcdefghij klmnopqrst uvwxyz"
    fields = {"prompt_name": "document"}
    assert refusal(prompted, input=text, **fields)["code"] == "context_length_exceeded"
    right = vectors(prompted, text, truncate_prompt_tokens=-1, **fields)[0]
    assert torch.allclose(right, states("abcdefghij klmnopqrst uv").mean(0), atol=1e-5)
    left = vectors(prompted, text, truncate_prompt_tokens=8, truncation_side="left", **fields)[0]
    assert torch.allclose(left, states_of([2, *tokenizer()(text).input_ids[-7:-1], 3]).mean(0), atol=1e-5)
    assert torch.allclose(
        vectors(prompted, "ab", truncate_prompt_tokens=8, **fields)[0], states("ab").mean(0), atol=1e-5
    )
    ids = tokenizer()(text).input_ids
    cut = vectors(prompted, [ids], truncate_prompt_tokens=5)[0]
    assert torch.allclose(cut, states_of(ids[:5]).mean(0), atol=1e-5)
    assert post(prompted, input=text, truncate_prompt_tokens=6, **fields).json()["usage"]["prompt_tokens"] == 6


def states_of(ids: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = bert()(torch.tensor([ids])).last_hidden_state[0]
    return found


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"normalize": True, "use_activation": False}, "use_activation"),
        ({"normalize": "often"}, "normalize"),
        ({"dimensions": SIZE + 1}, "dimensions"),
        ({"encoding_format": "bytes"}, "encoding_format"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"input": None}, "input"),
    ],
)
def test_mistakes_name_the_field(prompted: Server, fields: dict[str, Any], param: str) -> None:
    assert refusal(prompted, **{"input": "abcdefgh", **fields})["param"] == param


def test_an_encoder_gives_embeddings_and_no_text(tmp_path: Path, serve: Serve) -> None:
    bert().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    server = serve_folder(serve, str(tmp_path))
    found = vectors(server, ["abc", "abcd"])
    expected = torch.stack([normalize(states(text).mean(0), dim=0) for text in ("abc", "abcd")])
    assert torch.allclose(found, expected, atol=1e-5)
    chat = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 1}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    for path, body in (
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "stream": True}),
        ("/v1/chat/completions", {**chat, "tools": [tool]}),
        ("/v1/completions", {"prompt": "abc"}),
        ("/v1/completions", {"prompt": [2, 5, 3], "max_tokens": 0, "echo": True, "logprobs": 1}),
        ("/v1/responses", {"input": "abc"}),
        ("/v1/score", {"prompt": "abc", "choices": ["d", "e"]}),
    ):
        answer = post(server, path, **body)
        assert answer.status_code == 400, (path, answer.text)
        assert "'a' is a BertModel" in answer.json()["error"]["message"], path
    assert post(server, "/tokenize", prompt="abc").json()["tokens"] == tokenizer()("abc").input_ids


def counted(model: Any, tokenizer: Any) -> dict[str, Any]:
    """A model whose forwards are counted, by the number of texts in each."""
    inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: FORWARDS.append(len((*args, kwargs.get("input_ids"))[0])), with_kwargs=True
    )
    return {"model": model, "tokenizer": tokenizer}


class Leaky(transformers.BertModel):
    """A model that looks at its padding."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:  # type: ignore[override]
        out = super().forward(input_ids=input_ids, **kwargs)
        out.last_hidden_state = out.last_hidden_state + input_ids.float().mean(1)[:, None, None]
        return out


def tiny(kind: str) -> dict[str, Any]:
    torch.manual_seed(0)
    size = {"vocab_size": 261, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "pad_token_id": 258}
    small = {**size, "intermediate_size": 64, "initializer_range": 0.3, "max_position_embeddings": 300}
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    make: dict[str, Callable[[], Any]] = {
        "llama": llama,
        "dynamic": lambda: llama(rope_parameters=rope),
        "dynamic_base": lambda: llama(rope_parameters=rope, max_position_embeddings=64).model,
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**small)),
        "leaky": lambda: Leaky(transformers.BertConfig(**small)),
        "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**{**small, "pad_token_id": 1})),
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=261, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3)
        ),
        "opt": lambda: transformers.OPTForCausalLM(
            transformers.OPTConfig(
                **{**size, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "max_position_embeddings": 300}
            )
        ),
        "t5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=261, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
        ),
        "big_bird": lambda: transformers.BigBirdModel(transformers.BigBirdConfig(**small)),
    }
    return counted(make[kind]().eval(), byte_tokenizer())


MANY = [f"text number {i} " * (1 + i % 4) for i in range(32)]


@pytest.mark.parametrize("name", ["mean", "last", "cls", "max", "weighted_mean", "mean_sqrt_len", None])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_batch_gives_what_each_text_gives_alone(serve: Serve, kind: str, name: str | None) -> None:
    check_batches(serve, kind, name)


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "opt", "t5"])
def test_batches_of_other_models(serve: Serve, kind: str) -> None:
    check_batches(serve, kind, None)


def check_batches(serve: Serve, kind: str, name: str | None) -> None:
    entry = {"id": kind, "loader": f"{__name__}:tiny", "kwargs": {"kind": kind}, "engine": ENGINE}
    server = serve([{**entry, "api": {"pooling": name}}])
    alone = torch.cat([vectors(server, text) for text in MANY])
    vectors(server, MANY[:2])  # The first batch probes the model.
    FORWARDS.clear()
    together = vectors(server, MANY)
    assert sum(FORWARDS) == 32
    assert len(FORWARDS) <= 4
    assert (together - alone).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_base", "leaky", "big_bird"])
def test_a_model_that_sees_its_neighbors_embeds_one_by_one(serve: Serve, kind: str) -> None:
    server = serve([{"id": kind, "loader": f"{__name__}:tiny", "kwargs": {"kind": kind}, "engine": ENGINE}])
    vectors(server, MANY[:2])
    FORWARDS.clear()
    together = vectors(server, MANY[:8])
    assert FORWARDS == [1] * 8
    assert torch.equal(together, torch.cat([vectors(server, text) for text in MANY[:8]]))


def test_a_short_text_after_a_long_one(serve: Serve) -> None:
    entry = {"id": "a", "loader": f"{__name__}:tiny", "kwargs": {"kind": "dynamic_base"}, "engine": ENGINE}
    server = serve([entry])
    before = vectors(server, "a short text")
    vectors(server, "a long text" * 20)
    assert torch.equal(vectors(server, "a short text"), before)


def test_deterministic_embeds_one_by_one(serve: Serve) -> None:
    engine = {**ENGINE, "deterministic": True}
    server = serve([{"id": "a", "loader": f"{__name__}:tiny", "kwargs": {"kind": "llama"}, "engine": engine}])
    vectors(server, MANY[0])
    FORWARDS.clear()
    vectors(server, MANY[:3])
    assert FORWARDS == [1, 1, 1]


@pytest.fixture(scope="module")
def chatting(serve: Serve) -> Server:
    return serve([{"id": "a", "loader": f"{__name__}:tiny", "kwargs": {"kind": "llama"}, "engine": ENGINE}])


def test_a_conversation(chatting: Server) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
    for opens in (False, True):
        answer = post(chatting, messages=messages, add_generation_prompt=opens, encoding_format="base64").json()
        text = byte_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=opens)
        ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
        with torch.inference_mode():
            state = llama().model(torch.tensor([ids])).last_hidden_state[0, -1]
        packed = b64decode(answer["data"][0]["embedding"])
        found = torch.tensor(struct.unpack(f"<{len(packed) // 4}f", packed))
        assert torch.allclose(found, normalize(state, dim=0), atol=1e-5)
        assert answer["usage"]["prompt_tokens"] == len(ids)


def test_a_conversations_own_fields(chatting: Server) -> None:
    messages = [{"role": "user", "content": "hello"}]
    short = post(chatting, messages=messages, truncate_prompt_tokens=4, truncation_side="left").json()
    assert short["usage"]["prompt_tokens"] == 4
    open_end = post(chatting, messages=messages, continue_final_message=True).json()
    text = byte_tokenizer().apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert open_end["usage"]["prompt_tokens"] == len(byte_tokenizer()(text, add_special_tokens=False).input_ids)
    assert refusal(chatting, messages=messages, add_special_tokens=True)["param"] == "add_special_tokens"
    assert refusal(chatting, messages=messages, prompt_name="x")["param"] == "prompt_name"
    assert refusal(chatting, messages=[{"role": "user", "content": "a" * 900}])["param"] == "messages"


def test_positions_that_begin_after_the_padding_id(serve: Serve) -> None:
    server = serve([{"id": "a", "loader": f"{__name__}:tiny", "kwargs": {"kind": "roberta"}, "engine": ENGINE}])
    assert vectors(server, "a" * 298).shape == (1, 32)
    assert "maximum context length is 298 tokens" in refusal(server, input="a" * 299)["message"]


def clip() -> dict[str, Any]:
    return {"model": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)), "tokenizer": byte_tokenizer()}


CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 32}


def test_a_model_that_reads_no_texts_is_refused_at_load(serve: Serve) -> None:
    answer = post(serve([{"id": "a", "loader": f"{__name__}:clip"}]), input="a")
    assert answer.json()["error"]["code"] == "model_load_failed"
    assert "is a CLIPVisionModel: it has no head for text" in answer.json()["error"]["message"]


def hooked() -> dict[str, Any]:
    return {**tiny("llama"), "embed": lambda texts: torch.ones(len(texts), 2)}


def test_a_hook_gets_its_texts_whole(serve: Serve) -> None:
    server = serve([{"id": "a", "loader": f"{__name__}:hooked", "engine": ENGINE}])
    assert vectors(server, ["a", "b"]).tolist() == [[1.0, 1.0]] * 2
    assert vectors(server, "a", normalize=True).norm().item() == pytest.approx(1)
    assert refusal(server, input="abc", truncate_prompt_tokens=2)["param"] == "truncate_prompt_tokens"
