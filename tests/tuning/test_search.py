"""A real search on generated pictures, under a real Ray."""

import json

import pytest
import typer
from typer.testing import CliRunner

from records.command import RAY_STARTER
from records.errors import ContractError, DivergedError, RefusedError, RelookError
from records.types import Side
from trainers.data.cache import PixelCache
from tuning.cli import app as tuning_app
from tuning.journal import FILE_NAME, read_journal
from tuning.report import report_on
from tuning.search import _first_error, search
from tuning.settings import Axis
from tuning.trials import EventKind, Origin, TrialState


@pytest.fixture(scope="session")
def searched(ray_session, labelled, trainers, tuning, diverging, tmp_path_factory):
    """One search of four trials, the second of which diverges: (run folder, result, events)."""
    store, dataset = labelled
    run_dir, events = tmp_path_factory.mktemp("searched") / "run", []
    result = search(store, tuning, trainers, dataset, run_dir=run_dir, on_event=events.append, enqueued=[diverging])
    return run_dir, result, events


def test_every_trial_is_accounted_for(searched, tuning):
    _, result, _ = searched

    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]
    assert [trial.origin for trial in result.trials] == [Origin.DEFAULTS, Origin.ENQUEUED, *[Origin.SAMPLED] * 2]
    assert all(1 <= trial.epochs <= tuning.trial_epochs for trial in result.trials if trial.number != 1)


def test_a_diverging_trial_is_recorded_and_does_not_end_the_search(searched):
    _, result, _ = searched
    failed = result.trials[1]

    assert (failed.state, failed.error_kind) == (TrialState.FAILED, "DivergedError")
    assert failed.error
    assert all(trial.state in ("finished", "stopped") for trial in result.trials if trial.number != 1)


def test_the_winner_is_never_worse_than_the_given_settings(searched, trainers, tuning):
    _, result, _ = searched
    given = result.trials[0]

    assert given.epochs == tuning.trial_epochs
    assert result.best.score >= given.score
    assert result.best.score == max(trial.score for trial in result.trials if trial.scores)
    assert result.settings == trainers.model_copy(update=result.best.overrides)
    assert result.settings.epochs == trainers.epochs


def test_only_train_and_val_were_read(searched, labelled):
    """The other sides' bytes are gone, so reading one would have failed; nor are they in the cache."""
    store, dataset = labelled
    header = searched[1].header
    cache = PixelCache(store.home.cache, 32)

    assert len(cache) == header.train_images + header.val_images
    assert header.train_images == len(dataset.side(Side.TRAIN))
    assert not cache.missing([*dataset.side(Side.TRAIN)["image_id"], *dataset.side(Side.VAL)["image_id"]])


def test_the_journal_holds_what_the_result_says(searched):
    run_dir, result, _ = searched

    assert read_journal(run_dir) == (result.header, list(result.trials))


def test_events_tell_the_whole_story(searched):
    _, result, events = searched
    last = events[-1]

    assert {event.trial.number for event in events if event.kind is EventKind.STARTED} == {0, 1, 2, 3}
    assert (last.trials_done, last.trials_total) == (4, 4)
    assert last.best == result.best
    assert last.epochs_done == sum(trial.epochs for trial in result.trials)


def test_a_trial_that_finds_a_process_ready_starts_much_faster(searched):
    run_dir, result, _ = searched
    cold = [trial.start_seconds for trial in result.trials if trial.cold_start]

    assert 1 <= len(cold) <= 2
    assert report_on(run_dir).start_seconds_median < min(cold) / 2


def test_tensorboard_logs_are_kept(searched):
    assert list(searched[0].glob("ray-*/trial-0000-*/events.out.tfevents.*"))


def test_going_on_runs_only_what_is_not_settled(searched, labelled, trainers, tuning, diverging, tmp_path):
    """Cut the end of trial 3 off, as a kill would have, and go on."""
    (run_dir, result, _), (store, dataset) = searched, labelled
    events = []
    lines = (run_dir / FILE_NAME).read_text().splitlines(keepends=True)
    is_end_of_3 = [json.loads(line).get("trial", {}).get("number") == 3 and '"ended"' in line for line in lines]
    kept = [line for line, drop in zip(lines, is_end_of_3, strict=True) if not drop]
    (tmp_path / FILE_NAME).write_text("".join(kept))

    again = search(store, tuning, trainers, dataset, run_dir=tmp_path, on_event=events.append, enqueued=[diverging])

    assert [event.trial.number for event in events if event.kind is EventKind.KEPT] == [0, 1, 2]
    assert [event.trial.number for event in events if event.kind is EventKind.STARTED] == [3]
    assert again.trials[:3] == result.trials[:3]
    assert again.trials[3].overrides == result.trials[3].overrides
    assert again.trials[3].scores[0] == result.trials[3].scores[0]


def test_another_search_does_not_go_on_in_its_folder(searched, labelled, trainers, tuning):
    store, dataset = labelled
    other = trainers.model_copy(update={"batch_size": 16})

    with pytest.raises(RefusedError, match=r"another base\.batch_size \(32, now 16\)"):
        search(store, tuning, other, dataset, run_dir=searched[0])


def test_when_every_trial_fails_the_first_ones_error_is_raised(ray_session, labelled, diverging, tuning, tmp_path):
    store, dataset = labelled
    scheduler_only = tuning.model_copy(update={"trials": 2, "search": (Axis.SCHEDULER,), "max_concurrent": 1})

    with pytest.raises(DivergedError, match="all 2 trials failed; the first one's reason: "):
        search(store, scheduler_only, diverging, dataset, run_dir=tmp_path / "run")

    assert [failure["number"] for failure in report_on(tmp_path / "run").failures] == [0, 1]


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("DivergedError", DivergedError, "all 1 trials failed; the first one's reason: too steep"),
        ("ValueError", RelookError, "all 1 trials failed; the first one's reason: ValueError: too steep"),
        ("LABEL_RANK", RelookError, "all 1 trials failed; the first one's reason: LABEL_RANK: too steep"),
    ],
)
def test_an_error_keeps_its_class_where_it_is_ours(make_trial, kind, raised, message):
    error = _first_error([make_trial(0), make_trial(1, [], "failed", error="too steep", error_kind=kind)])

    assert (type(error), str(error)) == (raised, message)


def test_rows_of_another_side_never_reach_a_trial(labelled, trainers, tuning, tmp_path):
    store, dataset = labelled

    class Leaky(type(dataset)):
        def side(self, side):
            return super().side(Side.GATE if side is Side.VAL else side)

    leaky = Leaky(dataset.id, dataset.taxonomy_hash, dataset.rows)
    with pytest.raises(ContractError, match=r"a search may read train and val only, .* is on side gate"):
        search(store, tuning, trainers, leaky, run_dir=tmp_path / "run")


@pytest.fixture
def relook(searched, labelled, trainers, tuning):
    """The room's verbs under a root command like the real one, with the Ray that is running."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    store, _ = labelled
    root = typer.Typer()

    @root.callback()
    def prepare(ctx: typer.Context) -> None:
        ctx.obj = lambda config, preset, sets: SimpleNamespace(records=store.settings, tuning=tuning, trainers=trainers)
        ctx.meta[RAY_STARTER] = lambda settings: nullcontext()

    root.add_typer(tuning_app)
    return lambda *arguments: CliRunner().invoke(root, list(arguments), catch_exceptions=False)


def test_the_verb_searches_reports_and_goes_on(relook, labelled):
    first = relook("tune", "--trials", "1", "--json")
    report = json.loads(first.stdout)
    resumed = json.loads(relook("tune", "--trials", "1", "--resume", "--json").stdout)
    shown = relook("tune", "report", "--json")

    assert first.exit_code == 0
    assert [row["number"] for row in report["leaderboard"]] == [0]
    assert report["complete"]
    assert resumed["leaderboard"] == report["leaderboard"]
    assert json.loads(shown.stdout)["run"] == report["run"]
    assert "the given settings" in relook("tune", "report").stdout


def test_the_verb_refuses_no_trials(relook):
    assert relook("tune", "--trials", "0").exit_code == 2
