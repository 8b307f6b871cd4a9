"""Running trials under a real Ray, with a trial function of a few lines in place of the training."""

import inspect
import os
import signal
import time

import pytest

from records.errors import ConfigError
from tuning.journal import open_journal, read_journal
from tuning.judge import Judge, rule_of
from tuning.log import SearchLog
from tuning.ray_search import run_trials
from tuning.settings import TuningSettings
from tuning.trials import EventKind

ONE_AT_A_TIME = TuningSettings(
    trials=4, trial_epochs=4, grace_epochs=1, reduction_factor=2, max_concurrent=1, max_failures=0
)


def train_by_table(plan, data, report):
    """Report the score that the table has for this trial, once per epoch; a text is something that goes wrong."""
    if data[plan.number] == "die":
        os._exit(9)
    if data[plan.number] == "raise":
        raise ValueError("no such luck")
    for epoch in range(1, 5):
        time.sleep(0.01)
        report(
            {"epoch": epoch, "val_balanced_accuracy": data[plan.number], "seconds": 0.01, "key_class_sensitivity": None}
        )


@pytest.fixture
def run(ray_session, tmp_path, make_header, make_plan):
    """Runs numbered trials with a table of scores; returns the trials."""

    def run(order, table, on_event=None, tuning=ONE_AT_A_TIME):
        header = make_header(trials=4, trial_epochs=4)
        with open_journal(tmp_path, header) as journal:
            log = SearchLog(header, journal, on_event)
            judge = Judge(rule_of(header), 4, lambda number: number == 0, journal.decisions)
            plans = [make_plan(number) for number in order]
            run_trials(plans, by_value(train_by_table), table, judge=judge, tuning=tuning, log=log, folder=tmp_path)
        return {trial.number: trial for trial in log.trials}

    return run


def by_value(function):
    """Return a copy that is sent as code: the workers cannot import test modules."""
    source, name = f"import os, time\n{inspect.getsource(function)}", function.__name__

    def call(plan, data, report):
        scope = {}
        exec(source, scope)
        scope[name](plan, data, report)

    return call


def test_halving_by_hand(run, capfd):
    """Factor 2, rungs after epochs 1, 2 and 4.

    Trial 1 (0.6) comes first and goes on. Trial 0 (0.5) is below it, but the given settings get their whole budget.
    Trial 2 (0.4) is below the median 0.55 at rung 1. Trial 3 (0.52) is above the median 0.5 of (0.6, 0.5, 0.4)
    there and below the median 0.55 of (0.6, 0.5) at rung 2.
    """
    trials = run([1, 0, 2, 3], [0.5, 0.6, 0.4, 0.52])

    assert {number: (trial.state, trial.epochs) for number, trial in trials.items()} == {
        0: ("finished", 4),
        1: ("finished", 4),
        2: ("stopped", 1),
        3: ("stopped", 2),
    }
    assert capfd.readouterr() == ("", "")


def test_failures_are_recorded_and_the_rest_runs(run):
    """A trial that raises leaves its process to the next one; a process that dies is replaced."""
    trials = run([0, 1, 2, 3], ["raise", 0.4, "die", 0.6])

    assert [trial.state for trial in trials.values()] == ["failed", "finished", "lost", "finished"]
    assert (trials[0].error_kind, trials[0].error) == ("ValueError", "no such luck")
    assert trials[2].error
    assert [trials[number].cold_start for number in (0, 1, 3)] == [True, False, True]
    assert trials[1].start_seconds < trials[0].start_seconds / 2


def test_what_a_listener_raises_ends_the_search(run, tmp_path):
    def listen(event):
        if event.kind is EventKind.EPOCH:
            raise LookupError("enough")

    with pytest.raises(LookupError, match="enough"):
        run([0, 1], [0.5, 0.6], on_event=listen)

    assert [(trial.number, trial.state) for trial in read_journal(tmp_path)[1]] == [(0, "running")]


def test_ctrl_c_stops_the_trials_and_the_search_goes_on_with_its_rungs(run, tmp_path):
    """Interrupted after trial 2, the second run decides about trial 3 what the one by hand decides."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1), dict(os.environ)
    table = [0.5, 0.6, 0.4, 0.52]

    def interrupt(event):
        if event.kind is EventKind.STOPPED:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run([1, 0, 2, 3], table, on_event=interrupt)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1), dict(os.environ)) == before
    assert [trial.state for trial in read_journal(tmp_path)[1]] == ["finished", "finished", "stopped"]

    trials = run([3], table)

    assert (trials[3].state, trials[3].epochs) == ("stopped", 2)
    assert sorted(trials) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpus_per_trial": 512}, r"tuning.cpus_per_trial is 512 but this Ray session has 4 CPUs; set it to at most 4"),
        ({"gpus_per_trial": 1}, r"tuning.gpus_per_trial is 1 but this Ray session has 0 GPUs"),
    ],
)
def test_a_trial_that_could_never_start_is_refused(run, changes, message):
    with pytest.raises(ConfigError, match=message):
        run([0], [0.5], tuning=ONE_AT_A_TIME.model_copy(update=changes))
