"""A search goes on with the settings that it was started with; what contradicts them is refused, and says so."""

from pathlib import Path

import pytest

import relook
from records.errors import RefusedError, UnknownIdError
from trainers.settings import TrainersSettings
from tuning.journal import FILE_NAME, open_journal
from tuning.resumed import require_unchanged, resumed_settings, with_options
from tuning.settings import TuningSettings

STARTED = TuningSettings(trials=7, seed=5, space=("optimizer=sgd,adamw",), trial_epochs=2, max_concurrent=1, niceness=3)
TRAINED = TrainersSettings().with_values({"epochs": 3, "batch_size": 16, "optimizer.learning_rate": 0.0001})
BASE = {name: value for name, value in TRAINED.flat().items() if not name.startswith("workers.")}


@pytest.fixture
def run_dir(tmp_path: Path, make_header) -> Path:
    open_journal(tmp_path / "tune-1", make_header(base=BASE), STARTED.model_dump(mode="json")).close()
    return tmp_path / "tune-1"


@pytest.mark.parametrize(
    "today", [TuningSettings(), TuningSettings(seed=9, searcher="tpe", space=("sampler=natural",))]
)
def test_no_setting_has_to_be_given_again(run_dir: Path, today: TuningSettings) -> None:
    now = TrainersSettings().with_values({"epochs": 50, "workers.count": 2})
    tuning, trainers = resumed_settings(run_dir, today, now, [])
    assert tuning == STARTED
    assert trainers == TRAINED.with_values({"workers.count": 2})  # on what it trains is no part of a search
    require_unchanged(run_dir, tuning, trainers)


@pytest.mark.parametrize(
    ("given", "changes", "space"),
    [
        (["tuning.trials"], {"trials": 20}, []),
        (["tuning.max_concurrent", "tuning.cpus_per_trial"], {"max_concurrent": 2}, []),
        (["tuning.seed"], {"confirm_seeds": 0}, []),
        ([], {"trials": 9}, ["optimizer=sgd,adamw"]),
    ],
)
def test_how_far_it_goes_and_the_same_again_may_be_given(run_dir, given, changes, space) -> None:
    tuning, trainers = resumed_settings(run_dir, TuningSettings(seed=5), TrainersSettings(), given)
    tuning = with_options(tuning, changes, space)
    require_unchanged(run_dir, tuning, trainers)
    assert tuning.model_dump(include=set(changes)) == changes
    assert tuning.space == STARTED.space


@pytest.mark.parametrize(
    ("given", "changes", "sentence"),
    [
        (
            ["trainers.epochs"],
            {},
            "trainers.epochs 12 contradicts the search in .*, which was started with 3; ",
        ),
        (["tuning.seed"], {}, r"tuning.seed 0 contradicts .*, which was started with 5"),
        (["trainers.optimizer.learning_rate"], {}, r"learning_rate .* contradicts .* with 0\.0001"),
        ([], {"searcher": "tpe"}, "tuning.searcher 'tpe' contradicts .* 'random'"),
        (["tuning.space"], {}, r"tuning\.space .* with .*optimizer=sgd,adamw"),
    ],
)
def test_what_contradicts_it_is_refused(run_dir, given, changes, sentence) -> None:
    tuning, trainers = resumed_settings(run_dir, TuningSettings(), TrainersSettings(), given)
    with pytest.raises(RefusedError, match=sentence):
        require_unchanged(run_dir, with_options(tuning, changes, []), trainers)


def test_a_journal_of_before_has_the_settings_of_the_training(tmp_path: Path, make_header) -> None:
    open_journal(tmp_path, make_header(base=BASE)).close()
    path = tmp_path / FILE_NAME
    path.write_text(path.read_text().replace(',"tuning":{}', ""))
    tuning, trainers = resumed_settings(tmp_path, STARTED, TrainersSettings(), [])
    assert (tuning, trainers) == (STARTED, TRAINED)
    require_unchanged(tmp_path, tuning, trainers)


def test_settings_that_do_not_fit_any_more_are_a_sentence(tmp_path: Path, make_header) -> None:
    open_journal(tmp_path, make_header(base=BASE | {"optimizer.momentums": 1}), {"trials": 0}).close()
    with pytest.raises(RefusedError, match="cannot go on: trials of its settings"):
        resumed_settings(tmp_path, STARTED, TrainersSettings(), [])
    with pytest.raises(RefusedError, match=r"cannot go on: optimizer\.momentums of its settings"):
        resumed_settings(tmp_path, STARTED, TrainersSettings(), ["tuning.trials"])


def test_python_goes_on_as_the_command_does(tmp_path: Path, make_header) -> None:
    with relook.open_home(tmp_path / "home") as home:
        runs = home.store.home.runs
        open_journal(runs / "tune-1", make_header(base=BASE), STARTED.model_dump(mode="json")).close()
        with pytest.raises(RefusedError, match=r"tuning\.seed 9 contradicts the search in .*tune-1"):
            relook.tune(home, resume=True, set={"tuning.seed": 9})
        with pytest.raises(RefusedError, match=r"trainers\.epochs 4 contradicts"):
            relook.tune(home, resume=True, trials=9, set={"trainers.epochs": 4})
        # Nothing contradicts: what is missing is the dataset that the search was made with.
        with pytest.raises(UnknownIdError, match="dddddddd"):
            relook.tune(home, resume=True)
