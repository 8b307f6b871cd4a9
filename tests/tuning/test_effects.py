"""Effects of choices, against figures worked out by hand."""

import pytest

from tuning.effects import SAME, effects_of, importance_of
from tuning.trials import Origin

AXES = {"optimizer": ("sgd", "adamw"), "scheduler": ("cosine", "step")}
BASE = {"optimizer.name": "sgd", "scheduler.name": "cosine"}


@pytest.fixture
def header(make_header):
    return make_header(axes=AXES, base=BASE, trials=8)


@pytest.fixture
def balanced(make_trial):
    """Each pair of choices twice: 0.5, 0.1 more for sgd and less for adamw, then 0.01 of noise up and down."""

    def make(**changes):
        trials = []
        for optimizer in AXES["optimizer"]:
            for scheduler in AXES["scheduler"]:
                for noise in (0.01, -0.01):
                    score = 0.5 + (0.1 if optimizer == "sgd" else -0.1) + noise
                    overrides = {"optimizer.name": optimizer, "scheduler.name": scheduler}
                    trials.append(make_trial(len(trials), [0.1, score], overrides=overrides, **changes))
        return trials

    return make


def table(header, trials):
    return {row.choice: row for row in effects_of(header, trials).table}


def test_a_real_effect_is_told_from_none(header, balanced):
    """8 trials, 3 coefficients, residual variance 0.0008 / 5, standard error 0.01 / sqrt(5), t(0.99375, 5) = 3.810."""
    rows = table(header, balanced())
    half = 3.810 * 0.01 / 5**0.5

    assert {choice: row.verdict for choice, row in rows.items()} == {
        "sgd": "better",
        "adamw": "worse",
        "cosine": SAME,
        "step": SAME,
    }
    for choice, effect in (("sgd", 0.1), ("adamw", -0.1), ("cosine", 0.0), ("step", 0.0)):
        row = rows[choice]
        assert (row.effect, row.low, row.high) == pytest.approx((effect, effect - half, effect + half), abs=1e-4)
        assert row.trials == 4


def test_trials_that_a_searcher_proposed_prove_nothing(header, balanced):
    found = effects_of(header, balanced(origin=Origin.SUGGESTED))

    assert (found.trials, found.basis) == (0, "no balanced trial was scored")
    assert {(row.effect, row.verdict) for row in found.table} == {(None, SAME)}


def test_epochs_that_only_some_trials_had_do_not_count(header, balanced):
    """The first epochs are all alike; a trial that was cut off there leaves only those to compare."""
    trials = balanced()
    trials[0] = trials[0].model_copy(update={"scores": trials[0].scores[:1], "state": "stopped"})
    found = effects_of(header, trials)

    assert (found.trials, found.epochs) == (8, 1)
    assert all(row.effect == pytest.approx(0.0, abs=1e-12) for row in found.table)


def test_too_few_trials_for_all_axes_are_judged_axis_by_axis(header, balanced):
    """4 trials, 2 coefficients. Optimizers explain everything; to the schedules they are noise of 0.1.

    Residual variance 0.04 / 2, standard error sqrt(0.02 / 4), t(0.99375, 2) = 8.860.
    """
    found = effects_of(header, balanced()[::2])
    rows = {row.choice: row for row in found.table}
    half = 8.860 * (0.02 / 4) ** 0.5

    assert found.basis.endswith("each axis by itself: too few trials to estimate all together")
    assert rows["sgd"].effect == pytest.approx(0.1)
    assert (rows["step"].effect, rows["step"].low, rows["step"].high) == pytest.approx((0.0, -half, half), abs=1e-3)
    assert rows["step"].verdict == SAME


def test_too_few_trials_give_no_estimate(header, balanced):
    rows = table(header, balanced()[::2][:3])

    assert {(row.effect, row.verdict) for row in rows.values()} == {(None, SAME)}


def test_what_a_choice_costs_is_its_mean_epoch(header, make_trial):
    trials = [
        make_trial(0, [0.2, 0.3], epoch_seconds=(1.0, 3.0)),
        make_trial(1, [0.2], epoch_seconds=(5.0,), overrides={"optimizer.name": "adamw"}),
    ]
    rows = table(header, trials)

    assert (rows["sgd"].seconds_per_epoch, rows["adamw"].seconds_per_epoch) == (2.0, 5.0)
    assert (rows["cosine"].seconds_per_epoch, rows["step"].seconds_per_epoch) == (3.0, None)


def test_trials_that_were_never_cut_off_are_compared_by_their_whole_budget(make_header, balanced, make_trial):
    header = make_header(axes=AXES, base=BASE, trials=9, block_trials=8)
    found = effects_of(header, [*balanced(), make_trial(8, [0.9], "stopped")])

    assert (found.trials, found.epochs) == (8, 2)
    assert found.basis == "8 balanced trials with the whole budget"


def test_an_axis_of_which_one_choice_was_tried_has_no_effect(header, balanced):
    rows = table(header, [trial for trial in balanced() if trial.overrides["scheduler.name"] == "cosine"])

    assert rows["sgd"].effect == pytest.approx(0.1)
    assert (rows["cosine"].effect, rows["step"].effect, rows["step"].trials) == (None, None, 0)


def test_what_moves_the_score_has_the_larger_share(header, balanced, make_trial):
    trials = [*balanced(), *balanced()]
    trials = [
        trial.model_copy(
            update={"number": number, "overrides": trial.overrides | {"batch_size": 32 * (1 + number % 3), "seed": 1}}
        )
        for number, trial in enumerate(trials)
    ]
    shares = importance_of(header, trials)

    assert next(iter(shares)) == "optimizer.name"
    assert set(shares) == {"optimizer.name", "scheduler.name", "batch_size"}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert importance_of(header, trials[:11]) is None, "too few"
    assert importance_of(header, [make_trial(number, [0.5], overrides=BASE) for number in range(12)]) is None, (
        "all alike"
    )
