"""A line is sent again while that may help, and no line ends one replica after the other."""

from __future__ import annotations

import asyncio
import json

import pytest

from deployments.batches.client import LineAnswer, LineCall
from deployments.batches.computing import LineSender
from deployments.batches.lines import LineRefused, read_line


def call(name: str) -> LineCall:
    return LineCall(url="/v1/completions", body={"prompt": name}, owner="", request_id=name)


class Replica:
    """Computes lines for a while, and is lost with all of them when it gets one of `poisonous`."""

    def __init__(self, *poisonous: str) -> None:
        self._poisonous = poisonous
        self._running: dict[str, asyncio.Future[bool]] = {}
        self.beside: list[set[str]] = []
        """For each loss, the lines that were lost."""

    async def __call__(self, call: LineCall) -> LineAnswer:
        name = call.body["prompt"]
        lost = self._running[name] = asyncio.get_running_loop().create_future()
        if name in self._poisonous:
            await asyncio.sleep(0.01)
            self.beside.append(set(self._running))
            for each in self._running.values():
                if not each.done():
                    each.set_result(True)
        done, _ = await asyncio.wait([lost], timeout=0.02)
        del self._running[name]
        if done:
            return LineAnswer(status=503, body=b'{"error": {"code": "unavailable"}}', retry_after=0, replica_lost=True)
        return LineAnswer(status=200, body=b"{}")


def test_a_line_that_ends_replicas_is_given_up_and_no_line_beside_it() -> None:
    async def main() -> None:
        names, replica = [f"{i}" for i in range(12)], Replica("3", "4", "9")
        sender, room = LineSender(replica), asyncio.Semaphore(5)

        async def sent(name: str) -> LineAnswer:
            async with room:
                return await sender.answer(call(name))

        answers = dict(zip(names, await asyncio.gather(*map(sent, names)), strict=True))
        assert {name for name, answer in answers.items() if answer.status != 200} == {"3", "4", "9"}
        assert "lost twice" in answers["3"].error["message"]
        assert [each for each in replica.beside if len(each) == 1] == [{"3"}, {"4"}, {"9"}]
        assert len(replica.beside) in (5, 6)  # 3 and 4 may be lost together at first

    asyncio.run(main())


def test_a_line_that_is_cancelled_while_it_waits_keeps_nobody_waiting() -> None:
    async def main() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def compute(call: LineCall) -> LineAnswer:
            if call.request_id == "lost":
                return LineAnswer(status=503, body=b"", retry_after=0, replica_lost=True)
            entered.set()
            await leave.wait()
            return LineAnswer(status=200, body=json.dumps({}).encode())

        sender = LineSender(compute)
        long = asyncio.create_task(sender.answer(call("long")))
        await entered.wait()
        suspected = asyncio.create_task(sender.answer(call("lost")))
        await asyncio.sleep(0.05)
        suspected.cancel()
        leave.set()
        assert (await long).status == 200
        assert (await asyncio.wait_for(sender.answer(call("next")), 5)).status == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "valid JSON: Expecting property name enclosed in double quotes"),
        (b'{"custom_id": "\xe9"}', "valid JSON: it is not UTF-8"),
        (b"[" * 100_000, "valid JSON: it is nested too deeply"),
    ],
)
def test_a_line_that_is_not_json_says_why(line: bytes, said: str) -> None:
    with pytest.raises(LineRefused, match=said):
        read_line(line, None)
