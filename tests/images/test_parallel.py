"""Working through chunks: order, bounded look-ahead, errors."""

import threading
import time

import pytest

from images.parallel import chunks_of, map_in_order, num_threads


def test_results_come_in_order() -> None:
    def slow_first(n: int) -> int:
        time.sleep(0.02 if n == 0 else 0.0)
        return n * n

    assert list(map_in_order(slow_first, range(40))) == [n * n for n in range(40)]


def test_chunks_hold_everything_once() -> None:
    assert [list(c) for c in chunks_of(list(range(5)), 2)] == [[0, 1], [2, 3], [4]]
    assert chunks_of([], 2) == []


def test_it_does_not_run_far_ahead() -> None:
    started: list[int] = []
    results = map_in_order(lambda n: started.append(n) or n, range(1000))
    next(results)
    time.sleep(0.05)
    assert len(started) <= 4 * num_threads()
    results.close()  # type: ignore[attr-defined]
    assert len(started) < 100


def test_an_error_arrives_and_nothing_more_is_started() -> None:
    started: list[int] = []

    def fail(n: int) -> int:
        started.append(n)
        if n == 3:
            raise ValueError("three")
        return n

    with pytest.raises(ValueError, match="three"):
        list(map_in_order(fail, range(1000)))
    assert len(started) < 100
    assert not [t for t in threading.enumerate() if t.name.startswith("relook-data")]
