"""The labeling room's part of `relook bench`; `cluster/cli.py` joins the rooms' parts into one group.

python -m bench label --json
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, figures_table, settings_of, stderr

app = typer.Typer()


@app.command("label")
def bench_label(
    ctx: typer.Context,
    items: Annotated[int, typer.Option(min=10, help="Questions that are sent, answered and read.")] = 1000,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure push and pull at a local Label Studio of their own, beside a client that only moves the data."""
    from bench.label.bulk import measure
    from labeling.local_server import LocalLabelStudio
    from records.store import open_store

    settings = settings_of(ctx, config, preset, sets)
    with TemporaryDirectory(prefix="relook-bench-") as folder:
        # A home of its own: measuring must neither see nor change what the user has.
        records = settings.records.apart(Path(folder) / "home")
        labeling = settings.labeling.model_copy(update={"port": 0, "url": None, "token": None})
        with closing(open_store(records)) as store:
            local = LocalLabelStudio(store.home, labeling)
            try:
                figures = measure(store, local.up(stderr.print), labeling, items, stderr.print)
            finally:
                local.down()
    emit(as_json, figures, figures_table("python -m bench label", figures))
