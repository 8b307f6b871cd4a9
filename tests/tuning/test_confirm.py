"""Who is called the winner, by fresh seeds."""

import pytest

from trainers.settings import TrainersSettings
from tuning.confirm import confirmation_plans, interval, verdict_on
from tuning.trials import Origin

LEADER = {"optimizer.name": "adamw"}


@pytest.fixture
def confirmed(make_trial):
    """Builds leader and trials from scores per seed of the leader and of the given settings."""

    def make(own, given, number=4, **changes):
        leader = make_trial(number, [0.9], overrides=LEADER if number else {})
        plans = confirmation_plans(leader, TrainersSettings(), max(len(own), len(given)))
        by_seed = {number: list(own), 0: list(given)}
        trials = [leader]
        for plan in plans:
            whose = number if plan.overrides.get("optimizer.name") else 0
            if by_seed[whose]:
                trials.append(make_trial(plan.number, [by_seed[whose].pop(0)], origin=plan.origin, **changes))
        return leader, trials

    return make


def test_both_train_with_the_same_fresh_seeds(make_trial):
    base = TrainersSettings(seed=7)
    plans = confirmation_plans(make_trial(4, [0.9], overrides=LEADER), base, 2)

    assert [plan.overrides for plan in plans] == [LEADER | {"seed": 8}, {"seed": 8}, LEADER | {"seed": 9}, {"seed": 9}]
    assert {plan.origin for plan in plans} == {Origin.CONFIRMATION}
    assert len({plan.number for plan in plans}) == 4


def test_given_settings_that_lead_are_trained_once_per_seed(make_trial):
    assert [p.overrides for p in confirmation_plans(make_trial(0, [0.9]), TrainersSettings(), 2)] == [
        {"seed": TrainersSettings().seed + 1},
        {"seed": TrainersSettings().seed + 2},
    ]


def test_a_leader_that_stays_ahead_wins(confirmed):
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / sqrt(3), t(0.975, 2) = 4.3027."""
    verdict = verdict_on(*confirmed([0.5, 0.6, 0.7], [0.4, 0.4, 0.4]))

    assert verdict.winner == 4
    assert verdict.difference == pytest.approx(0.2)
    assert (verdict.difference_low, verdict.difference_high) == pytest.approx((-0.0484, 0.4484), abs=1e-4)
    assert verdict.words == (
        "trial 4 is ahead of the given settings by +20.0 points over 3 fresh seeds, not distinguishable from chance"
    )


def test_an_interval_above_zero_is_said(confirmed):
    assert verdict_on(*confirmed([0.5, 0.51, 0.52], [0.4, 0.4, 0.4])).words.endswith("the interval excludes zero")


def test_a_leader_that_falls_behind_loses_to_the_given_settings(confirmed):
    verdict = verdict_on(*confirmed([0.3, 0.4], [0.4, 0.5]))

    assert (verdict.winner, verdict.winner_confirmed) == (0, verdict.given_confirmed)
    assert "the given settings stay" in verdict.words


def test_a_seed_that_only_one_of_them_has_does_not_count(confirmed):
    verdict = verdict_on(*confirmed([0.5], [0.4, 0.9]))

    assert (verdict.winner, verdict.winner_confirmed.scores, verdict.given_confirmed.scores) == (4, (0.5,), (0.4,))
    assert (verdict.difference_low, verdict.difference_high) == (None, None)


def test_failed_confirmations_give_no_verdict(confirmed):
    assert verdict_on(*confirmed([0.5], [0.4], error="not finite", state="failed")) is None


def test_one_value_has_no_interval():
    assert interval([0.5]) == (None, None)
