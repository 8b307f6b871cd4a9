"""Batches of which some members fail: the others go on, in few calls."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records.errors import LabelStudioError, LabelStudioRefusedError, RefusedError, UnavailableError
from records.lease import hold
from records.parts import ahead, attempt, each_in_parts, in_flight, in_parts
from records.store import Store
from records.types import Cursor, Lease

T = TypeVar("T")


@given(st.lists(st.booleans(), max_size=40))
def test_each_culprit_and_no_other_member_fails(is_culprit: list[bool]) -> None:
    calls = 0

    def act(some: Sequence[int]) -> list[int]:
        nonlocal calls
        calls += 1
        for number in some:
            if is_culprit[number]:
                raise ValueError(str(number))
        return [10 * number for number in some]

    members = range(len(is_culprit))
    found = each_in_parts(members, act)
    for number, result in zip(members, found, strict=True):
        if is_culprit[number]:
            assert isinstance(result, ValueError)
            assert str(result) == str(number)
        else:
            assert result == 10 * number
    culprits = sum(is_culprit)
    assert calls <= 1 + 2 * culprits * math.ceil(math.log2(max(2, len(is_culprit))))


def test_members_that_succeed_together_stay_together() -> None:
    def act(some: Sequence[str]) -> str:
        return "".join(some) if "x" not in some else str(int("x"))

    parts = in_parts("abcdefx", act)
    assert [part.result for part in parts if isinstance(part.result, str)] == ["abc", "de", "f"]
    assert [part.members for part in parts if isinstance(part.result, ValueError)] == ["x"]


def test_what_does_not_respond_is_not_tried_again() -> None:
    calls = []

    def act(some: Sequence[int]) -> int:
        calls.append(some)
        raise LabelStudioError("down")

    with pytest.raises(UnavailableError):
        in_parts([1, 2, 3], act, (LabelStudioRefusedError,))
    assert calls == [[1, 2, 3]]

    def refuse(some: Sequence[int]) -> int:
        raise LabelStudioRefusedError(str(some))

    parts = in_parts([1, 2, 3], refuse, (LabelStudioRefusedError,))
    assert [str(part.result) for part in parts] == ["[1]", "[2]", "[3]"]


def test_one_attempt_gives_a_result_or_its_error() -> None:
    assert attempt(int, "3") == 3
    assert isinstance(attempt(int, "x"), ValueError)


def test_the_next_member_is_made_while_one_is_processed_and_an_error_comes_in_its_place() -> None:
    made: list[int] = []
    second = threading.Event()

    def members() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            if number == 1:
                second.set()
            yield number
        raise ValueError("the fourth")

    with ahead(members()) as coming:
        assert next(coming) == 0
        assert second.wait(300), "the second is made while the first is processed"
        assert [next(coming), next(coming)] == [1, 2]
        with pytest.raises(ValueError, match="the fourth"):
            next(coming)
    assert made == [0, 1, 2]
    assert all_of(ahead(iter(()))) == []


def all_of(given: AbstractContextManager[Iterator[T]]) -> list[T]:
    with given as members:
        return list(members)


def test_a_loop_that_is_left_ends_its_thread_before_it_goes_on() -> None:
    """Left to the collector of garbage, a pool was shut down by its own thread at times, and cannot wait for itself."""
    under_way, may_end = threading.Event(), threading.Event()
    ended: list[threading.Thread] = []

    def members() -> Iterator[int]:
        yield 0
        under_way.set()
        assert may_end.wait(300)
        ended.append(threading.current_thread())
        yield 1

    def leave() -> None:
        with ahead(members()) as coming, in_flight(coming, int, 1) as sent:
            for _ in sent:
                raise KeyboardInterrupt

    threading.Thread(target=lambda: under_way.wait(300) and may_end.set()).start()
    with pytest.raises(KeyboardInterrupt):
        leave()
    assert [thread.is_alive() for thread in ended] == [False]


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_are_in_flight_and_results_come_in_order(most: int) -> None:
    started, ended, together = threading.Semaphore(0), threading.Event(), 0
    under_way = 0
    lock = threading.Lock()

    def act(number: int) -> int:
        nonlocal under_way, together
        with lock:
            under_way += 1
            together = max(together, under_way)
        started.release()
        assert ended.wait(300)
        with lock:
            under_way -= 1
        return 10 * number

    def members() -> Iterator[int]:
        for number in range(6):
            if number == most:  # the calls before it are under way, and none has ended
                for _ in range(most):
                    assert started.acquire(timeout=300)
                ended.set()
            yield number

    assert all_of(in_flight(members(), act, most)) == [(number, 10 * number) for number in range(6)]
    assert together == most


def test_an_error_in_flight_comes_in_its_place_after_the_others_ended() -> None:
    ended: list[int] = []

    def act(number: int) -> int:
        if number == 1:
            raise ValueError("the second")
        ended.append(number)
        return number

    with in_flight(range(5), act, 2) as coming:
        assert next(coming) == (0, 0)
        with pytest.raises(ValueError, match="the second"):
            next(coming)
    assert ended == [0, 2]
    assert all_of(in_flight([], act, 2)) == []


def test_threads_write_under_the_leases_of_their_caller(store: Store) -> None:
    def write(name: object) -> str:
        with store.ledger.begin() as tx:
            tx.add(Cursor(name=str(name), position={}))
        return str(name)

    def lose_it() -> None:
        with hold(store.ledger, "sync"):
            assert all_of(ahead(map(write, "ab"))) == ["a", "b"]
            assert all_of(in_flight("cd", write, 2)) == [("c", "c"), ("d", "d")]
            with store.ledger.begin() as tx:
                tx.update(Lease, "sync", holder="another", fence=99)
            with pytest.raises(RefusedError, match="took the sync lease"):
                all_of(ahead(map(write, "e")))
            with pytest.raises(RefusedError, match="took the sync lease"):
                all_of(in_flight("f", write, 2))

    with pytest.raises(RefusedError, match="took the sync lease"):
        lose_it()
    with store.ledger.read() as tx:
        assert [cursor.name for cursor in tx.find(Cursor, order_by=("name",)) if len(cursor.name) == 1] == list("abcd")
