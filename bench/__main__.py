"""Measure this machine: `python -m bench train | gpu | tune | serve | explain | abuse | label | scale`.

The verbs have the common options of `relook` (`--config`, `--preset`, `--set`, `--json`) and its exit codes.
"""

import sys

import typer

import bench.gpu.cli
import bench.label.cli
import bench.scale.cli
import bench.serve.abuse
import bench.serve.cli
import bench.train.cli
import bench.tune.cli
from cluster.cli import root, run

app = typer.Typer(
    help="Measure this machine: rates, ratios to peers, memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.callback()(root)
for _verbs in (
    bench.train.cli, bench.gpu.cli, bench.tune.cli, bench.serve.cli, bench.serve.abuse, bench.label.cli, bench.scale.cli
):  # fmt: skip
    app.add_typer(_verbs.app)

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], app, "python -m bench"))
