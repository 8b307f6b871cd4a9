"""`relook train` and `relook catalog`: results, refusals, and progress without a terminal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app

FAST = [
    "--set", "trainers.model.side_px=32", "--set", "trainers.epochs=1", "--set", "trainers.batch_size=16",
    "--set", "trainers.workers.threads=1", "--set", "trainers.augmentation=none",
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))

    def call(*args: str) -> Result:
        return CliRunner().invoke(app, list(args))

    return call


def test_the_catalogue(run: Any) -> None:
    whole = json.loads(run("catalog", "--json").stdout)
    assert {"models", "optimizers", "schedulers", "augmentations", "losses", "samplers"} <= set(whole)
    models = json.loads(run("catalog", "models", "--json").stdout)
    assert list(models) == ["models"]
    assert models["models"][0]["parameters"] == 51_221
    shown = run("catalog", "optimizers").stdout
    assert all(name in shown for name in ("sgd", "rmsprop", "adam", "adamw"))
    refused = run("catalog", "colours")
    assert "the catalogue has no kind 'colours'; there are models, " in str(refused.exception)


def test_train_prints_the_model_and_goes_on_only_when_asked(run: Any, images_folder: Path) -> None:
    nothing = run("train", "--data", str(images_folder), *FAST, "--resume")
    assert "there is no training with these settings" in str(nothing.exception)
    first = run("train", "--data", str(images_folder), *FAST, "--json")
    assert first.exit_code == 0, first.exception
    printed = json.loads(first.stdout)
    assert len(printed["model_id"]) == 64
    assert printed["training"]["epochs"] == 1
    assert printed["balanced_accuracy"] == printed["val"]["balanced_accuracy"]
    assert (Path(printed["run_dir"]) / "metrics.jsonl").is_file()
    again = run("train", *FAST)
    assert "go on with --resume, or change a setting such as --set trainers.seed=1" in str(again.exception)
    resumed = run("train", *FAST, "--resume", "--json")
    assert json.loads(resumed.stdout)["model_id"] == printed["model_id"]
    shown = json.loads(run("evaluate", printed["model_id"][:8], "--json").stdout)
    assert (shown["model_id"], shown["trained_on"]) == (printed["model_id"], 0)
    # The first training is done, so that only the second one is left.
    refitted = json.loads(run("train", *FAST, "--refit", "--resume", "--json").stdout)
    assert refitted["trained_on"] == ["train", "val"]
    assert refitted["training"]["first_fit"] == printed["model_id"]
    marked = run("evaluate", refitted["model_id"][:8], "--split", "val")
    assert f"{shown['images']} of {shown['images']}: the figures say nothing" in marked.stdout


def test_without_a_terminal_each_epoch_is_a_line(run: Any, images_folder: Path) -> None:
    fast = [word.replace("trainers.epochs=1", "trainers.epochs=2") for word in FAST]
    command = ["train", "--data", str(images_folder), *fast, "--set", "trainers.precision=fp32"]
    done = run(*command, "--set", "trainers.model.name=custom_cnn", "--json")
    lines = done.stderr.splitlines()
    assert done.exit_code == 0, lines
    assert json.loads(done.stdout)["training"]["epochs"] == 2
    epochs = [line for line in lines if "train: epoch" in line]
    clock = r"\d\d:\d\d:\d\d"
    figures = r"loss \d\.\d{3}, val balanced accuracy \d\.\d{3}, \d+ images/s"
    assert re.fullmatch(rf"{clock} train: epoch 0/2", epochs[0])
    assert re.fullmatch(rf"{clock} train: epoch 1/2, {figures}, \d+ s left", epochs[1])
    assert re.fullmatch(rf"{clock} train: epoch 2/2, {figures}, done in .+", epochs[2])
    assert len(epochs) == 3


def test_bad_input_is_one_sentence(run: Any, tmp_path: Path) -> None:
    no_data = run("train")
    assert "there is no data yet" in str(no_data.exception)
    unknown = run("train", "--set", "trainers.optimizer.name=lion")
    assert "unknown optimizer 'lion'; there are sgd, rmsprop, adam, adamw" in str(unknown.exception)
    uneven = run("train", "--workers", "5")
    assert "--workers 5 cannot be used: batch_size 64 cannot be shared evenly by 5 workers; take 65" in str(
        uneven.exception
    )
