"""A search: plan the trials, run them on train and val, return the winner by validation.

In: a store, settings, a dataset version and a running Ray session. Out: a SearchResult and the
journal in the run's folder; a folder whose journal is unfinished is gone on with. It fits nothing
for use (the caller trains the winner anew) and never sees calibration, gate or test rows.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from records import errors
from records.datasets import DatasetVersion
from records.errors import RelookError
from records.store import Store
from records.types import Side
from trainers.augmentation import load_policy
from trainers.augmentation.registry import YAML_SUFFIXES
from trainers.fitting.training_data import DataPlan, plan_data
from trainers.settings import MACHINERY, TrainersSettings
from tuning.budget import trial_budget
from tuning.journal import open_journal
from tuning.log import Listener, SearchLog, best_of
from tuning.settings import TuningSettings
from tuning.space import SearchSpace, derive_space, difference, plan_trials, with_overrides
from tuning.subset import searched_part
from tuning.trial import TrialJob, run_trial
from tuning.trials import SearchHeader, SearchResult, TrialResult


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

    The given settings are trial 0 and always get their whole budget, so the winner is never worse
    than they are on validation. The score of a trial is its best epoch, as in a whole training.

    Args:
        store: with the pictures.
        tuning: budget, resources, what is varied.
        trainers: the given settings.
        dataset: its train and val sides are read, no other.
        run_dir: keeps the journal; if it holds the journal of this very search, settled trials are not run again.
        on_event: told of every happening; what it raises ends the search and is raised here.
        enqueued: settings to try right after the given ones, for example earlier winners.
        progress: shows the decoding of pictures that are not cached yet.
    Returns:
        All trials and the winner.
    Raises:
        RefusedError: `run_dir` holds another search.
        ConfigError: a setting cannot work, or one trial needs more than the Ray session has.
        DataError: train or val is empty.
        ContractError: no Ray session is running.
        RelookError: every trial failed; it is the first one's error.
        KeyboardInterrupt: Ctrl-C, after the trials were stopped; the journal can be gone on with.
    """
    # Planning and reporting need no Ray; its import takes a second.
    from tuning.ray_search import run_trials

    space = derive_space(tuning.search, trainers)
    plans = list(plan_trials(space, trainers, trials=tuning.trials, seed=tuning.seed, enqueued=enqueued))
    pictures = plan_data(searched_part(dataset, tuning.max_train_images, tuning.seed), store.taxonomy)
    header = _header(tuning, trainers, dataset, space, enqueued, pictures)
    job = _job(store, tuning, trainers, enqueued, pictures)
    pictures.open(store, trainers.side_px, progress)
    with open_journal(run_dir, header) as journal:
        log = SearchLog(header, journal, on_event)
        log.kept()
        todo = [plan for plan in plans if plan.number not in journal.settled]
        run_trials(todo, run_trial, job, header=header, tuning=tuning, log=log, folder=run_dir)
    best = best_of(log.trials)
    if best is None:
        raise _first_error(log.trials)
    return SearchResult(
        header=header,
        trials=tuple(log.trials),
        best=best,
        settings=with_overrides(trainers, best.overrides),
        seconds=log.seconds,
    )


def _header(
    tuning: TuningSettings,
    trainers: TrainersSettings,
    dataset: DatasetVersion,
    space: SearchSpace,
    enqueued: Sequence[TrainersSettings],
    pictures: DataPlan,
) -> SearchHeader:
    return SearchHeader(
        dataset_id=dataset.id,
        base=trainers.model_dump(mode="json", exclude=set(MACHINERY)),
        enqueued=tuple(difference(trainers, settings) for settings in enqueued),
        seed=tuning.seed,
        search=tuple(axis.value for axis in tuning.search),
        space_hash=space.hash,
        trials=tuning.trials,
        trial_epochs=trial_budget(trainers, tuning.trial_epochs),
        grace_epochs=min(tuning.grace_epochs, trial_budget(trainers, tuning.trial_epochs)),
        reduction_factor=tuning.reduction_factor,
        train_images=pictures.num_train,
        train_images_available=len(dataset.side(Side.TRAIN)),
        val_images=len(pictures.image_ids) - pictures.num_train,
    )


def _job(
    store: Store,
    tuning: TuningSettings,
    trainers: TrainersSettings,
    enqueued: Sequence[TrainersSettings],
    pictures: DataPlan,
) -> TrialJob:
    # A policy that is a file is read here: a trial runs in another folder, perhaps on another machine.
    names = {settings.augmentation for settings in (trainers, *enqueued)}
    taxonomy = store.settings.taxonomy
    return TrialJob(
        base=trainers,
        trial_epochs=tuning.trial_epochs,
        taxonomy=store.taxonomy,
        policies={name: load_policy(name) for name in sorted(names) if name.endswith(YAML_SUFFIXES)},
        pictures=pictures,
        records=store.settings.model_copy(
            update={
                "home": store.home.root,
                "taxonomy": str(Path(taxonomy).absolute()) if Path(taxonomy).is_file() else taxonomy,
            }
        ),
        num_threads=tuning.cpus_per_trial,
        use_gpu=tuning.gpus_per_trial > 0,
        niceness=tuning.niceness,
    )


def _first_error(trials: Sequence[TrialResult]) -> RelookError:
    """Rebuild the error of the first trial that failed, in its own class where it is one of ours."""
    failed = [trial for trial in trials if trial.error is not None]
    if not failed:
        return RelookError("the search ended without a trial")
    first = failed[0]
    intro = f"all {len(failed)} trials failed; the first one's reason: "
    kind = getattr(errors, first.error_kind or "", None)
    if isinstance(kind, type) and issubclass(kind, RelookError):
        return kind(f"{intro}{first.error}")
    return RelookError(f"{intro}{first.error_kind}: {first.error}")
