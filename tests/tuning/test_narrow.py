"""What a person may say about the space, and what is refused before anything starts."""

import pytest

from records.errors import ConfigError
from records.registry import Choice, Range
from trainers.settings import ModelSettings, TrainersSettings
from tuning.narrow import narrow, read_space
from tuning.planner import Planner
from tuning.search import require_writable
from tuning.settings import Axis, Searcher, TuningSettings
from tuning.space import derive_space, with_overrides
from tuning.trials import Origin

BASE = TrainersSettings()


def narrowed(*items, base=BASE):
    return narrow(derive_space(TuningSettings().search, base), base, read_space(items))


def test_names_and_ranges_are_narrowed_where_they_belong():
    space = narrowed("optimizer=sgd,adam", "optimizer.learning_rate=4e-3..9e-3", "sgd.momentum=0.85..0.9")
    sgd, adam = space.axes[Axis.OPTIMIZER]

    assert (sgd.name, adam.name) == ("sgd", "adam")
    assert sgd.tunable["learning_rate"] == Range(4e-3, 9e-3, log=True)
    assert adam.tunable["learning_rate"] == Range(4e-3, 9e-3, log=True)
    assert sgd.tunable["momentum"] == Range(0.85, 0.9)


def test_settings_without_an_owner_and_other_registries_join():
    space = narrowed("batch_size=32,64", "model=custom_cnn,resnet18", "model.scaling=mean_std,min_max")

    assert space.free["batch_size"] == Choice((32, 64))
    assert [record.name for record in space.axes[Axis.MODEL]] == ["custom_cnn", "resnet18"]
    drawn = [Planner(space, BASE, trials=9, seed=0).plan(number).overrides for number in range(1, 9)]
    assert {overrides["batch_size"] for overrides in drawn} == {32, 64}
    assert all(("model.head_dropout" in o) == (o["model.name"] == "resnet18") for o in drawn)


def test_a_yaml_file_says_the_same(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("optimizer: [sgd]\noptimizer.learning_rate: {low: 1e-2, high: 0.1, log: true}\nscheduler: cosine\n")

    space = narrowed(str(file))

    assert [record.name for record in space.axes[Axis.SCHEDULER]] == ["cosine"]
    assert space.axes[Axis.OPTIMIZER][0].tunable["learning_rate"] == Range(0.01, 0.1, log=True)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("optimizer=sgd,magic", "optimizer 'magic' is unknown; there are sgd, rmsprop, adam, adamw"),
        ("lerning_rate=1..2", r"lerning_rate cannot be searched; did you mean .*optimizer\.learning_rate"),
        ("learning_rate=1e-3..1e-2", r"learning_rate cannot be searched; did you mean .*optimizer\.learning_rate"),
        ("optimizer.learning_rate=1e-2..1e-3", r"the range of optimizer.learning_rate is empty \(0.01..0.001\)"),
        ("optimizer.learning_rate=5..6", r"5..6 leaves nothing of sgd.learning_rate, which may be 0.003..0.3"),
        ("sgd.magic=1,2", "sgd.magic is unknown"),
        ("epochs=3,4", "epochs cannot be searched"),
        ("batch_size=", "batch_size has no value left"),
        ("batch_size=1,64", "batch_size = 1 cannot be tried"),
        ("model.side_px=16,64", r"model.side_px.* cannot be tried: .*custom_cnn needs at least 32"),
        ("optimizer=1..2", "optimizer takes names, as optimizer=sgd,rmsprop"),
        ("optimizer=[", r"optimizer '\[' is unknown"),
        ("optimizer={x: 1}", "optimizer takes single values, not lists or mappings"),
        ("sgd.momentum=@..1", "sgd.momentum runs from '@' to 1, and both ends have to be numbers"),
        ("sgd.momentum=0.9,5", "sgd.momentum cannot be 5; it may be 0.8..0.98"),
        ("sgd.nesterov=1..2", "sgd.nesterov takes single values, not a range; it may be False, True"),
        ("nothing", "neither name=values nor a YAML file"),
        ("none.yaml", r"the space none.yaml cannot be read"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(item, message):
    with pytest.raises(ConfigError, match=message):
        narrowed(item)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sgd, adam]", "has to map names to values, as `optimizer:"),
        ("optimizer: [", "is not YAML"),
        ("sgd.momentum: {lo: 1, high: 2}", r"sgd.momentum needs low and high, .* it has \['high', 'lo'\]"),
        ("optimizer: [[sgd], adam]", "optimizer takes single values, not lists or mappings"),
    ],
)
def test_a_file_that_is_no_space_is_refused(tmp_path, text, message):
    (tmp_path / "space.yaml").write_text(text)

    with pytest.raises(ConfigError, match=message):
        narrowed(str(tmp_path / "space.yaml"))


def test_single_values_take_the_place_of_a_range(tmp_path):
    (tmp_path / "space.yaml").write_text("batch_size: 32\n")
    space = narrowed(str(tmp_path / "space.yaml"), "sgd.momentum=0.85,0.9")

    assert space.free["batch_size"] == Choice((32,))
    assert space.axes[Axis.OPTIMIZER][0].tunable["momentum"] == Choice((0.85, 0.9))


def test_a_setting_of_a_record_that_is_left_out_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.momentum belongs to sgd, which the space leaves out"):
        narrowed("optimizer=adam", "optimizer.momentum=0.8,0.9")


def test_an_impossible_combination_is_named():
    base = TrainersSettings(model=ModelSettings(name="resnet18", side_px=16))

    with pytest.raises(ConfigError, match=r"combination .*model custom_cnn.* is impossible.*at least 32"):
        narrowed("model=resnet18,custom_cnn", base=base)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be written"):
        require_writable(tmp_path / "file" / "run")


def test_samples_are_balanced_over_the_choices_of_each_axis():
    space = narrowed("augmentation=none,light")
    planner = Planner(space, BASE, trials=9, seed=3)
    optimizers = [planner.plan(number).overrides["optimizer.name"] for number in range(1, 9)]

    assert sorted(optimizers) == sorted(["sgd", "rmsprop", "adam", "adamw"] * 2)


def test_tpe_proposes_a_function_of_seed_and_history(make_trial):
    space = narrowed("batch_size=32,64")
    planner = Planner(space, BASE, trials=20, seed=1, searcher=Searcher.TPE, startup_trials=6)
    history = []
    for number in range(7):
        plan = planner.plan(number, history)
        good = plan.overrides.get("optimizer.name") == "adam"
        history.append(make_trial(number, [0.5 if good else 0.2], overrides=plan.overrides, origin=plan.origin))

    resumed = Planner(space, BASE, trials=20, seed=1, searcher=Searcher.TPE, startup_trials=6, done=history)
    proposed = [planner.plan(7, history), resumed.plan(7, history)]

    assert proposed[0] == proposed[1]
    assert proposed[0].origin is Origin.SUGGESTED
    assert [trial.origin for trial in history] == [Origin.DEFAULTS, *[Origin.SAMPLED] * 6]
    with_overrides(BASE, proposed[0].overrides)


def test_tpe_proposes_whole_numbers_and_learns_from_trials_that_did_not_end(make_trial):
    space = narrowed("optimizer=sgd", "scheduler=step", "batch_size=32,64")
    planner = Planner(space, BASE, trials=20, seed=1, searcher=Searcher.TPE, startup_trials=4)
    history = []
    for number, state in enumerate(("finished", "stopped", "running", "finished", "failed")):
        plan = planner.plan(number, history)
        scores = [] if state == "failed" else [0.1 * number]
        history.append(make_trial(number, scores, state, overrides=plan.overrides, origin=plan.origin))
    # A setting of before the space was narrowed, which is not in it any more.
    history[1] = history[1].model_copy(update={"overrides": history[1].overrides | {"batch_size": 16}})
    proposed = planner.plan(5, history)

    assert proposed.origin is Origin.SUGGESTED
    assert proposed.overrides["scheduler.step_size_epochs"] in range(1, 11)
    assert isinstance(proposed.overrides["scheduler.step_size_epochs"], int)
    assert proposed.overrides["batch_size"] in (32, 64)
