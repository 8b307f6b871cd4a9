"""Who is cut off, by hand numbers, and that nothing is decided twice."""

import pytest

from tuning.judge import Halving, Judge, MedianStopping, NoStopping


def judge(rule, past=(), exempt=()):
    return Judge(rule, 9, lambda number: number in exempt, past)


def test_halving_cuts_off_below_the_best_third():
    """Rungs 1 and 3. The bar for the fourth trial is the 66.7 percentile of 0.1, 0.2, 0.3, which is 0.2333."""
    deciding = judge(Halving(1, 3, 9))

    made = [deciding.decide(number, 1, score) for number, score in enumerate([0.1, 0.2, 0.3, 0.23])]

    assert [decision.goes_on for decision in made] == [True, True, True, False]
    assert made[3].cutoff == pytest.approx(0.7 / 3)
    assert [decision.rung for decision in made] == [1, 1, 1, 1]
    assert deciding.decide(0, 2, 0.0).rung is None
    assert deciding.decide(0, 3, 0.5).rung == 3


def test_an_exempt_trial_goes_on_and_its_score_counts():
    deciding = judge(Halving(1, 2, 9), exempt={1})
    deciding.decide(0, 1, 0.5)

    assert deciding.decide(1, 1, 0.1).goes_on
    assert deciding.decide(2, 1, 0.2).cutoff == pytest.approx(0.3)


def test_what_was_decided_stays_decided_whatever_the_score_is_now():
    first = judge(Halving(1, 2, 9))
    past = [first.decide(0, 1, 0.5), first.decide(1, 1, 0.4)]
    again = judge(Halving(1, 2, 9), past)

    assert again.decide(1, 1, 0.99) == past[1]
    assert not again.decide(1, 1, 0.99).goes_on
    assert again.decide(2, 1, 0.44).cutoff == pytest.approx(0.45)


def test_median_stopping_waits_for_three_and_then_asks_for_the_median():
    deciding = judge(MedianStopping(2))

    assert all(deciding.decide(number, 1, 0.0).goes_on for number in range(5))
    made = [deciding.decide(number, 2, score) for number, score in enumerate([0.1, 0.5, 0.3, 0.29, 0.31])]
    assert [decision.goes_on for decision in made] == [True, True, True, False, True]


def test_without_a_scheduler_everything_goes_on():
    deciding = judge(NoStopping())

    assert all(deciding.decide(number, epoch, 0.0).goes_on for number in range(3) for epoch in range(1, 10))
