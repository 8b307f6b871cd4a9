"""The verb `tune` of `python -m bench`.

python -m bench tune --data HAM10000 --table table.jsonl --json
"""

import os
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.figures import figures_table
from records.command import Call, verb
from records.progress import progress

if TYPE_CHECKING:
    from records.datasets import DatasetVersion
    from records.store import Store

app = typer.Typer()
STARTS = 6
"""Trials whose start is measured, per core."""


@verb(app, "tune")
def bench_tune(
    call: Call,
    data: Annotated[Path | None, typer.Option(help="Folder of images; default: generated ones.")] = None,
    table: Annotated[
        Path | None, typer.Option(help="File of learning curves, extended if it exists; default: a temporary one.")
    ] = None,
    configurations: Annotated[int, typer.Option(min=3, help="Number of configurations in the table.")] = 60,
    images: Annotated[int, typer.Option(min=7, help="Training images of the table and of measured trials.")] = 3000,
    seeds: Annotated[int, typer.Option(min=1, help="Number of searches replayed on the table.")] = 5,
    trial_s: Annotated[float, typer.Option(min=0.1, help="Length in seconds of a trial that only computes.")] = 30.0,
    simulated: Annotated[
        int, typer.Option(min=10, help="Number of empty trials, to measure the driver's memory.")
    ] = 1000,
) -> None:
    """Measure a search: what halving saves on a table of real curves, and what Ray Tune costs."""
    from bench.train.training import import_images
    from bench.tune.tune import memory_growth, overhead
    from records.store import open_store

    settings = call.settings
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {"load_average_before": round(os.getloadavg()[0], 1)}
    with TemporaryDirectory(prefix="relook-bench-") as folder:
        root = Path(folder)
        # A home of its own: the measurement must neither see nor change the user's data.
        records = settings.records.apart(root / "home")
        with closing(open_store(records)) as store:
            with progress() as bar:
                dataset = import_images(store, data, settings.trainers.model.frame, root, bar)
            figures |= _replayed(store, settings, dataset, table or root / "table.jsonl", configurations, images, seeds)
            with call.ray(settings):
                figures |= {
                    "trial_start_s_median": _start(store, settings, dataset, root / "starts", images, cores),
                    "tune_overhead": round(overhead(root / "busy", trial_s, cores, trials_each=4), 3),
                    "driver_memory_growth": round(memory_growth(root / "many", simulated, cores), 1),
                }
    figures |= {"trial_s": trial_s, "simulated_trials": simulated, "cores": cores, "train_images": images}
    call.emit(figures, figures_table("python -m bench tune", figures))


def _replayed(
    store: "Store",
    settings: Any,
    dataset: "DatasetVersion",
    path: Path,
    configurations: int,
    images: int,
    seeds: int,
) -> dict[str, Any]:
    from bench.tune.replay import compare_with_random
    from bench.tune.table import train_table
    from tuning.search import searched_space

    tuning, base = settings.tuning, settings.trainers
    space = searched_space(tuning, base)
    rows = train_table(store, dataset, base, space, path, configurations=configurations, max_train_images=images)
    return compare_with_random(rows, seeds, tuning.grace_epochs, tuning.reduction_factor)


def _start(
    store: "Store", settings: Any, dataset: "DatasetVersion", folder: Path, images: int, cores: int
) -> float | None:
    """Run a short real search; return the median start of its trials, the first of each process left out."""
    from tuning.report import report_on
    from tuning.search import search

    tuning = settings.tuning.model_copy(
        update={
            "trials": STARTS * cores,
            "trial_epochs": 1,
            "grace_epochs": 1,
            "confirm_seeds": 0,
            "max_train_images": min(images, 300),
        }
    )
    search(store, tuning, settings.trainers, dataset, run_dir=folder)
    found = report_on(folder).start_seconds_median
    return None if found is None else round(found, 3)
