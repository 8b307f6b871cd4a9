"""Batches of which some members fail: the others go on, in few calls."""

import math
import threading
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records.errors import LabelStudioError, LabelStudioRefusedError, UnavailableError
from records.parts import ahead, attempt, each_in_parts, in_parts


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

    coming = ahead(members())
    assert next(coming) == 0
    assert second.wait(300), "the second is made while the first is processed"
    assert [next(coming), next(coming)] == [1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(coming)
    assert made == [0, 1, 2]
    assert list(ahead(iter(()))) == []
