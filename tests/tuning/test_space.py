"""The space: derived, conditional, seeded, and every sample is a valid TrainersSettings."""

import math

import numpy as np
import pytest

from records.errors import ConfigError, ContractError
from records.registry import Choice, Range, Registered
from trainers.augmentation import POLICIES
from trainers.optimization.optimizers import OPTIMIZERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.settings import OptimizerSettings, TrainersSettings
from tuning import space as space_module
from tuning.planner import Planner
from tuning.settings import Axis
from tuning.space import COMPOSED, SearchSpace, derive_space, difference, random_chooser, with_overrides
from tuning.trials import Origin

BASE = TrainersSettings()
ALL = (Axis.OPTIMIZER, Axis.SCHEDULER, Axis.AUGMENTATION)


def plan_trials(space, base, *, trials, seed, enqueued=()):
    planner = Planner(space, base, trials=trials, seed=seed, enqueued=enqueued)
    return [planner.plan(number) for number in range(trials)]


def test_every_registered_record_is_in_the_space():
    described = derive_space(ALL, BASE).describe()

    assert list(described) == ["optimizer", "scheduler", "augmentation"]
    assert list(described["optimizer"]) == list(OPTIMIZERS.names)
    assert list(described["scheduler"]) == list(SCHEDULERS.names)
    assert list(described["augmentation"]) == [*POLICIES.names, COMPOSED.name]
    assert (len(OPTIMIZERS), len(SCHEDULERS), len(POLICIES)) == (4, 4, 8)


def test_every_tunable_is_a_field_of_the_trainers_settings():
    axes = derive_space(ALL, BASE).axes
    tunables = {f"{axis}.{name}" for axis, records in axes.items() for record in records for name in record.tunable}

    assert {
        "optimizer.learning_rate", "optimizer.momentum", "scheduler.gamma", "scheduler.step_size_epochs",
    } <= tunables  # fmt: skip
    assert tunables <= set(BASE.flat())


def test_the_learning_rate_is_searched_in_the_logarithm_around_each_optimizers_own():
    for recipe in OPTIMIZERS.records:
        range_ = recipe.tunable["learning_rate"]
        assert isinstance(range_, Range)
        assert range_.log
        assert recipe.default_learning_rate in range_


def test_every_sample_is_valid_and_within_its_ranges():
    space = derive_space(ALL, BASE)
    random = np.random.default_rng(1)
    met: set[tuple[str, str]] = set()

    for _ in range(300):
        overrides = space.sample(random)
        settings = with_overrides(BASE, overrides)
        for axis, records in space.axes.items():
            record = next(record for record in records if record.name == space.level(axis, settings))
            met.add((axis.value, record.name))
            assert all(overrides[f"{axis}.{name}"] in tunable for name, tunable in record.tunable.items())

    # A composed policy in which every operation is off is called none.
    assert len(met) == len(OPTIMIZERS) + len(SCHEDULERS) + len(POLICIES) + 1


def test_a_sample_holds_only_what_its_choices_make_tunable():
    space = derive_space(ALL, BASE)
    random = np.random.default_rng(2)

    for _ in range(200):
        overrides = space.sample(random)
        expected = {"optimizer.name", "scheduler.name", "augmentation"}
        for axis, records in space.axes.items():
            level = space.level(axis, with_overrides(BASE, overrides))
            expected |= {f"{axis}.{name}" for name in next(r for r in records if r.name == level).tunable}
        assert set(overrides) == expected
        assert ("optimizer.momentum" in overrides) == (overrides["optimizer.name"] == "sgd")
        assert ("scheduler.step_size_epochs" in overrides) == (overrides["scheduler.name"] == "step")


def test_an_axis_that_is_not_searched_stays_as_given():
    base = TrainersSettings(optimizer=OptimizerSettings(name="adam", learning_rate=0.002))
    overrides = derive_space((Axis.SCHEDULER,), base).sample(np.random.default_rng(0))

    assert "optimizer.name" not in overrides
    assert "optimizer.learning_rate" not in overrides
    assert with_overrides(base, overrides).optimizer.learning_rate == 0.002


def test_a_policy_file_of_the_caller_joins_the_registered_policies():
    base = TrainersSettings(augmentation="mine.yaml")

    names = list(derive_space(ALL, base).describe()["augmentation"])

    assert names == [*POLICIES.names, "mine.yaml", COMPOSED.name]


def test_log_ranges_are_sampled_evenly_in_the_logarithm():
    record = Registered(name="r", description="", tunable={"learning_rate": Range(1e-4, 1e-2, log=True)})
    space = SearchSpace({Axis.OPTIMIZER: (record,)})
    random = np.random.default_rng(3)

    exponents = [math.log10(space.sample(random)["optimizer.learning_rate"]) for _ in range(2000)]

    assert np.mean(exponents) == pytest.approx(-3.0, abs=0.05)
    assert np.mean(np.array(exponents) < -3.5) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("log", [False, True])
def test_whole_numbers_reach_both_ends(log):
    record = Registered(name="r", description="", tunable={"step_size_epochs": Range(1, 5, integer=True, log=log)})
    space = SearchSpace({Axis.SCHEDULER: (record,)})
    random = np.random.default_rng(4)

    drawn = {space.sample(random)["scheduler.step_size_epochs"] for _ in range(300)}

    assert drawn == {1, 2, 3, 4, 5}
    assert all(isinstance(value, int) for value in drawn)


def test_choices_are_all_drawn():
    record = Registered(name="r", description="", tunable={"nesterov": Choice((False, True))})
    space = SearchSpace({Axis.OPTIMIZER: (record,)})
    random = np.random.default_rng(5)

    assert {space.sample(random)["optimizer.nesterov"] for _ in range(30)} == {False, True}


def test_a_record_that_tunes_a_setting_of_another_axis_is_refused(monkeypatch):
    class Overlapping:
        records = (Registered(name="twice", description="", tunable={"learning_rate": Range(1e-3, 1e-2)}),)

        def __contains__(self, name):
            return True

    monkeypatch.setattr(space_module, "REGISTRIES", {**space_module.REGISTRIES, Axis.SCHEDULER: Overlapping()})

    with pytest.raises(ContractError, match=r"twice makes scheduler\.learning_rate tunable, which is no setting"):
        derive_space(ALL, BASE)


def test_the_given_settings_come_first_then_the_enqueued_then_samples():
    winner = TrainersSettings(optimizer=OptimizerSettings(name="adam", learning_rate=0.003))

    plans = list(plan_trials(derive_space(ALL, BASE), BASE, trials=5, seed=0, enqueued=[winner, BASE, winner]))

    assert [plan.number for plan in plans] == [0, 1, 2, 3, 4]
    assert [plan.origin for plan in plans] == [Origin.DEFAULTS, Origin.ENQUEUED, *[Origin.SAMPLED] * 3]
    assert plans[0].overrides == {}
    assert with_overrides(BASE, plans[1].overrides) == winner


def test_a_search_of_one_trial_tries_the_given_settings():
    winner = TrainersSettings(optimizer=OptimizerSettings(name="adam"))

    plans = list(plan_trials(derive_space(ALL, BASE), BASE, trials=1, seed=0, enqueued=[winner]))

    assert [plan.overrides for plan in plans] == [{}]


def test_the_same_seed_plans_the_same_and_more_trials_keep_the_first_ones():
    space = derive_space(ALL, BASE)

    def plans(trials, seed):
        return list(plan_trials(space, BASE, trials=trials, seed=seed))

    assert plans(8, seed=7) == plans(20, seed=7)[:8]
    assert plans(8, seed=7)[1:] != plans(8, seed=8)[1:]


def test_configurations_are_not_tried_twice_while_there_are_others():
    space = SearchSpace({Axis.AUGMENTATION: tuple(Registered(name=n, description="") for n in POLICIES)})

    plans = list(plan_trials(space, BASE, trials=len(POLICIES), seed=0))

    tried = {with_overrides(BASE, plan.overrides).augmentation for plan in plans}
    assert tried == set(POLICIES)


def test_difference_and_overrides_are_inverse():
    other = TrainersSettings(optimizer=OptimizerSettings(name="rmsprop", learning_rate=1e-3), epochs=7)

    assert difference(BASE, other) == {"optimizer.name": "rmsprop", "optimizer.learning_rate": 1e-3, "epochs": 7}
    assert with_overrides(BASE, difference(BASE, other)) == other


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"optimizer.learning_rate": -1.0}, "optimizer.learning_rate"),
        ({"optimizer.name": "magic"}, "optimizer.name"),
        ({"optimizer.speed": 1}, "optimizer.speed"),
        ({"speed": 1}, "speed"),
    ],
)
def test_overrides_that_cannot_work_name_the_field(overrides, field):
    with pytest.raises(ConfigError, match=f"trainers.{field} = "):
        with_overrides(BASE, overrides)


def test_the_hash_follows_the_ranges():
    whole, part = derive_space(ALL, BASE), derive_space((Axis.OPTIMIZER,), BASE)

    assert whole.hash == derive_space(ALL, BASE).hash
    assert whole.hash != part.hash


def test_the_decisions_behind_settings_are_repeated():
    space, base = derive_space((Axis.OPTIMIZER, Axis.AUGMENTATION), BASE), BASE
    composed = 0
    for seed in range(40):
        made, chance = [], random_chooser(np.random.default_rng(seed))

        def note(name, tunable, made=made, chance=chance):
            value = chance(name, tunable)
            is_part = name.startswith("composed.") and not isinstance(value, bool)
            made.append((name, round(value, 2) if is_part else value))
            return value

        settings = with_overrides(base, space.draw(note))
        asked = []
        space.replay(settings, lambda name, tunable, asked=asked: asked.append((name, tunable.values[0])))
        known = dict(asked)
        composed += settings.augmentation.startswith("ops:")
        if settings.augmentation != "none":
            assert known == {name: pytest.approx(value) if isinstance(value, float) else value for name, value in made}
    assert composed


def test_settings_outside_a_space_decide_nothing_in_it():
    space, asked = derive_space((Axis.OPTIMIZER,), BASE), []
    narrowed = SearchSpace({Axis.OPTIMIZER: space.axes[Axis.OPTIMIZER][1:]})
    narrowed.replay(TrainersSettings(), lambda name, tunable: asked.append(name))
    assert TrainersSettings().optimizer.name == space.axes[Axis.OPTIMIZER][0].name
    assert asked == []
