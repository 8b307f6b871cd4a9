"""The verb in its shortest form: a real table, a real search, real Ray."""

import json

import pytest
import typer
from typer.testing import CliRunner

from cluster.settings import Settings
from records.command import RAY_STARTER
from trainers.data.synth import synthesize
from tuning.bench.table import read_table
from tuning.cli import bench_app

KEYS = {"compute_over_random", "trial_start_s_median", "tune_overhead", "driver_memory_growth"}
SHORT = ("--configurations", "3", "--pictures", "40", "--seeds", "2", "--trial-s", "0.3", "--simulated", "10")


@pytest.mark.slow
def test_all_figures_are_measured_and_the_table_is_kept(ray_session, trainers, tmp_path):
    from contextlib import nullcontext

    synthesize(tmp_path / "pictures", lesions=70, seed=0)
    settings = Settings(trainers=trainers.model_copy(update={"epochs": 2}))
    root = typer.Typer()

    @root.callback()
    def load(ctx: typer.Context) -> None:
        ctx.obj = lambda *_: settings
        ctx.meta[RAY_STARTER] = lambda _: nullcontext()

    root.add_typer(bench_app)
    table = tmp_path / "table.jsonl"
    arguments = ["tune", "--data", str(tmp_path / "pictures"), "--table", str(table), *SHORT, "--json"]
    done = CliRunner().invoke(root, arguments, catch_exceptions=False)
    figures = json.loads(done.stdout)

    assert figures.keys() >= KEYS
    assert 0 < figures["compute_over_random"] <= 1
    assert figures["trial_start_s_median"] > 0
    assert 0 < figures["tune_overhead"] < 1
    assert [len(row.scores) for row in read_table(table)] == [2, 2, 2]
