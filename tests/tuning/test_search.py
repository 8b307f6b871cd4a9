"""A real search on generated images, under a real Ray."""

import json

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from images.cache import PixelCache
from records.command import RAY_STARTER
from records.errors import ConfigError, ContractError, DivergedError, RefusedError, RelookError
from records.frames import Frame
from records.types import Split
from tuning.cli import app as tuning_app
from tuning.journal import FILE_NAME, read_journal
from tuning.report import report_on
from tuning.search import _first_error, require_search_rows, search
from tuning.settings import TuningSettings
from tuning.trials import EventKind, Origin


@pytest.fixture(scope="session")
def searched(ray_session, labelled, trainers, tuning):
    """One search of four trials: (run folder, result, events)."""
    store, dataset = labelled
    run_dir, events = store.home.runs / "tune-0", []
    result = search(store, tuning, trainers, dataset, run_dir=run_dir, on_event=events.append)
    return run_dir, result, events


def test_every_trial_is_accounted_for(searched, tuning):
    _, result, _ = searched

    assert [trial.number for trial in result.trials] == [0, 1, 2, 3]
    assert [trial.origin for trial in result.trials] == [Origin.DEFAULTS, *[Origin.SAMPLED] * 3]
    assert all(1 <= trial.epochs <= tuning.trial_epochs for trial in result.trials)
    assert all(trial.state in ("finished", "stopped") for trial in result.trials)


def test_the_winner_is_never_worse_than_the_given_settings(searched, trainers, tuning):
    _, result, _ = searched
    given = result.trials[0]

    assert given.epochs == tuning.trial_epochs
    assert result.best.score >= given.score
    assert result.best.score == max(trial.score for trial in result.trials if trial.scores)
    assert result.settings == trainers.with_values(result.best.overrides)
    assert result.settings.epochs == trainers.epochs


def test_a_whole_trial_has_figures_with_intervals(searched):
    _, result, _ = searched
    for trial in result.trials:
        assert (trial.figures is not None) == (trial.state == "finished")
    figures = result.trials[0].figures
    assert figures.balanced_accuracy == pytest.approx(result.trials[0].score, abs=1e-6)
    assert figures.balanced_accuracy_ci[0] <= figures.balanced_accuracy <= figures.balanced_accuracy_ci[1]


def test_only_train_and_val_were_read(searched, labelled):
    """The other splits' bytes are gone, so reading one would have failed; nor are they in the cache."""
    store, dataset = labelled
    header = searched[1].header
    cache = PixelCache(store.home.cache, Frame(32))

    assert len(cache) == header.train_images + header.val_images
    assert header.train_images == len(dataset.split(Split.TRAIN))
    assert not cache.missing([*dataset.split(Split.TRAIN)["image_id"], *dataset.split(Split.VAL)["image_id"]])


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

    assert [trial.cold_start for trial in result.trials] == [True, False, False, False]
    assert report_on(run_dir).start_seconds_median < result.trials[0].start_seconds / 2


def test_tensorboard_logs_are_kept(searched):
    assert list(searched[0].glob("ray-*/trial-0000-*/events.out.tfevents.*"))


def test_another_search_does_not_go_on_in_its_folder(searched, labelled, trainers, tuning):
    store, dataset = labelled
    other = trainers.model_copy(update={"batch_size": 16})

    with pytest.raises(RefusedError, match=r"another trainers\.batch_size \(32, now 16\)"):
        search(store, tuning, other, dataset, run_dir=searched[0])


@pytest.mark.soak
def test_when_every_trial_fails_the_first_ones_error_is_raised(ray_session, labelled, diverging, tuning, tmp_path):
    store, dataset = labelled
    two = tuning.model_copy(update={"trials": 2})
    steeper = diverging.with_values({"optimizer.momentum": 0.95})

    with pytest.raises(DivergedError, match="all 2 trials failed; the first one's reason: "):
        search(store, two, diverging, dataset, run_dir=tmp_path, enqueued=[steeper])

    report, (_, trials) = report_on(tmp_path), read_journal(tmp_path)
    assert [failure["number"] for failure in report.failures] == [0, 1]
    assert [trial.origin for trial in trials] == [Origin.DEFAULTS, Origin.ENQUEUED]
    assert trials[1].overrides == {"optimizer.momentum": 0.95}
    assert [trial.cold_start for trial in trials] == [True, False]


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


def test_rows_of_another_split_never_reach_a_trial(labelled, trainers, tuning, tmp_path):
    store, dataset = labelled

    class Leaky(type(dataset)):
        def split(self, split):
            return super().split(Split.GATE if split is Split.VAL else split)

    leaky = Leaky(dataset.id, dataset.taxonomy_hash, dataset.rows)
    with pytest.raises(ContractError, match=r"a search may read train and val only, .* is on split gate"):
        search(store, tuning, trainers, leaky, run_dir=tmp_path / "run")


@pytest.fixture
def relook(searched, labelled, trainers):
    """The room's verbs under a root command like the real one, with the Ray that is running."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    store, _ = labelled
    root = typer.Typer()

    @root.callback()
    def prepare(ctx: typer.Context) -> None:
        # Others than those of the search: what goes on takes its settings from the journal.
        today = {
            "tuning": TuningSettings(),
            "trainers": trainers.with_values({"epochs": 9, "seed": 4}),
            "tracking": None,
        }
        ctx.obj = lambda config, preset, sets: SimpleNamespace(records=store.settings, **today)
        ctx.meta[RAY_STARTER] = lambda settings: nullcontext()

    root.add_typer(tuning_app)
    return lambda *arguments: CliRunner().invoke(root, list(arguments), catch_exceptions=False)


def test_the_verb_goes_on_and_runs_only_what_is_not_settled(relook, searched, labelled):
    """Cut trial 3 off after its first epoch, as a kill would have, and go on."""
    (run_dir, result, _), (store, _) = searched, labelled
    killed = store.home.runs / "tune-killed"
    killed.mkdir()
    lines = (run_dir / FILE_NAME).read_text().splitlines(keepends=True)
    of_3 = [at for at, line in enumerate(lines) if json.loads(line).get("trial", {}).get("number") == 3]
    (killed / FILE_NAME).write_text("".join(lines[: of_3[1] + 1]))

    resumed = relook("tune", "--resume", "--no-fit", "--json")
    before, (_, after) = json.loads(relook("tune", "report", "--run", "tune-0", "--json").stdout), read_journal(killed)

    assert resumed.exit_code == 0
    assert json.loads(resumed.stdout)["run"] == "tune-killed"
    assert json.loads(resumed.stdout)["best"] == before["best"]
    assert after[:3] == list(result.trials[:3])
    assert (after[3].overrides, after[3].cold_start) == (result.trials[3].overrides, True)
    assert after[3].scores[0] == result.trials[3].scores[0]
    assert resumed.stderr.count("kept") == 3
    assert "relook train --data" in resumed.stderr
    assert "search tune-killed goes on: 4 trials" in resumed.stderr


def test_a_resumed_search_with_another_searcher_is_refused(relook):
    with pytest.raises(RefusedError, match=r"tuning\.searcher 'tpe' contradicts the search in .*tune-0"):
        relook("tune", "--resume", "--run", "tune-0", "--searcher", "tpe")


def test_the_verb_shows_the_last_search_to_a_person(relook):
    shown = relook("tune", "report")

    assert shown.exit_code == 0
    assert "the given settings" in shown.stdout


def test_the_verb_refuses_no_trials(relook):
    with pytest.raises(ConfigError, match=r"tuning\.trials cannot be 0"):
        relook("tune", "--trials", "0")


def rows(groups_per_class: dict[str, int], images_per_group: int = 2, split: Split = Split.TRAIN) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "image_id": f"{label}-{group}-{image}",
                "group_id": f"{label}-{group}",
                "label": label,
                "split": split.value,
            }
            for label, count in groups_per_class.items()
            for group in range(count)
            for image in range(images_per_group)
        ]
    )


ROWS = rows({"nv": 6, "mel": 3, "df": 1})


@pytest.mark.parametrize("split", [Split.CALIBRATION, Split.GATE, Split.TEST])
def test_rows_of_other_splits_are_refused(split):
    foreign = rows({"nv": 1}, split=split)

    with pytest.raises(ContractError, match=f"a search may read train and val only, .* is on split {split.value}"):
        require_search_rows(pd.concat([ROWS, foreign], ignore_index=True))


def test_train_and_val_rows_pass():
    require_search_rows(pd.concat([ROWS, rows({"nv": 1}, split=Split.VAL)], ignore_index=True))
