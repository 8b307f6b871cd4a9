"""Strategies: whoever shares a batch, and however, the model is the same; one's checkpoint is another's start."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.fitting.checkpoints import load_checkpoint
from trainers.fitting.loop import train
from trainers.fitting.workers import SingleWorker
from trainers.optimization.strategies import STRATEGIES, strategy_of
from trainers.settings import WorkersSettings

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("joined_run.py")
RUN: dict[str, Any] = runpy.run_path(str(SCRIPT))
Weights = dict[str, np.ndarray]


SHORT = ("plain-ddp", "plain-fsdp", "everything-fsdp")
LONG = ("everything-ddp", "uneven-elastic", "norms-ddp")
# What sharding adds for batch norm, dropout and a deep network.
SOAK = ("norms-ddp", "norms-fsdp", "resnet-ddp", "resnet-fsdp")


def join(folder: Path, cases: tuple[str, ...]) -> Path:
    """Train cases in two joined processes, of which this is one, and return the folder that they left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "1", str(port), str(folder), *cases]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as other:
        try:
            RUN["train_all"](0, port, folder, cases)
        finally:
            _, errors = other.communicate(timeout=600)
        assert other.returncode == 0, errors.decode()[-3000:]
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the short cases."""
    return join(tmp_path_factory.mktemp("joined"), SHORT)


@pytest.fixture(scope="module")
def together_long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the long cases."""
    return join(tmp_path_factory.mktemp("long"), LONG)


@pytest.fixture(scope="module")
def together_soak(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the cases of the soak."""
    return join(tmp_path_factory.mktemp("soak"), SOAK)


def results(folder: Path, case: str) -> tuple[Weights, list[float], float]:
    with np.load(folder / f"{case}.npz") as stored:
        weights = {name: stored[name] for name in stored.files if not name.startswith("_")}
        return weights, stored["_scores"].tolist(), float(stored["_loss"])


def largest_difference(left: Weights, right: Weights) -> float:
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def alone(case: str, run_dir: Path | None = None) -> Any:
    return train(
        RUN["settings_of"](case, 1), RUN["images"](), RUN["COLOURS"], workers=SingleWorker(run_dir, use_gpu=False)
    )


@pytest.mark.parametrize("case", SHORT)
def test_two_workers_are_one_without_batch_norm_and_dropout(together: Path, case: str) -> None:
    equal_to_one(together, case)


@pytest.mark.long
@pytest.mark.parametrize("case", ["everything-ddp", "uneven-elastic"])
def test_two_workers_are_one_with_every_option_and_uneven_batches(together_long: Path, case: str) -> None:
    equal_to_one(together_long, case)


def equal_to_one(folder: Path, case: str) -> None:
    weights, scores, loss = results(folder, case)
    one = alone(case)
    assert largest_difference(weights, one.weights()) < 1e-4
    assert loss == pytest.approx(one.reports[-1].train_loss, abs=1e-4)
    assert scores == pytest.approx([report.val_balanced_accuracy for report in one.reports], abs=0.01)


def alike_in_score(folder: Path, strategy: str) -> None:
    _, scores, _ = results(folder, f"norms-{strategy}")
    one = alone("norms-ddp")
    assert one.best.val_balanced_accuracy > 0.5
    assert max(scores) == pytest.approx(one.best.val_balanced_accuracy, abs=0.01)


@pytest.mark.long
def test_batch_norm_and_dropout_move_the_evaluation_by_less_than_a_point(together_long: Path) -> None:
    alike_in_score(together_long, "ddp")


def test_sharding_changes_nothing_that_two_workers_compute(together: Path) -> None:
    assert sharding_moves(together, "plain") < 1e-4


def sharding_moves(folder: Path, case: str) -> float:
    return largest_difference(*(results(folder, f"{case}-{strategy}")[0] for strategy in ("fsdp", "ddp")))


@pytest.mark.soak
def test_batch_norm_dropout_and_a_deep_network_are_sharded_alike(together_soak: Path) -> None:
    alike_in_score(together_soak, "fsdp")
    assert {case: sharding_moves(together_soak, case) < 1e-4 for case in ("norms", "resnet")} == {
        "norms": True, "resnet": True
    }  # fmt: skip


def test_a_sharded_run_that_stopped_within_an_epoch_is_finished_by_one_process(together: Path) -> None:
    found = load_checkpoint(together / "half" / "checkpoint.pt")
    assert (found.epochs_done, found.step) == (1, 3)
    finished = alone("everything-fsdp", together / "half")
    assert [report.epoch for report in finished.reports] == [1, 2]
    assert largest_difference(finished.weights(), alone("everything-fsdp").weights()) < 1e-4


def test_two_workers_that_stopped_in_their_first_epoch_end_as_those_that_did_not(together: Path) -> None:
    whole, *resumed = json.loads((together / "stopped.json").read_text())
    assert len(whole["figures"]) == 2
    assert len(resumed) == len(RUN["MOMENTS"])
    for moment, run in zip(RUN["MOMENTS"], resumed, strict=True):
        assert run == whole, moment


def test_the_registry_holds_five_and_auto_is_one_of_them() -> None:
    assert STRATEGIES.names == ("single", "ddp", "fsdp", "elastic", "hivemind")
    assert strategy_of(WorkersSettings()).name == "single"
    assert strategy_of(WorkersSettings(count=2)).name == "ddp"
    assert strategy_of(WorkersSettings(count=2, strategy="fsdp")).shards
