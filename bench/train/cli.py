"""The trainers' part of `relook bench`; `cluster/cli.py` joins the rooms' parts into one group.

python -m bench train --json
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from records.command import (
    ConfigOption,
    JsonOption,
    PresetOption,
    SetOption,
    emit,
    figures_table,
    progress,
    ray_of,
    settings_of,
)

app = typer.Typer()


@app.command("train")
def bench_train(
    ctx: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Folder of images; default: generated ones.")] = None,
    epoch_s: Annotated[float, typer.Option(min=1.0, help="Seconds that a measured epoch shall take.")] = 8.0,
    lightning_python: Annotated[
        Path | None, typer.Option(help="Python of an environment that has Lightning; default: not measured.")
    ] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure training: whole pipeline, bare steps, a plain fp32 script, Lightning, two workers."""
    from bench.train.training import Bench, prepare
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    with TemporaryDirectory(prefix="relook-bench-") as folder, progress() as bar:
        # A home of its own: measuring must neither see nor change what the user has.
        records = settings.records.apart(Path(folder) / "home")
        with closing(open_store(records)) as store, ray_of(ctx, settings):
            plan = prepare(store, data, settings.trainers.side_px, Path(folder), bar)
            bench = Bench(store, settings.trainers, plan, Path(folder), epoch_s, lightning_python)
            figures = bench.run()
    emit(as_json, figures, figures_table("python -m bench train", figures))
