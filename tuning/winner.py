"""Make a model of a search's winner: its whole budget, calibrated, registered.

It runs after the search is over and decides nothing about it; this is where calibration rows are read
for the first time.
"""

from pathlib import Path

from rich.progress import Progress

from records.bundles import Bundle
from records.datasets import DatasetVersion
from records.models import register
from records.store import Store
from tuning.trials import SearchResult


def fit_winner(
    store: Store, result: SearchResult, dataset: DatasetVersion, run_dir: Path, progress: Progress | None = None
) -> Bundle:
    """Train the winner's settings on all of train and register the bundle.

    Args:
        store: with the images.
        result: of the search.
        dataset: that was searched on.
        run_dir: of the search; a fit that was killed goes on from there.
        progress: bars are added to it.
    Returns:
        The registered bundle.
    """
    from trainers.fitting.epoch_report import EpochBar
    from trainers.fitting.fit import fit

    settings = result.settings.with_values({"workers.count": 1})
    on_epoch = None if progress is None else EpochBar(progress, settings.epochs)
    folder = run_dir / f"fit-{settings.recipe_hash()[:12]}"
    bundle = fit(store, settings, dataset, run_dir=folder, use_ray=False, on_epoch=on_epoch, progress=progress)
    with store.ledger.begin() as tx:
        register(tx, bundle)
    return bundle
