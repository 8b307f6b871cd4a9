"""The verb `scale` of `python -m bench`.

python -m bench scale --json
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from bench.figures import figures_table
from records.command import Call, verb
from records.progress import say

app = typer.Typer()


@verb(app, "scale")
def bench_scale(
    call: Call,
    images: Annotated[int, typer.Option(min=100, help="Labelled images of a dataset version.")] = 1_000_000,
    rows: Annotated[int, typer.Option(min=100, help="Predictions in the ledger.")] = 1_000_000,
    calls: Annotated[int, typer.Option(min=1, help="Traces and listings that are timed, of each kind.")] = 100,
) -> None:
    """Measure dataset versions, traces, listings, monitoring and retention with many rows, on SQLite."""
    import multiprocessing
    import os
    from concurrent.futures import ProcessPoolExecutor

    from bench.scale.rows import add_predictions, measured
    from bench.scale.version import build, fill
    from records.store import open_store

    with TemporaryDirectory(prefix="relook-bench-") as folder:
        # A home of its own: the measurement must neither see nor change the user's data.
        records = call.settings.records.apart(Path(folder) / "home")
        with closing(open_store(records)) as store:
            say(f"writing {images} images")
            fill(store, images)
        say("building two versions")
        # A process of its own, whose largest memory is that of a version.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            version = pool.submit(build, records).result()
        with closing(open_store(records)) as store:
            say(f"writing {rows} predictions")
            add_predictions(store, rows, images)
            say("tracing, listing, monitoring")
            found = measured(store, rows, images, calls)
    load = [round(value, 1) for value in os.getloadavg()]
    figures = {"images": images, "predictions": rows, "version": version, "ledger": found, "load": load}
    flat = {f"version {name}": value for name, value in version.items() if name != "splits"}
    flat |= {f"{what}, {name}": value for what, times in found.items() for name, value in times.items()}
    call.emit(figures, figures_table("python -m bench scale", flat))
