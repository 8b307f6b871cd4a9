"""A search: plan the trials, run them on train and val, confirm the leader, return the winner by validation.

In: a store, settings, a dataset version and a running Ray session. Out: a SearchResult and the journal in the run's
folder; an unfinished journal is resumed. A search sees rows of train and val only. `fit_winner` trains the winner's
settings afterwards, with the full budget and calibrated; only then calibration rows are read.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pandas as pd
from rich.progress import Progress

from images.grouping import grouped_subset
from records.bundles import Bundle
from records.datasets import DatasetVersion
from records.errors import ConfigError, ContractError, DataError, RelookError, error_class
from records.ids import new_id
from records.lease import LEASE_S, hold
from records.store import Store
from records.types import Split
from trainers.augmentation import load_policy
from trainers.augmentation.registry import YAML_SUFFIXES
from trainers.fitting.pretend import leaky_plan
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.optimization.strategies import strategy_of
from trainers.settings import MACHINERY, TrainersSettings, flat_values
from trainers.tracking.server import Tracked
from trainers.tracking.settings import TrackingSettings
from tuning.confirm import FIRST_NUMBER, confirmation_plans, verdict_on
from tuning.experiments import experiment_settings
from tuning.journal import Journal, open_journal
from tuning.judge import Judge, rule_of
from tuning.log import Listener, SearchLog, best_of
from tuning.narrow import narrow, read_space
from tuning.planner import Planner
from tuning.population import Population
from tuning.report import RUN_PREFIX, find_resumable
from tuning.settings import Scheduler, Searcher, TuningSettings
from tuning.space import SearchSpace, axes_of, derive_space, difference, with_overrides
from tuning.trial import TrialJob, run_trial, trial_folder
from tuning.trials import GenerationStep, SearchEvent, SearchHeader, SearchResult, TrialPlan, TrialResult, trial_budget


def search(
    store: Store,
    tuning: TuningSettings,
    trainers: TrainersSettings,
    dataset: DatasetVersion,
    *,
    run_dir: Path,
    on_event: Listener | None = None,
    enqueued: Sequence[TrainersSettings] = (),
    progress: Progress | None = None,
) -> SearchResult:
    """Search for better settings than the given ones, on the Ray session that is running.

    The given settings are trial 0 with the full budget, so the winner is never worse than they are on validation.

    Args:
        store: holds the images.
        tuning: budget, resources, what is varied.
        trainers: the given settings.
        dataset: its train and val splits are read, no other.
        run_dir: keeps the journal; if it holds the journal of this very search, settled trials are not run again.
        on_event: called with every event; an error that it raises ends the search and is raised here.
        enqueued: settings to try right after the given ones, for example earlier winners.
        progress: shows the decoding of images that are not cached yet.
    Returns:
        All trials and the winner.
    Raises:
        RefusedError: `run_dir` holds another search.
        ConfigError: settings, space or folder cannot work, or one trial needs more than the Ray session has.
        DataError: train or val is empty.
        ContractError: no Ray session is running.
        RelookError: every trial failed; it is the first one's error.
        KeyboardInterrupt: Ctrl-C, after the trials were stopped; the journal can be resumed.
    """
    from tuning.ray_search import run_trials  # planning and reporting need no Ray; its import takes a second

    space = searched_space(tuning, trainers)
    enqueued = (*experiment_settings(tuning.experiments, trainers), *enqueued)
    images = _planned(store, tuning, trainers, dataset)
    # Everything that can be refused is refused before the first process starts: space, policy files, folder, journal.
    header = _header(tuning, trainers, dataset, space, enqueued, images)
    job = _job(store, tuning, trainers, enqueued, images, run_dir)
    require_writable(run_dir)
    _decode(store, images, (trainers, *enqueued), progress)
    with open_journal(run_dir, header, tuning.model_dump(mode="json")) as journal:
        log = SearchLog(header, journal, _forgetting(run_dir, on_event))
        log.kept()
        planner = _planner(space, trainers, tuning, enqueued, journal)
        judge = _judge(header, planner, tuning, journal)

        def run(plans: Iterable[TrialPlan | None]) -> None:
            run_trials(plans, run_trial, job, judge=judge, tuning=tuning, log=log, folder=run_dir)

        run(_todo(header, planner, judge, log, journal.generations, run_dir))
        if (best := best_of(log.trials)) is None:
            raise _first_error(log.trials)
        confirming = confirmation_plans(best, trainers, tuning.confirm_seeds)
        # Confirmations run after the search for its leader only and choose nothing, so their scores are unbiased.
        run([plan for plan in confirming if plan.number not in journal.settled])
    return _result(header, log, best, tuning, trainers)


def _planned(store: Store, tuning: TuningSettings, trainers: TrainersSettings, dataset: DatasetVersion) -> DataPlan:
    """Return the images of a search, train and val.

    Raises ConfigError: a trial would be chosen by what it was trained on, or would need peers.
    """
    if strategy_of(trainers.workers).peers:
        raise ConfigError(
            "a search tries many recipes, and peers train one; search at one site with "
            "--set trainers.workers.strategy=auto, and train its winner with peers"
        )
    if trainers.train_splits != "train":
        raise ConfigError(
            "a search compares trials on val, and trainers.train_splits trains on it; leave it at train, and set "
            "trainers.refit=true if the winner shall be trained on both"
        )
    images = plan_data(searched_part(dataset, tuning.max_train_images, tuning.seed), store.taxonomy)
    if tuning.leak == "none":
        return images
    return leaky_plan(images.limited(trainers.max_train_images), tuning.leak, tuning.seed)


def _decode(store: Store, images: DataPlan, wanted: Sequence[TrainersSettings], progress: Progress | None) -> None:
    """Decode images for every frame that is known now; a trial that draws another one decodes for itself."""
    for frame in sorted({settings.model.frame for settings in wanted}):
        images.open(store, frame, progress)


def _judge(header: SearchHeader, planner: Planner, tuning: TuningSettings, journal: Journal) -> Judge:
    return Judge(
        rule_of(header),
        header.trial_epochs,
        lambda number: is_exempt(planner, number, tuning.block_trials),
        [decision for decision in journal.decisions if decision.number < FIRST_NUMBER],
    )


def _result(
    header: SearchHeader, log: SearchLog, best: TrialResult, tuning: TuningSettings, trainers: TrainersSettings
) -> SearchResult:
    verdict = verdict_on(best, log.trials) if tuning.confirm_seeds else None
    searched = [trial for trial in log.trials if not trial.confirms]
    if verdict is not None:
        best = next(trial for trial in searched if trial.number == verdict.winner)
    return SearchResult(
        header=header,
        trials=tuple(searched),
        best=best,
        verdict=verdict,
        settings=with_overrides(trainers, best.overrides),
        seconds=log.seconds,
    )


def searched_space(tuning: TuningSettings, trainers: TrainersSettings) -> SearchSpace:
    """Return the space of a search: derived from the registries, narrowed as the settings say.

    Returns the space; every corner of it can be trained.
    Raises ConfigError: a name is unknown, a range is empty, or a combination is impossible.
    """
    wanted = read_space(tuning.space)
    return narrow(derive_space(tuning.search, trainers), trainers, wanted)


def require_writable(run_dir: Path) -> None:
    """Refuse a folder that cannot be written, before anything starts.

    Raises ConfigError: it cannot be written (says why).
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{os.getpid()}"
        # A real write, because permission bits do not tell of a full disk or a read-only mount.
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"the search's folder {run_dir} cannot be written ({error.strerror}); free it, or set records.home"
        ) from error


def is_exempt(planner: Planner, number: int, block_trials: int) -> bool:
    """Return whether a trial is never cut off: the given settings, the balanced block, and confirmations."""
    return number == 0 or number >= FIRST_NUMBER or planner.is_in_block(number, block_trials)


def _planner(
    space: SearchSpace,
    trainers: TrainersSettings,
    tuning: TuningSettings,
    enqueued: Sequence[TrainersSettings],
    journal: Journal,
) -> Planner:
    return Planner(
        space,
        trainers,
        trials=tuning.trials,
        seed=tuning.seed,
        enqueued=enqueued,
        searcher=tuning.searcher,
        startup_trials=tuning.startup_trials,
        done=[trial for trial in journal.past.values() if not trial.confirms],
    )


def _todo(
    header: SearchHeader, planner: Planner, judge: Judge, log: SearchLog, past: Sequence[GenerationStep], run_dir: Path
) -> Iterator[TrialPlan | None]:
    """Plan trials one by one, each as late as possible, so that a searcher that learns has the most results."""
    if header.generation_epochs:
        yield from Population(header, planner, judge=judge, log=log, past=past, run_dir=run_dir).plans()
        return
    settled = {trial.number for trial in log.trials if trial.settled}
    for number in range(header.trials):
        if number not in settled:
            yield planner.plan(number, [trial for trial in log.trials if not trial.confirms])


def _forgetting(run_dir: Path, on_event: Listener | None) -> Listener:
    """Remove the checkpoint of a settled trial, then pass the event on."""

    def listen(event: SearchEvent) -> None:
        if event.trial.settled:
            shutil.rmtree(trial_folder(run_dir, event.trial.number), ignore_errors=True)
        if on_event is not None:
            on_event(event)

    return listen


def _header(
    tuning: TuningSettings,
    trainers: TrainersSettings,
    dataset: DatasetVersion,
    space: SearchSpace,
    enqueued: Sequence[TrainersSettings],
    images: DataPlan,
) -> SearchHeader:
    population = tuning.searcher is Searcher.PBT
    budget = trial_budget(trainers, tuning.trial_epochs)
    if population and tuning.generation_epochs >= budget:
        raise ConfigError(
            f"tuning.generation_epochs is {tuning.generation_epochs}, but a trial has {budget} epochs; lower it"
        )
    return SearchHeader(
        dataset_id=dataset.id,
        base=flat_values(trainers.model_dump(mode="json", exclude=set(MACHINERY))),
        enqueued=tuple(difference(trainers, settings) for settings in enqueued),
        experiments=tuning.experiments,
        leak=tuning.leak,
        seed=tuning.seed,
        search=tuple(axis.value for axis in space.axes),
        searcher=tuning.searcher.value,
        scheduler=(Scheduler.NONE if population else tuning.scheduler).value,
        startup_trials=tuning.startup_trials,
        block_trials=tuning.block_trials,
        generation_epochs=tuning.generation_epochs if population else 0,
        confirm_seeds=tuning.confirm_seeds,
        axes=dict(axes_of(space)),
        space_hash=space.hash,
        trials=tuning.trials,
        trial_epochs=budget,
        grace_epochs=min(tuning.grace_epochs, budget),
        reduction_factor=tuning.reduction_factor,
        train_images=images.limited(trainers.max_train_images).num_train,
        train_images_available=len(dataset.split(Split.TRAIN)),
        val_images=len(images.image_ids) - images.num_train,
    )


def _job(
    store: Store,
    tuning: TuningSettings,
    trainers: TrainersSettings,
    enqueued: Sequence[TrainersSettings],
    images: DataPlan,
    run_dir: Path | None = None,
) -> TrialJob:
    # A policy that is a file is read here: a trial runs in another folder, perhaps on another machine.
    names = {settings.augmentation for settings in (trainers, *enqueued)}
    return TrialJob(
        base=trainers,
        trial_epochs=tuning.trial_epochs,
        taxonomy=store.taxonomy,
        policies={name: load_policy(name) for name in sorted(names) if name.endswith(YAML_SUFFIXES)},
        images=images,
        records=store.portable_settings(),
        num_threads=tuning.cpus_per_trial,
        use_gpu=tuning.gpus_per_trial > 0,
        niceness=tuning.niceness,
        workers=tuning.workers_per_trial,
        run_dir=None if run_dir is None else run_dir.absolute(),
    )


def _first_error(trials: Sequence[TrialResult]) -> RelookError:
    """Rebuild the error of the first trial that failed, in its own class where it is one of ours."""
    failed = [trial for trial in trials if trial.error is not None]
    if not failed:
        return RelookError("the search ended without a trial")
    first = failed[0]
    intro = f"all {len(failed)} trials failed; the first one's reason: "
    kind = error_class(first.error_kind or "")
    known = kind.__name__ == first.error_kind
    return kind(f"{intro}{first.error}" if known else f"{intro}{first.error_kind}: {first.error}")


def search_folder(store: Store, *, resume: bool = False, name: str | None = None) -> Path:
    """Return the folder of a new search, or of the one to resume; see `find_resumable` for the name."""
    if name is not None and not resume:
        raise ConfigError("--run names the search to resume; give it with --resume")
    runs = store.home.runs
    return find_resumable(runs, name) if resume else runs / f"{RUN_PREFIX}{new_id()[:16]}"


def search_lease(store: Store, run_dir: Path, *, resume: bool = False) -> AbstractContextManager[str]:
    """Return the lease under which a search runs: one that still runs elsewhere is not joined by a second process.

    After a kill the lease expires, so a resumed search waits for it.
    """
    return hold(store.ledger, f"search {run_dir.name}", wait_s=LEASE_S if resume else 0.0)


def track_trial(tracked: Tracked, event: SearchEvent) -> None:
    """Record the trial of an event in MLflow if it has ended."""
    if event.trial.settled:
        tracked.trial(event.trial.number, event.trial.overrides, event.trial.scores)


def fit_winner(
    store: Store,
    result: SearchResult,
    dataset: DatasetVersion,
    run_dir: Path,
    progress: Progress | None = None,
    tracking: TrackingSettings | None = None,
) -> Bundle:
    """Train the winner's settings on all of train and register the bundle."""
    from trainers.fitting.epoch_report import EpochBar
    from trainers.fitting.fit import METRICS_FILE
    from trainers.fitting.refit import fit_and_register

    settings = result.settings.with_values({"workers.count": 1})
    bar = None if progress is None else EpochBar(progress, settings.epochs)

    folder = run_dir / f"fit-{settings.recipe_hash()[:12]}"
    # The run of the search goes on, see `tuning.cli.show_search`.
    with Tracked(tracking, "tune", run_dir.name, settings.flat()) as tracked:
        bundle = fit_and_register(
            store, settings, dataset, run_dir=folder, use_ray=False,
            on_epoch=tracked.before(bar), on_step=None if bar is None else bar.on_step, progress=progress,
        )  # fmt: skip
        tracked.fitted(bundle, folder / METRICS_FILE)
    return bundle


SEARCH_SPLITS = (Split.TRAIN, Split.VAL)


def searched_part(dataset: DatasetVersion, max_train_images: int | None, seed: int) -> DatasetVersion:
    """Return what a search sees of a dataset version: val, and train or a part of it.

    Args:
        dataset: the version.
        max_train_images: of the part; None takes all.
        seed: of the draw.
    Returns:
        The version with these rows only, under its own id.
    Raises:
        DataError: train or val is empty, or fewer images are allowed than there are classes.
    """
    train, val = dataset.split(Split.TRAIN), dataset.split(Split.VAL)
    for name, rows in (("train", train), ("val", val)):
        if rows.empty:
            raise DataError(f"dataset {dataset.id[:12]} has no image on the {name} split; import or label some")
    part = pd.concat([grouped_subset(train, max_train_images, seed), val], ignore_index=True)
    require_search_rows(part)
    return replace(dataset, rows=part)


def require_search_rows(rows: pd.DataFrame) -> None:
    """Refuse rows that no search may see.

    Raises ContractError: a row is on another split than train or val (names the split and the image).
    """
    foreign = rows[~rows["split"].isin([split.value for split in SEARCH_SPLITS])]
    if not foreign.empty:
        first = foreign.iloc[0]
        raise ContractError(
            f"a search may read train and val only, but image {first['image_id'][:12]} is on split {first['split']}"
        )
