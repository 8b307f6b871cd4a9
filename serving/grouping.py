"""Requests on their way to another replica, several in one call: a call costs more than what it carries.

In: requests, one by one. Out: their results, one by one. A lone request leaves at once. While `max_calls` calls are
under way, what comes gathers and leaves together as soon as one of them is back, so calls grow with load as
batches do. It knows nothing of Ray and of what it carries.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


class Grouping(Generic[A, B]):
    """Sends requests in groups. Use it within one event loop.

    Args:
        send: carries a group and returns a result per request, in order.
        max_calls: under way at once.
        max_group: requests of one call, at most.
    """

    def __init__(self, send: Callable[[list[A]], Awaitable[Sequence[B]]], max_calls: int, max_group: int) -> None:
        self._send = send
        self._max_calls = max_calls
        self._max_group = max_group
        self._gathered: deque[tuple[A, asyncio.Future[B]]] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    async def ask(self, request: A) -> B:
        """Send a request and return its result; an error of the call is raised to all whom it carried."""
        future: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._gathered.append((request, future))
        self._leave()
        return await future

    def _leave(self) -> None:
        while self._gathered and len(self._calls) < self._max_calls:
            group = [self._gathered.popleft() for _ in range(min(self._max_group, len(self._gathered)))]
            task = asyncio.create_task(self._carry(group))
            self._calls.add(task)
            task.add_done_callback(self._back)

    async def _carry(self, group: list[tuple[A, "asyncio.Future[B]"]]) -> None:
        waiting = [future for _, future in group]
        try:
            results = await self._send([request for request, _ in group])
            found: list[B | Exception] = list(results)
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait for the call must hear of it
            found = [error] * len(group)
        for future, result in zip(waiting, found, strict=True):
            # Who stopped waiting has a cancelled future.
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)

    def _back(self, task: "asyncio.Task[None]") -> None:
        self._calls.discard(task)
        self._leave()
