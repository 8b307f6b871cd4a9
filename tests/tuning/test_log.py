"""The book of a running search: states, the leader, what is told and in which order."""

import pytest

from tuning.journal import open_journal, read_journal
from tuning.log import SearchLog, best_of
from tuning.trials import Decision, EventKind, TrialState


@pytest.fixture
def events():
    return []


@pytest.fixture
def log(tmp_path, make_header, events):
    with open_journal(tmp_path, make_header()) as journal:
        yield SearchLog(make_header(), journal, events.append)


def epoch(log, number, score, goes_on=True, sensitivity=0.5):
    done = next((trial.epochs for trial in log.trials if trial.number == number), 0)
    decision = Decision(number=number, epoch=done + 1, score=score, rung=None, cutoff=None, goes_on=goes_on)
    log.epoch(decision, seconds=1.5, key_class_sensitivity=sensitivity)


def test_a_trial_that_had_all_its_epochs_is_finished(log, make_plan, tmp_path):
    log.started(make_plan(0))
    epoch(log, 0, 0.3)
    epoch(log, 0, 0.2, sensitivity=0.9)
    log.ended(0)

    (trial,) = log.trials
    assert trial.state is TrialState.FINISHED
    assert (trial.scores, trial.score, trial.epochs) == ((0.3, 0.2), 0.3, 2)
    assert trial.key_class_sensitivity == 0.5
    assert trial.epoch_seconds == (1.5, 1.5)
    assert read_journal(tmp_path)[1] == log.trials


def test_a_trial_that_was_cut_off_is_stopped(log, make_plan):
    log.started(make_plan(1))
    epoch(log, 1, 0.1, goes_on=False)
    log.ended(1)

    assert log.trials[0].state is TrialState.STOPPED


def test_a_failed_trial_is_recorded_with_its_reason_and_ends_once(log, make_plan, events):
    log.started(make_plan(1))
    log.failed(1, kind="DivergedError", message="the loss is not finite", lost=False)
    log.ended(1)

    (trial,) = log.trials
    assert (trial.state, trial.error_kind, trial.error) == ("failed", "DivergedError", "the loss is not finite")
    assert [event.kind for event in events] == [EventKind.STARTED, EventKind.FAILED]


def test_events_count_what_is_done_and_what_is_left(log, make_plan, events):
    log.started(make_plan(0))
    epoch(log, 0, 0.3)
    epoch(log, 0, 0.4)
    log.ended(0)
    log.started(make_plan(1))
    epoch(log, 1, 0.35, goes_on=False)
    log.ended(1)

    last = events[-1]
    assert (last.kind, last.trials_done, last.trials_total) == (EventKind.STOPPED, 2, 3)
    assert (last.epochs_done, last.epochs_budget) == (3, 6)
    assert last.best is not None
    assert last.best.number == 0
    assert [event.best and event.best.score for event in events] == [None, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]


def test_settled_trials_of_an_earlier_run_are_told_first(tmp_path, make_header, make_plan, events):
    with open_journal(tmp_path, make_header()) as journal:
        before = SearchLog(make_header(), journal)
        before.started(make_plan(0))
        epoch(before, 0, 0.3)
        before.ended(0)
    with open_journal(tmp_path, make_header()) as journal:
        log = SearchLog(make_header(), journal, events.append)
        log.kept()

    assert [(event.kind, event.trial.number) for event in events] == [(EventKind.KEPT, 0)]
    assert log.trials == before.trials


def test_a_start_is_measured_from_the_moment_the_slot_was_free(log, make_plan):
    log.started(make_plan(0))
    first = log.trials[0]
    log.began(0, at=log._started_at + 4.0, process="a:1")
    epoch(log, 0, 0.3, goes_on=False)
    log.ended(0)
    log.started(make_plan(1))
    log.began(1, at=log._due_at[1] + 0.25, process="a:1")
    log.began(1, at=log._started_at + 99.0, process="a:1")

    assert first.start_seconds is None
    assert [trial.start_seconds for trial in log.trials] == pytest.approx([4.0, 0.25])
    assert [trial.cold_start for trial in log.trials] == [True, False]


@pytest.mark.parametrize(
    ("trials", "winner"),
    [
        ([(0, [0.5]), (1, [0.6, 0.4]), (2, [0.55])], 1),
        ([(0, [0.6]), (1, [0.6])], 0),
        ([(0, [0.5]), (1, [0.9], "failed"), (2, [0.9], "lost"), (3, [0.9], "running")], 0),
        ([(0, []), (1, [0.1], "stopped")], 1),
        ([(0, [], "failed")], None),
        ([], None),
    ],
)
def test_the_winner(make_trial, trials, winner):
    best = best_of(make_trial(*trial) for trial in trials)

    assert (best and best.number) == winner
