"""The journal: nothing is lost, a torn line is dropped, another search is refused."""

import json

import pytest

from records.errors import ConfigError, IntegrityError, RefusedError, UnknownIdError
from trainers.settings import TrainersSettings
from tuning.journal import FILE_NAME, open_journal, read_journal
from tuning.log import SearchLog
from tuning.trials import Decision, GenerationStep, Origin, TrialPlan


def write(journal, trial, kind="ended"):
    journal.write(kind, trial=trial.model_dump(mode="json"))


def test_what_was_written_is_read_back(tmp_path, make_header, make_trial):
    header, trials = make_header(), [make_trial(0, [0.2, 0.4]), make_trial(1, [0.1], "stopped")]
    with open_journal(tmp_path / "run", header) as journal:
        for trial in trials:
            write(journal, trial)

    assert read_journal(tmp_path / "run") == (header, trials)


def test_the_last_word_about_a_trial_counts(tmp_path, make_header, make_trial):
    with open_journal(tmp_path, make_header()) as journal:
        write(journal, make_trial(0, [0.9], "running"), "epoch")
        write(journal, make_trial(0, [], "running"), "started")
        write(journal, make_trial(0, [0.3, 0.5]))

    assert read_journal(tmp_path)[1] == [make_trial(0, [0.3, 0.5])]


def test_going_on_keeps_settled_trials_only(tmp_path, make_header, make_trial):
    states = ["finished", "stopped", "failed", "lost", "running"]
    with open_journal(tmp_path, make_header(trials=5)) as journal:
        for number, state in enumerate(states):
            write(journal, make_trial(number, [0.1], state))

    with open_journal(tmp_path, make_header(trials=5)) as journal:
        assert sorted(journal.settled) == [0, 1, 2]


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path, make_header, make_trial):
    with open_journal(tmp_path, make_header()) as journal:
        write(journal, make_trial(0, [0.2]))
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write('{"kind":"ended","trial":{"num')

    assert [trial.number for trial in read_journal(tmp_path)[1]] == [0]
    with open_journal(tmp_path, make_header()) as journal:
        write(journal, make_trial(1, [0.3]))
    assert [trial.number for trial in read_journal(tmp_path)[1]] == [0, 1]


def test_a_last_line_of_zeros_is_dropped(tmp_path, make_header, make_trial):
    """After a power cut, blocks that never reached the disk read as zeros."""
    with open_journal(tmp_path, make_header()) as journal:
        write(journal, make_trial(0, [0.2]))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"kind":"en' + bytes(9) + b"\n")
    with open_journal(tmp_path, make_header()) as journal:
        assert sorted(journal.settled) == [0]
    assert b"\0" not in (tmp_path / FILE_NAME).read_bytes()


def test_a_kill_between_the_last_decision_and_the_end_of_a_trial_ends_it(tmp_path, make_header, make_trial):
    with open_journal(tmp_path, make_header()) as journal:
        for number, (scores, goes_on) in enumerate((([0.3, 0.5], True), ([0.1], False), ([0.2], True))):
            epoch = len(scores)
            decision = Decision(number=number, epoch=epoch, score=scores[-1], rung=None, cutoff=None, goes_on=goes_on)
            trial = make_trial(number, scores, "running").model_dump(mode="json")
            journal.write("epoch", trial=trial, decision=decision.model_dump(mode="json"))

    with open_journal(tmp_path, make_header()) as journal:
        assert sorted(journal.settled) == [0, 1], "the third was to go on"
    assert [trial.state for trial in read_journal(tmp_path)[1]] == ["finished", "stopped", "running"]


@pytest.mark.parametrize(
    "line", ["not json", '{"kind":"ended"}', '{"kind":"ended","trial":{"number":-1}}', '["kind"]', '{"trial":{}}']
)
def test_any_other_damage_names_the_line(tmp_path, make_header, line):
    open_journal(tmp_path, make_header()).close()
    with (tmp_path / FILE_NAME).open("a") as file:
        file.write(line + "\n")

    with pytest.raises(IntegrityError, match=r"line 2 of .* is damaged"):
        read_journal(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"another tuning.seed \(0, now 1\)"),
        ({"dataset_id": "e" * 64}, "another dataset_id"),
        ({"base": {"optimizer.name": "adam"}}, r"another trainers.optimizer.name \('sgd', now 'adam'\)"),
        ({"space_hash": "6" * 64}, "another space_hash"),
    ],
)
def test_another_search_is_refused(tmp_path, make_header, change, message):
    open_journal(tmp_path, make_header()).close()

    with pytest.raises(RefusedError, match=message):
        open_journal(tmp_path, make_header(**change))


@pytest.mark.parametrize(("gamma", "same"), [(0.3, True), (0.5, False)])
def test_a_setting_that_is_newer_than_the_search_had_its_default(tmp_path, make_header, gamma, same):
    header = make_header()
    assert "scheduler.gamma" not in header.base
    assert TrainersSettings().scheduler.gamma == 0.3
    open_journal(tmp_path, header).close()
    today = make_header(base=header.base | {"scheduler.gamma": gamma})

    if same:
        open_journal(tmp_path, today).close()
        assert read_journal(tmp_path)[0] == today
    else:
        with pytest.raises(RefusedError, match=r"another trainers.scheduler.gamma \(0.3, now 0.5\)"):
            open_journal(tmp_path, today)


def test_a_search_may_be_asked_for_more_trials(tmp_path, make_header):
    open_journal(tmp_path, make_header()).close()
    open_journal(tmp_path, make_header(trials=9)).close()

    assert read_journal(tmp_path)[0].trials == 9


def test_every_line_is_one_json_object_on_disk_at_once(tmp_path, make_header, make_trial):
    with open_journal(tmp_path, make_header()) as journal:
        write(journal, make_trial(0, [0.25], "running"), "epoch")
        lines = (tmp_path / FILE_NAME).read_text().splitlines()

    assert [json.loads(line)["kind"] for line in lines] == ["search", "epoch"]


def test_a_folder_without_a_search(tmp_path):
    with pytest.raises(UnknownIdError, match="holds no search"):
        read_journal(tmp_path)
    (tmp_path / FILE_NAME).write_text("")
    with pytest.raises(UnknownIdError, match="holds no search"):
        read_journal(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path, make_header):
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="cannot be written"):
        open_journal(tmp_path / "file" / "run", make_header())


def test_a_generation_is_one_line_and_changes_its_trials(tmp_path, make_header, make_trial):
    header = make_header(generation_epochs=1)
    generations = [
        GenerationStep(number=0, epoch=1, score=0.5, parent=0, parent_overrides={}, overrides={}),
        GenerationStep(
            number=1, epoch=1, score=0.2, parent=0, parent_overrides={}, overrides={"optimizer.momentum": 0.8}
        ),
    ]
    with open_journal(tmp_path, header) as journal:
        log = SearchLog(header, journal)
        for number, score in ((0, 0.5), (1, 0.2)):
            log.started(TrialPlan(number=number, origin=Origin.SAMPLED, overrides={}, until_epoch=1))
            decision = Decision(number=number, epoch=1, score=score, rung=None, cutoff=None, goes_on=True)
            log.epoch(decision, seconds=1.0, key_class_sensitivity=None)
            log.waits(number)
        log.generation(generations)

    with open_journal(tmp_path, header) as journal:
        assert journal.generations == generations
        assert [(trial.state, trial.scores) for trial in journal.past.values()] == [("running", (0.5,))] * 2
        assert journal.past[1].overrides == {"optimizer.momentum": 0.8}
        assert journal.settled == {}
    lines = [json.loads(line) for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert [line["kind"] for line in lines].count("generation") == 1
