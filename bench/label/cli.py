"""The verb `label` of `python -m bench`.

python -m bench label --json
python -m bench label --items 10000 --annotators 100 --json
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


@verb(app, "label")
def bench_label(
    call: Call,
    items: Annotated[int, typer.Option(min=10, help="Number of tasks that are sent, annotated and read.")] = 1000,
    annotators: Annotated[int, typer.Option(min=0, help="People who annotate other tasks meanwhile.")] = 0,
) -> None:
    """Measure push and pull with a Label Studio of their own, next to a client that only moves the data."""
    from bench.label.bulk import measure
    from labeling.local_server import LocalLabelStudio
    from records.store import open_store

    settings = call.settings
    with TemporaryDirectory(prefix="relook-bench-") as folder:
        # A home of its own: the measurement must neither see nor change the user's data.
        records = settings.records.apart(Path(folder) / "home")
        labeling = settings.labeling.model_copy(update={"port": 0, "url": None, "token": None})
        with closing(open_store(records)) as store:
            local = LocalLabelStudio(store.home, labeling)
            try:
                figures = measure(store, local.up(say), labeling, items, annotators, say)
            finally:
                local.down()
    call.emit(figures, figures_table("python -m bench label", figures))
