"""Batches in which one member fails: the culprit gets its error, and the others their results.

    for part in in_parts(rows, write):      # write takes several rows at once
        part.members, part.result           # all of them, halves, or single rows: as few calls as the failures allow
    found = [attempt(draw, item) for item in items]     # a result, or the error of this item
    with ahead(pages) as fetched:           # the next page is fetched while one is processed
        for page in fetched: ...
    with in_flight(batches, send, 2) as sent:   # the next batch is sent before one has arrived
        for batch, result in sent: ...

`UnavailableError` is the exception: if the ledger or a server does not respond, a second attempt does not help either.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from records.errors import UnavailableError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Part(Generic[T, R]):
    """Members that were processed together, with the result, or a single member with its error."""

    members: Sequence[T]
    result: R | Exception


def in_parts(
    members: Sequence[T], act: Callable[[Sequence[T]], R], also: tuple[type[Exception], ...] = ()
) -> list[Part[T, R]]:
    """Process members together; if that fails, their halves, down to single members, which keep their error.

    With one culprit among n members that is at most 2 log2 n further calls, and no member waits for more.

    Args:
        members: in the order in which they are processed.
        act: all or nothing: a call that raises has done nothing.
        also: kinds of UnavailableError that a single member can cause.
    Returns:
        The parts, in order.
    Raises:
        UnavailableError: it was raised by `act` and is not one of `also`.
    """
    try:
        return [Part(members, act(members))] if members else []
    except Exception as error:
        if isinstance(error, UnavailableError) and not isinstance(error, also):
            raise
        if len(members) == 1:
            return [Part(members, error)]
    middle = len(members) // 2
    return [*in_parts(members[:middle], act, also), *in_parts(members[middle:], act, also)]


def each_in_parts(
    members: Sequence[T], act: Callable[[Sequence[T]], Sequence[R]], also: tuple[type[Exception], ...] = ()
) -> list[R | Exception]:
    """Return the result or the error of each member, in order; see `in_parts`. `act` returns one result per member."""
    found: list[R | Exception] = []
    for part in in_parts(members, act, also):
        found.extend([part.result] if isinstance(part.result, Exception) else part.result)
    return found


def attempt(act: Callable[[T], R], member: T) -> R | Exception:
    """Return the result for one member of a loop, or its error: one that fails must not stop the others."""
    try:
        return act(member)
    except Exception as error:  # noqa: BLE001 - the caller reports it
        return error


# Context managers, not generators with a pool inside: one that is left early would be closed by the collector of
# garbage, in any thread, and a thread of the pool cannot wait for itself.
@contextmanager
def ahead(members: Iterable[T]) -> Iterator[Iterator[T]]:
    """Give the members of an iterable, the next of which is always being made, in a thread, meanwhile.

    An error in making a member is raised when that member would be given. The block ends when the thread has.
    """
    source, end = iter(members), object()

    def made(pool: ThreadPoolExecutor) -> Iterator[T]:
        coming = _submit(pool, next, source, end)
        while (member := coming.result()) is not end:
            coming = _submit(pool, next, source, end)
            yield member

    with ThreadPoolExecutor(1) as pool:
        yield made(pool)


@contextmanager
def in_flight(members: Iterable[T], act: Callable[[T], R], most: int) -> Iterator[Iterator[tuple[T, R]]]:
    """Give the members of an iterable with their results, in order, while others are processed in threads.

    Args:
        members: each is taken when there is room for it.
        act: called in a thread.
        most: calls at a time, at least 1.
    Yields:
        An iterator of members and results. An error of a call is raised where its result would be given. The block
        ends when the calls that are under way have.
    """

    def processed(pool: ThreadPoolExecutor) -> Iterator[tuple[T, R]]:
        coming: deque[tuple[T, Future[R]]] = deque()
        for member in members:
            if len(coming) == most:
                first, result = coming.popleft()
                yield first, result.result()
            coming.append((member, _submit(pool, act, member)))
        while coming:
            first, result = coming.popleft()
            yield first, result.result()

    with ThreadPoolExecutor(most) as pool:
        yield processed(pool)


def _submit(pool: ThreadPoolExecutor, act: Callable[..., Any], *members: Any) -> Future[Any]:
    # In the caller's context, which holds its leases: a write in the thread is refused as well once one is lost.
    return pool.submit(copy_context().run, act, *members)
