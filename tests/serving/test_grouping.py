"""Requests that share a call: a lone one leaves at once, what comes meanwhile leaves together."""

import asyncio

import pytest

from serving.grouping import CallGrouping


class Carrier:
    """Carries groups of numbers, and holds each call until it is let go."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gates: list[asyncio.Event] = []

    async def send(self, group: list[int]) -> list[int]:
        gate = asyncio.Event()
        self.groups.append(group)
        self.gates.append(gate)
        await gate.wait()
        if 13 in group:
            raise ConnectionError("the call was lost")
        return [number * number for number in group]

    async def let_all_go(self) -> None:
        for gate in self.gates:
            gate.set()
        await asyncio.sleep(0.01)


def test_requests_during_running_calls_share_the_next_call_in_order() -> None:
    async def play() -> None:
        carrier = Carrier()
        grouping = CallGrouping(carrier.send, max_calls=2, max_group=4)
        asked = [asyncio.create_task(grouping.submit(number)) for number in range(12)]
        await asyncio.sleep(0.01)
        assert carrier.groups == [[0], [1]]
        await carrier.let_all_go()
        assert carrier.groups[2:] == [[2, 3, 4, 5], [6, 7, 8, 9]]
        await carrier.let_all_go()
        assert carrier.groups[4:] == [[10, 11]]
        await carrier.let_all_go()
        assert await asyncio.gather(*asked) == [number * number for number in range(12)]

    asyncio.run(play())


def test_a_failed_call_is_an_error_of_its_own_requests_only() -> None:
    async def play() -> None:
        carrier = Carrier()
        grouping = CallGrouping(carrier.send, max_calls=1, max_group=2)
        asked = [asyncio.create_task(grouping.submit(number)) for number in (5, 13, 6, 7)]
        for _ in range(4):
            await asyncio.sleep(0.01)
            await carrier.let_all_go()
        assert carrier.groups == [[5], [13, 6], [7]]
        assert [await asked[0], await asked[3]] == [25, 49]
        for lost in asked[1:3]:
            with pytest.raises(ConnectionError, match="the call was lost"):
                await lost

    asyncio.run(play())


def test_a_cancelled_request_does_not_affect_the_others() -> None:
    async def play() -> None:
        carrier = Carrier()
        grouping = CallGrouping(carrier.send, max_calls=1, max_group=8)
        asked = [asyncio.create_task(grouping.submit(number)) for number in range(3)]
        await asyncio.sleep(0.01)
        asked[1].cancel()
        for _ in range(3):
            await carrier.let_all_go()
        assert [await asked[0], await asked[2]] == [0, 4]
        assert asked[1].cancelled()

    asyncio.run(play())
