"""Options that several verbs of `python -m bench` share."""

from pathlib import Path
from typing import Annotated

import typer

PeersOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the peers' environments (made by bench/peers/install.py); default: peers are not measured.",
        envvar="RELOOK_BENCH_PEERS", exists=True, file_okay=False,
    ),
]  # fmt: skip
