"""The verb `train` of `python -m bench`.

python -m bench train --peers DIR --json
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from bench.figures import figures_table
from bench.options import PeersOption
from records.command import Call, verb
from records.progress import progress

app = typer.Typer()


@verb(app, "train")
def bench_train(
    call: Call,
    data: Annotated[Path | None, typer.Option(help="Folder of images; default: generated ones.")] = None,
    epoch_s: Annotated[float, typer.Option(min=1.0, help="Length of a measured epoch in seconds.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often everything is measured, in turn.")] = 2,
    peers: PeersOption = None,
) -> None:
    """Measure training: whole pipeline, bare steps, a plain fp32 script, Lightning, two workers."""
    from bench.train.training import Bench, prepare
    from records.store import open_store

    settings = call.settings
    with TemporaryDirectory(prefix="relook-bench-") as folder, progress() as bar:
        # A home of its own: the measurement must neither see nor change the user's data.
        records = settings.records.apart(Path(folder) / "home")
        with closing(open_store(records)) as store, call.ray(settings):
            plan = prepare(store, data, settings.trainers.model.frame, Path(folder), bar)
            bench = Bench(store, settings.trainers, plan, Path(folder), epoch_s, rounds, peers, bar)
            figures = bench.run()
    call.emit(figures, figures_table("python -m bench train", figures))
