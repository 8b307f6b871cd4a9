"""Grouping of requests: a single one is sent at once, those that arrive during calls are sent together."""

import asyncio

import pytest

from serving.grouping import CallGrouping


class Squares:
    """Squares groups of numbers, and holds each call until it is released."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gates: list[asyncio.Event] = []

    async def send(self, group: list[int]) -> list[int]:
        gate = asyncio.Event()
        self.groups.append(group)
        self.gates.append(gate)
        await gate.wait()
        if 13 in group:
            raise ConnectionError("the call failed")
        return [number * number for number in group]

    async def release_all(self) -> None:
        for gate in self.gates:
            gate.set()
        await asyncio.sleep(0.01)


def test_requests_during_running_calls_share_the_next_call_in_order() -> None:
    async def run() -> None:
        squares = Squares()
        grouping = CallGrouping(squares.send, max_calls=2, max_group=4)
        submitted = [asyncio.create_task(grouping.submit(number)) for number in range(12)]
        await asyncio.sleep(0.01)
        assert squares.groups == [[0], [1]]
        await squares.release_all()
        assert squares.groups[2:] == [[2, 3, 4, 5], [6, 7, 8, 9]]
        await squares.release_all()
        assert squares.groups[4:] == [[10, 11]]
        await squares.release_all()
        assert await asyncio.gather(*submitted) == [number * number for number in range(12)]

    asyncio.run(run())


def test_a_failed_call_is_an_error_of_its_own_requests_only() -> None:
    async def run() -> None:
        squares = Squares()
        grouping = CallGrouping(squares.send, max_calls=1, max_group=2)
        submitted = [asyncio.create_task(grouping.submit(number)) for number in (5, 13, 6, 7)]
        for _ in range(4):
            await asyncio.sleep(0.01)
            await squares.release_all()
        assert squares.groups == [[5], [13, 6], [7]]
        assert [await submitted[0], await submitted[3]] == [25, 49]
        for failed in submitted[1:3]:
            with pytest.raises(ConnectionError, match="the call failed"):
                await failed

    asyncio.run(run())


def test_a_cancelled_request_does_not_affect_the_others() -> None:
    async def run() -> None:
        squares = Squares()
        grouping = CallGrouping(squares.send, max_calls=1, max_group=8)
        submitted = [asyncio.create_task(grouping.submit(number)) for number in range(3)]
        await asyncio.sleep(0.01)
        submitted[1].cancel()
        for _ in range(3):
            await squares.release_all()
        assert [await submitted[0], await submitted[2]] == [0, 4]
        assert submitted[1].cancelled()

    asyncio.run(run())
