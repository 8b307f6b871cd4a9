"""The labeling room's part of `relook bench`; `cluster/cli.py` joins the rooms' parts into one group.

python -m bench label --json
"""

from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from records.command import Call, figures_table, verb
from records.progress import stderr

app = typer.Typer()


@verb(app, "label")
def bench_label(
    call: Call,
    items: Annotated[int, typer.Option(min=10, help="Questions that are sent, answered and read.")] = 1000,
) -> None:
    """Measure push and pull at a local Label Studio of their own, beside a client that only moves the data."""
    from bench.label.bulk import measure
    from labeling.local_server import LocalLabelStudio
    from records.store import open_store

    settings = call.settings
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
    call.emit(figures, figures_table("python -m bench label", figures))
