"""Grouping of concurrent requests into calls to another replica, because each call has a high fixed cost.

In: requests, one by one. Out: their results, one by one. A request on an idle service is sent at once. While
`max_calls` calls are running, requests are collected and sent together when a call returns, so the size of calls grows
with load. It depends neither on Ray nor on the type of the requests.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class CallGrouping(Generic[A, B]):
    """Sends requests in groups. It belongs to one event loop.

    Args:
        send: sends a group and returns a result per request, in order.
        max_calls: concurrent calls.
        max_group: requests per call.
    """

    def __init__(self, send: Callable[[list[A]], Awaitable[Sequence[B]]], max_calls: int, max_group: int) -> None:
        self._send = send
        self._max_calls = max_calls
        self._max_group = max_group
        self._waiting: deque[tuple[A, asyncio.Future[B]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def submit(self, request: A) -> B:
        """Send a request and return its result; an error of the call is raised for every request of the call."""
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        self._send_waiting()
        return await future

    def _send_waiting(self) -> None:
        while self._waiting and len(self._calls) < self._max_calls:
            group = [self._waiting.popleft() for _ in range(min(self._max_group, len(self._waiting)))]
            # Kept in a set: asyncio itself holds only weak references to tasks.
            task = asyncio.create_task(self._call(group))
            self._calls.add(task)
            task.add_done_callback(self._returned)

    async def _call(self, group: list[tuple[A, "asyncio.Future[B]"]]) -> None:
        waiting = [future for _, future in group]
        try:
            results = await self._send([request for request, _ in group])
            found: list[B | Exception] = list(results)
        except Exception as error:  # noqa: BLE001 - any error must reach the waiting requests, else they wait forever
            found = [error] * len(group)
        for future, result in zip(waiting, found, strict=True):
            # A request that was cancelled meanwhile has a cancelled future.
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _returned(self, task: "asyncio.Task[None]") -> None:
        self._calls.discard(task)
        self._send_waiting()
