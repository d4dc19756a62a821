"""Who begins first: from the request's fields and headers to the engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch

from deployments.core.calls import Turn
from deployments.local import model_app
from tests.openai import scripted
from tests.openai.asking import CHAT, COMPLETIONS, post, refusal
from tests.openai.conftest import Serve, Server
from tests.seeds.serving import listening
from tests.tiny import byte_tokenizer, llama


def turns(response: requests.Response) -> list[Turn]:
    """Those that have reached the engine for an answer."""
    answer = response.json()["id"]
    return [r.turn for e in scripted.ENGINES for r in e.seen if r.request_id.startswith(f"{answer}-")]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_priority_user_and_session_reach_the_engine(server: Server, path: str) -> None:
    assert turns(post(server, path)) == [Turn()]
    assert turns(post(server, path, priority=-4, user="me")) == [Turn(priority=-4, client="me")]
    body = {"model": "org/scripted", "messages": [{"role": "user", "content": "a"}], "prompt": "a", "user": "me"}
    body.pop("prompt" if path == CHAT else "messages")
    answer = requests.post(server.url + path, json=body, headers={"x-session-affinity": "s1"}, timeout=10)
    assert turns(answer) == [Turn(client="s1")]


def test_up_to_sixteen_choices_are_one_turn(server: Server) -> None:
    found = turns(post(server, COMPLETIONS, n=20, user="me"))
    assert {turn.client for turn in found} == {"me"}
    groups = [turn.group for turn in found]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [16, 4]


def test_keys_are_clients_and_stay_secret(serve: Serve) -> None:
    guarded = serve(api_keys=["first key", "second key"])
    body = {"model": "org/scripted", "prompt": "a"}
    clients = []
    for key in ("first key", "second key", "first key"):
        headers = {"Authorization": f"Bearer {key}"}
        (turn,) = turns(requests.post(guarded.url + COMPLETIONS, json=body, headers=headers, timeout=10))
        clients.append(turn.client)
    assert clients[0] == clients[2] != clients[1]
    assert "key" not in clients[0]


@pytest.mark.parametrize("value", ["high", 1.5, 2**40, True])
def test_a_priority_is_an_integer(server: Server, value: Any) -> None:
    assert refusal(server, CHAT, priority=value)["param"] == "priority"


def test_other_routes_take_it_too(server: Server) -> None:
    for path, body in {
        "/v1/embeddings": {"input": "a"},
        "/v1/score": {"prompt": "a", "choices": ["b"]},
        "/v1/responses": {"input": "a"},
    }.items():
        given = {"model": "org/scripted", "priority": 100, "user": "me", **body}
        response = requests.post(server.url + path, json=given, timeout=10)
        assert response.status_code == 200, response.text
        assert "x-troupe-ignored" not in response.headers
    assert Turn(priority=100, client="me") in [r.turn for e in scripted.ENGINES for r in e.seen]


class Held:
    """A hook that computes one request at a time, the first one until the gate opens.

    Attributes:
        order: what the requests ask, in the order in which they begin.
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.order: list[str] = []
        self.tokenizer = byte_tokenizer()
        self.end = torch.tensor([self.tokenizer("<|im_end|>", add_special_tokens=False).input_ids])

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int) -> torch.Tensor:
        self.order.append(str(self.tokenizer.decode(input_ids[0])).partition("#")[2].partition("#")[0])
        self.gate.wait(30)
        return torch.cat([input_ids, self.end], dim=1)


@pytest.fixture(scope="module")
def held() -> Iterator[tuple[Held, str]]:
    model = Held()
    source = {"model_name": "held", "model": llama(), "tokenizer": model.tokenizer, "generate": model.generate}
    with listening(model_app(source, id="held")) as address:
        yield model, address


def test_what_waits_begins_by_priority_and_in_turn(held: tuple[Held, str]) -> None:
    model, url = held
    model.order.clear()
    model.gate.clear()
    asked = [("first", {}), *((f"a{i}", {"user": "a"}) for i in range(3)), ("b", {"user": "b"})]
    asked += [("low", {"priority": 9, "user": "c"}), ("high", {"priority": -9, "user": "a"})]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers: list[Future[requests.Response]] = []
        for count, (name, fields) in enumerate(asked):
            body = {"prompt": f"#{name}#", "max_tokens": 4, **fields}
            answers.append(pool.submit(requests.post, f"{url}/v1/completions", json=body, timeout=30))
            _wait_for(url, count)
        model.gate.set()
        assert [answer.result().status_code for answer in answers] == [200] * len(asked)
    assert model.order == ["first", "high", "a0", "b", "a1", "a2", "low"]


def _wait_for(url: str, waiting: int) -> None:
    """Until one request runs and `waiting` others wait."""
    while True:
        (replica,) = requests.get(f"{url}/health?verbose=1", timeout=10).json()["data"]
        if [(each["sequences"], each["waiting"]) for each in replica["models"]] == [(1, waiting)]:
            return
        time.sleep(0.005)
