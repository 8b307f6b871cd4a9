"""The report of a journal, for programs and for people."""

import io

import pytest
from rich.console import Console

from records.errors import RefusedError, UnknownIdError
from tuning.experiments import Comparison
from tuning.journal import open_journal, read_journal
from tuning.live import SearchView, comparison_table, describe, line_of, search_summary, sparkline
from tuning.log import SearchLog
from tuning.report import find_resumable, find_run, report_on, write_report
from tuning.trials import Decision


def draw(renderable):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def decided(number, score, goes_on=True, epoch=1):
    return Decision(number=number, epoch=epoch, score=score, rung=None, cutoff=None, goes_on=goes_on)


@pytest.fixture
def run(tmp_path, make_header, make_trial):
    trials = [
        make_trial(0, [0.30, 0.35], start_seconds=5.0, cold_start=True),
        make_trial(1, [0.2], "stopped", overrides={"optimizer.name": "adam"}, start_seconds=0.1, cold_start=False),
        make_trial(
            2, [], "failed", overrides={"optimizer.learning_rate": 9.0}, error="not finite", error_kind="DivergedError",
            start_seconds=0.3, cold_start=False,
        ),
    ]  # fmt: skip
    folder = tmp_path / "tune-1"
    with open_journal(folder, make_header()) as journal:
        for trial in trials:
            journal.write("ended", trial=trial.model_dump(mode="json"))
    return folder


def test_the_report_ranks_and_names_failures(run):
    report = report_on(run)

    assert [row["number"] for row in report.leaderboard] == [0, 1, 2]
    assert report.best == {"number": 0, "score": 0.35, "overrides": {}}
    assert report.failures == ({"number": 2, "kind": "DivergedError", "reason": "not finite"},)
    assert (report.complete, report.epochs_trained, report.epochs_budget) == (True, 3, 6)
    assert report.start_seconds_median == pytest.approx(0.2)


def test_the_command_repeats_the_winner(tmp_path, make_header, make_trial):
    base = {"optimizer.name": "sgd", "epochs": 30}
    winner = make_trial(
        1, [0.9], overrides={"optimizer.name": "adam", "optimizer.learning_rate": 0.01, "augmentation": "my file.yaml"}
    )
    with open_journal(tmp_path, make_header(base=base)) as journal:
        journal.write("ended", trial=winner.model_dump(mode="json"))

    assert report_on(tmp_path).command == (
        f"relook train --data {'d' * 12} --set trainers.epochs=30 --set trainers.optimizer.name=adam "
        "--set 'trainers.augmentation=my file.yaml' --set trainers.optimizer.learning_rate=0.01"
    )


def test_a_search_that_was_killed_is_reported_as_far_as_it_came(tmp_path, make_header, make_trial):
    with open_journal(tmp_path, make_header()) as journal:
        journal.write("epoch", trial=make_trial(0, [0.3], "running").model_dump(mode="json"))
    report = report_on(tmp_path)

    assert not report.complete
    assert report.best is None
    assert report.leaderboard[0]["state"] == "running"


def test_the_last_search_is_found_by_its_name(tmp_path, make_header, run):
    open_journal(tmp_path / "tune-0", make_header()).close()
    (tmp_path / "tune-9").mkdir()

    assert find_run(tmp_path) == run
    assert find_run(tmp_path, "tune-0") == tmp_path / "tune-0"
    assert find_run(tmp_path / "elsewhere", str(run)) == run


def test_of_several_unfinished_searches_one_has_to_be_named(tmp_path, make_header, run):
    assert find_resumable(tmp_path) == run
    for name in ("tune-2", "tune-3"):
        open_journal(tmp_path / name, make_header()).close()
    with pytest.raises(RefusedError, match=r"2 searches are unfinished \(tune-2, tune-3\); name one"):
        find_resumable(tmp_path)
    assert find_resumable(tmp_path, "tune-2") == tmp_path / "tune-2"


@pytest.mark.parametrize(("name", "message"), [(None, "holds no search yet"), ("x", "no search is named 'x'")])
def test_a_search_that_does_not_exist(tmp_path, name, message):
    with pytest.raises(UnknownIdError, match=message):
        find_run(tmp_path, name)


def test_the_summary_tells_a_person_the_same(run):
    text = draw(search_summary(*read_journal(run)))

    assert "3 of 3 trials" in text
    assert "10 training images of 20" in text
    assert "Winner: trial 0, validation balanced accuracy 0.350, the given settings." in text
    assert "not finite" in text


def test_the_live_view_shows_leader_and_budget(tmp_path, make_header, make_plan):
    view = SearchView()
    assert "waiting" in draw(view)
    with open_journal(tmp_path, make_header()) as journal:
        log = SearchLog(make_header(), journal, view.update)
        log.started(make_plan(0))
        log.started(make_plan(1, **{"optimizer.name": "adam", "optimizer.learning_rate": 0.00123456}))
        log.epoch(decided(1, 0.42), seconds=1.0, key_class_sensitivity=None)
    text = " ".join(draw(view).split())

    assert "0 of 3 trials done, 1 of at most 6 epochs" in text
    assert "best so far 0.420 by optimizer adam, optimizer.learning_rate 0.00123" in text


def test_the_live_view_keeps_running_trials_and_the_best_in_sight(tmp_path, make_header, make_plan):
    view = SearchView(max_rows=3)
    with open_journal(tmp_path, make_header(trials=8)) as journal:
        log = SearchLog(make_header(trials=8), journal, view.update)
        for number in range(7):
            log.started(make_plan(number, seed=number))
            log.epoch(decided(number, number / 10, goes_on=False), seconds=1.0, key_class_sensitivity=None)
            log.ended(number)
        log.started(make_plan(7, seed=7))

    assert [trial.number for trial in view._in_sight()] == [7, 6, 5]


def test_elsewhere_than_in_a_terminal_each_end_is_a_line(tmp_path, make_header, make_plan):
    lines = []
    with open_journal(tmp_path, make_header()) as journal:
        log = SearchLog(make_header(), journal, lambda event: lines.append(line_of(event)))
        log.started(make_plan(0))
        log.epoch(decided(0, 0.42, goes_on=False), seconds=1.0, key_class_sensitivity=None)
        log.ended(0)
        log.started(make_plan(1, **{"optimizer.name": "adam"}))
        log.failed(1, kind="DivergedError", message="the loss is not finite", lost=False)

    assert [line for line in lines if line] == [
        "trial 0 stopped after 1 epochs: 0.420, the given settings; 1 of 3 done; best so far 0.420 (trial 0)",
        "trial 1 failed after 0 epochs: the loss is not finite, optimizer adam; 2 of 3 done; "
        "best so far 0.420 (trial 0)",
    ]


def test_the_figures_stand_beside_the_published_ones():
    def row(name, published, metric, **figures):
        measured = dict.fromkeys(
            ("trial", "max_train_images", "best_epoch", "balanced_accuracy", "balanced_accuracy_ci", "accuracy",
             "accuracy_ci", "macro_f1", "macro_f1_ci", "difference", "failure")
        )  # fmt: skip
        fixed = {"table": "4.1", "model": "custom_cnn", "side_px": 32, "epochs": 2}
        return fixed | measured | figures | {"name": name, "published": published, "metric": metric}

    tried = {"accuracy": 0.75, "accuracy_ci": (0.7, 0.8), "balanced_accuracy": 0.5, "balanced_accuracy_ci": (0.4, 0.6)}
    rows = [row("adam", 0.701, "accuracy", **tried), row("sgd", 0.6, "macro_f1"), row("none", None, "accuracy")]
    compared = Comparison.model_validate({"rows": [*rows, rows[0]], "groups": 9, "why_different": ()})
    lines = [line.split("  ") for line in draw(comparison_table(compared)).splitlines()[3:]]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]

    assert cells == [
        ["adam", "0.500 (0.400-0.600)", "0.750 (0.700-0.800)", "0.701"],
        ["sgd", "-", "-", "0.600 macro f1"],
        ["none", "-", "-", "-"],
    ]


def test_the_live_view_of_a_search_without_a_score(tmp_path, make_header, make_plan):
    view = SearchView()
    with open_journal(tmp_path, make_header()) as journal:
        SearchLog(make_header(), journal, view.update).started(make_plan(0))
    text = " ".join(draw(view).split())

    assert "0 of 3 trials done, 0 of at most 6 epochs" in text
    assert " left" not in text
    assert "best so far" not in text


def test_a_search_that_scored_nothing_has_a_report_without_curves(tmp_path, make_header, make_trial):
    failed = make_trial(0, [], "failed", error="not finite", error_kind="DivergedError")
    with open_journal(tmp_path, make_header()) as journal:
        journal.write("ended", trial=failed.model_dump(mode="json"))
    report = report_on(tmp_path)

    assert "No trial was scored." in draw(search_summary(*read_journal(tmp_path)))
    assert "not finite" in write_report(report, tmp_path).read_text()


def test_small_parts():
    assert describe({}) == "the given settings"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
