"""The verbs of the trainers: `train`, `catalog`, `data`, `evaluate` and `explain`; one file each."""

import typer

from trainers.cli import data, evaluate, explain, train
from trainers.cli.train import CATALOGUES

__all__ = ["CATALOGUES", "app"]

app = typer.Typer()
for _verbs in (train.app, evaluate.app, explain.app):
    app.add_typer(_verbs)
app.add_typer(data.app, name="data")
