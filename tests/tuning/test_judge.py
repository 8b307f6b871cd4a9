"""Who is cut off, by hand numbers, and that nothing is decided twice."""

from collections.abc import Callable

import pytest

from tuning.judge import Halving, Judge, MedianStopping, NoStopping, rule_of
from tuning.settings import Scheduler
from tuning.trials import SearchHeader


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


def test_at_the_bar_and_at_the_last_epoch_a_trial_goes_on():
    deciding = judge(Halving(1, 3, 9))
    for number, score in enumerate([0.3, 0.3, 0.3]):
        deciding.decide(number, 1, score)

    at_the_bar = deciding.decide(3, 1, 0.3)
    assert at_the_bar.cutoff == pytest.approx(0.3)
    assert at_the_bar.goes_on
    assert not deciding.decide(4, 1, 0.29).goes_on

    ending = judge(MedianStopping(1))
    for number in range(3):
        ending.decide(number, 9, 0.5)
        ending.decide(number, 8, 0.5)
    assert ending.decide(3, 9, 0.0).goes_on
    assert not ending.decide(3, 8, 0.0).goes_on


def test_a_decision_is_kept_and_its_score_counts_once():
    deciding = judge(MedianStopping(1, min_trials=2))
    first = [deciding.decide(0, 1, 0.1), deciding.decide(1, 1, 0.9)]

    assert [deciding.decide(0, 1, 0.9), deciding.decide(1, 1, 0.9)] == first
    assert deciding.decide(2, 1, 0.0).cutoff == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (Scheduler.NONE, [None, None, None]),
        (Scheduler.MEDIAN, [None, 0.2, 0.2]),
        (Scheduler.ASHA, [None, 0.2, None]),
    ],
)
def test_the_rule_of_a_search_has_its_numbers(
    scheduler: Scheduler, expected: list[float | None], make_header: Callable[..., SearchHeader]
):
    """Three scores 0.1, 0.2, 0.3 at each epoch; grace period 2, so ASHA's rungs are 2 and 6, with the best half."""
    header = make_header(scheduler=scheduler, grace_epochs=2, reduction_factor=2, trial_epochs=6)
    rule = rule_of(header)
    bars = []
    for epoch in (1, 2, 3):
        for number, score in enumerate((0.1, 0.2, 0.3)):
            rule.take_in(number, epoch, score)
        bars.append(rule.bar(epoch)[1])
    assert bars == pytest.approx(expected)
