"""The loop: it learns, repeats itself, goes on after a kill, stops when told, and refuses what it cannot use."""

import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from records.errors import (
    ContractError,
    DataError,
    DivergedError,
    IntegrityError,
    RefusedError,
    UnavailableError,
)
from records.taxonomy import Taxonomy
from trainers.fitting.checkpoints import load_checkpoint
from trainers.fitting.epoch_report import CLOCKS, EpochReport
from trainers.fitting.loop import TrainedModel, TrainingData, best_epoch_of, train
from trainers.fitting.workers import SingleWorker
from trainers.optimization.losses import LOSSES
from trainers.optimization.optimizers import OPTIMIZERS
from trainers.optimization.samplers import SAMPLERS
from trainers.optimization.schedulers import SCHEDULERS
from trainers.settings import TrainersSettings


def same_weights(a: TrainedModel, b: TrainedModel) -> bool:
    left, right = a.weights(), b.weights()
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def alone(run_dir: Path | None = None) -> SingleWorker:
    return SingleWorker(run_dir, use_gpu=False)


@pytest.fixture(scope="module")
def trained(toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy) -> TrainedModel:
    return train(toy_settings, toy_data, three_classes)


def test_it_learns(toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy) -> None:
    model = train(toy_settings.with_values({"epochs": 8}), toy_data, three_classes)
    assert model.best.val_balanced_accuracy >= 0.9
    assert model.reports[-1].train_loss < 0.6 * model.reports[0].train_loss
    assert model.best_epoch == best_epoch_of(model.reports)


def test_what_comes_out(trained: TrainedModel, toy_data: TrainingData) -> None:
    assert not trained.network.training
    assert not any(parameter.requires_grad for parameter in trained.network.parameters())
    assert [report.epoch for report in trained.reports] == [1, 2, 3]
    assert trained.geometry.side_px == 32
    values = toy_data.pixels.take(toy_data.train_index) / 255.0
    assert trained.geometry.mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-6)
    assert trained.num_threads == 1
    assert all(report.images_per_s > 0 and report.learning_rate >= 0 for report in trained.reports)


def test_it_repeats_itself_and_leaves_the_callers_randomness_alone(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, trained: TrainedModel
) -> None:
    torch.manual_seed(99)
    expected = torch.rand(3)
    torch.manual_seed(99)
    again = train(toy_settings, toy_data, three_classes)
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(again, trained)
    other = train(toy_settings.with_values({"seed": 1}), toy_data, three_classes)
    assert not same_weights(other, trained)


RESUMED_TOO = (("cosine", "sgd"), ("onecycle", "rmsprop"))
PAUSED_TOO = (("step", "sgd"), ("onecycle", "sgd"))


@pytest.mark.parametrize(
    ("scheduler", "optimizer"),
    [("plateau", "adam"), *(pytest.param(*pair, marks=pytest.mark.long) for pair in RESUMED_TOO)],
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path,
    scheduler: str, optimizer: str,
) -> None:  # fmt: skip
    settings = toy_settings.with_values(
        {
            "scheduler.name": scheduler,
            "optimizer.name": optimizer,
            "optimizer.learning_rate": None,
            "augmentation": "light",
            "epochs": 3,
        }
    )
    whole = train(settings, toy_data, three_classes)

    class KilledError(Exception):
        pass

    def kill(report: EpochReport) -> bool:
        if report.epoch == 2:
            raise KilledError
        return False

    with pytest.raises(KilledError):
        train(settings, toy_data, three_classes, workers=alone(tmp_path), on_epoch=kill)
    told: list[int] = []
    resumed = train(
        settings, toy_data, three_classes, workers=alone(tmp_path), on_epoch=lambda report: told.append(report.epoch)
    )
    assert told == [3]
    assert same_weights(resumed, whole)
    left, right = ([report.model_dump(exclude=set(CLOCKS)) for report in model.reports] for model in (resumed, whole))
    assert left == right


@pytest.mark.parametrize(
    ("scheduler", "optimizer"),
    [("plateau", "adam"), *(pytest.param(*pair, marks=pytest.mark.long) for pair in PAUSED_TOO)],
)
def test_a_run_that_pauses_where_its_policy_and_rate_change_ends_as_one_that_does_not(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path,
    scheduler: str, optimizer: str,
) -> None:  # fmt: skip
    settings = toy_settings.with_values(
        {
            "scheduler.name": scheduler,
            "optimizer.name": optimizer,
            "optimizer.learning_rate": None,
            "epochs": 3,
            "scheduler.step_size_epochs": 1,
            "augmentation": "ops:d4@1+rotate@0.5*0.1/2:d4@1+rotate@0.5*0.9",
            "scheduler.learning_rate_factors": ((2, 0.5), (3, 2.0)),
        }
    )
    whole = train(settings, toy_data, three_classes)

    for pause_after in (1, 2, 2):
        paused = train(settings, toy_data, three_classes, workers=alone(tmp_path), pause_after=pause_after)
        assert len(paused.reports) == pause_after
    assert same_weights(train(settings, toy_data, three_classes, workers=alone(tmp_path)), whole)
    unchanged = train(settings.with_values({"scheduler.learning_rate_factors": ()}), toy_data, three_classes)
    ratios = [a.learning_rate / b.learning_rate for a, b in zip(whole.reports, unchanged.reports, strict=True)]
    assert ratios == pytest.approx([1.0, 0.5, 2.0])


def test_a_process_that_trains_keeps_what_it_frees(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("trainers.fitting.loop.keep_freed_memory", lambda *, of_any_size: asked.append(of_any_size))
    train(toy_settings.with_values({"epochs": 1}), toy_data, three_classes)
    assert asked == [True]


def test_a_finished_run_is_not_trained_again(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    settings = toy_settings.with_values({"epochs": 1})
    first = train(settings, toy_data, three_classes, workers=alone(tmp_path))
    second = train(
        settings, toy_data, three_classes, workers=alone(tmp_path), on_epoch=lambda _: pytest.fail("trained")
    )
    assert same_weights(first, second)


def test_another_run_in_the_same_folder_is_refused(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    train(toy_settings.with_values({"epochs": 1}), toy_data, three_classes, workers=alone(tmp_path))
    with pytest.raises(RefusedError, match="with other settings"):
        train(toy_settings.with_values({"epochs": 2}), toy_data, three_classes, workers=alone(tmp_path))
    fewer = TrainingData(
        toy_data.pixels, toy_data.image_ids, toy_data.labels, toy_data.train_index[:-1], toy_data.val_index
    )
    with pytest.raises(RefusedError, match="on other data"):
        train(toy_settings.with_values({"epochs": 1}), fewer, three_classes, workers=alone(tmp_path))
    # Machinery may change: it says where the run is done, not what it is.
    train(
        toy_settings.with_values({"epochs": 1, "workers.prefetch_batches": 9}),
        toy_data,
        three_classes,
        workers=alone(tmp_path),
    )


def test_saying_stop_stops_and_is_remembered(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    model = train(toy_settings, toy_data, three_classes, workers=alone(tmp_path), on_epoch=lambda _: True)
    assert len(model.reports) == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt").finished
    again = train(toy_settings, toy_data, three_classes, workers=alone(tmp_path))
    assert len(again.reports) == 1


def test_early_stopping_waits_as_long_as_it_was_told(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    # A step this small changes nothing, so no epoch after the first is better.
    settings = toy_settings.with_values(
        {"epochs": 6, "optimizer.learning_rate": 1e-12, "early_stop_patience_epochs": 2, "model.dropout": 0.0}
    )
    model = train(settings, toy_data, three_classes)
    assert len(model.reports) == model.best_epoch + 2


def test_a_loss_that_is_not_finite_stops_with_step_and_images(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    settings = toy_settings.with_values(
        {"model.name": "custom_cnn_base", "optimizer.learning_rate": 10.0, "optimizer.momentum": 0.99, "epochs": 20}
    )
    with pytest.raises(DivergedError, match=r"(at step \d+ of the epoch, on images|val image) [0-9a-f]{64}"):
        train(settings, toy_data, three_classes)


QUICK_MODELS = ("custom_cnn", "custom_cnn_base", "squeezenet", "efficientnet_lite0")
"""The suite of tests/vision/networks/test_networks.py takes a step with every model."""

REGISTERED = (
    [("model.name", name) for name in QUICK_MODELS]
    + [("optimizer.name", name) for name in OPTIMIZERS]
    + [("scheduler.name", name) for name in SCHEDULERS]
    + [("sampler", name) for name in SAMPLERS]
    + [("loss.name", name) for name in LOSSES]
)
OTHERS = [("model.scaling", "min_max"), ("precision", "bf16"), ("loss.label_smoothing", 0.1)]
# In the suite tests/trainers/test_contract.py trains with whatever is registered.
CHOICES = [*OTHERS, *(pytest.param(*choice, marks=pytest.mark.soak) for choice in REGISTERED)]


def test_the_suite_below_runs_every_choice() -> None:
    assert len(REGISTERED) == 4 + 4 + 4 + 3 + 5


@pytest.mark.parametrize(("name", "value"), CHOICES)
def test_every_choice_trains(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, name: str, value: object
) -> None:
    few = TrainingData(
        toy_data.pixels, toy_data.image_ids, toy_data.labels, toy_data.train_index[:16], toy_data.val_index[:6]
    )
    settings = toy_settings.with_values({"epochs": 1, "batch_size": 8, "optimizer.learning_rate": None, name: value})
    model = train(settings, few, three_classes)
    assert np.isfinite(model.best.train_loss)
    assert all(np.isfinite(value).all() for value in model.weights().values())


def test_fine_tuning_starts_from_the_given_weights(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, trained: TrainedModel
) -> None:
    settings = toy_settings.with_values({"epochs": 1, "optimizer.learning_rate": 1e-9, "optimizer.weight_decay": 0.0})
    tuned = train(settings, toy_data, three_classes, initial_weights=trained.weights())
    before, after = trained.weights(), tuned.weights()
    for name, _ in trained.network.named_parameters():
        assert np.allclose(before[name], after[name], atol=1e-6)
    with pytest.raises(IntegrityError, match="do not fit its architecture"):
        train(
            settings.with_values({"model.name": "custom_cnn_base"}),
            toy_data,
            three_classes,
            initial_weights=trained.weights(),
        )


def test_data_that_cannot_be_used(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    def with_(**changes: object) -> TrainingData:
        return TrainingData(**{**toy_data.__dict__, **changes})

    none = np.array([], dtype=np.int64)
    with pytest.raises(DataError, match="no image on the val split"):
        train(toy_settings, with_(val_index=none), three_classes)
    with pytest.raises(DataError, match="no image on the train split"):
        train(toy_settings, with_(train_index=none), three_classes)
    with pytest.raises(ContractError, match="both trained on and validated with"):
        train(toy_settings, with_(val_index=toy_data.train_index[:3]), three_classes)
    with pytest.raises(ContractError, match="from 0 to 2"):
        train(toy_settings, with_(labels=toy_data.labels + 1), three_classes)
    with pytest.raises(ContractError, match="do not match"):
        train(toy_settings, with_(image_ids=toy_data.image_ids[:-1]), three_classes)


def test_a_run_that_was_killed_with_sigkill_at_random_steps_ends_with_the_same_weights(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_run.py")
    run = runpy.run_path(str(script))
    random = np.random.default_rng(7)
    kills = [str(random.integers(first, last + 1)) for first, last in ((2, 9), (2, 4))]
    killed = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "killed"), *kills],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600, check=False, capture_output=True,
    )  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert killed.stdout.split() == [kills[0].encode(), b"killed"]
    assert not load_checkpoint(tmp_path / "killed" / "checkpoint.pt").finished
    resumed = run["train_here"](tmp_path / "killed")
    assert [report.epoch for report in resumed.reports] == [1, 2, 3]
    whole = run["train_here"](tmp_path / "whole")
    assert same_weights(resumed, whole)
    assert [report.train_loss for report in resumed.reports] == [report.train_loss for report in whole.reports]


def test_a_checkpoint_within_an_epoch_changes_nothing(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    settings = toy_settings.with_values({"optimizer.ema_decay": 0.9, "optimizer.accumulate_steps": 2})
    whole = train(settings, toy_data, three_classes)
    often = train(
        settings.with_values({"workers.checkpoint_every_steps": 1}), toy_data, three_classes, workers=alone(tmp_path)
    )
    assert same_weights(often, whole)


def test_the_mean_of_the_weights_is_what_is_validated_and_kept(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    settings = toy_settings.with_values({"epochs": 1, "optimizer.ema_decay": 0.999})
    mean = train(settings, toy_data, three_classes, workers=alone(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint.average is not None
    last = train(settings.with_values({"optimizer.ema_decay": None}), toy_data, three_classes)
    for name, parameter in mean.network.named_parameters():
        assert torch.equal(checkpoint.average[name], parameter)
        # Training itself is not touched: the last weights are those of a run without a mean.
        assert torch.equal(checkpoint.network[name], last.network.get_parameter(name))
    assert not same_weights(mean, last)
    assert mean.best.val_loss != last.best.val_loss


def test_parts_of_a_batch_are_the_batch(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    settings = toy_settings.with_values(
        {"model.name": "custom_cnn_base", "model.dropout": 0.0, "optimizer.learning_rate": 0.01}
    )
    whole, parts = (
        train(settings.with_values({"optimizer.accumulate_steps": steps}), toy_data, three_classes).weights()
        for steps in (1, 3)
    )
    # Sums in another order: 6e-5 apart after these steps on one processor, below 1e-5 on another.
    assert all(np.allclose(whole[name], parts[name], atol=2e-4) for name in whole)


def test_clipping_bounds_what_a_step_moves(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    settings = toy_settings.with_values(
        {
            "epochs": 1,
            "optimizer.momentum": 0.0,
            "optimizer.weight_decay": 0.0,
            "scheduler.name": "step",
            "optimizer.learning_rate": 1.0,
        }
    )
    start = train(settings.with_values({"optimizer.learning_rate": 1e-12}), toy_data, three_classes)
    clipped = train(settings.with_values({"optimizer.clip_norm": 1e-3}), toy_data, three_classes)
    pairs = zip(start.network.parameters(), clipped.network.parameters(), strict=True)
    moved = sum(float(((a - b) ** 2).sum()) for a, b in pairs) ** 0.5
    assert 0 < moved <= 3 * 1e-3 * 1.01  # three steps of at most 1e-3


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path,
    file_size_limit: Callable[[int], None],
) -> None:  # fmt: skip
    def fill(report: EpochReport) -> bool:
        file_size_limit(10_000)
        return False

    with pytest.raises(UnavailableError, match="cannot be written after epoch 2 "):
        train(toy_settings, toy_data, three_classes, workers=alone(tmp_path), on_epoch=fill)
    assert load_checkpoint(tmp_path / "checkpoint.pt").epochs_done == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_vanishes_stops_the_run(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    run_dir = tmp_path / "mounted"

    def unmount(report: EpochReport) -> bool:
        run_dir.rename(tmp_path / "elsewhere")
        return False

    with pytest.raises(UnavailableError, match="mounted is gone"):
        train(toy_settings, toy_data, three_classes, workers=alone(run_dir), on_epoch=unmount)
    assert not run_dir.exists()
    (tmp_path / "elsewhere").rename(run_dir)
    again = train(toy_settings, toy_data, three_classes, workers=alone(run_dir))
    assert same_weights(again, train(toy_settings, toy_data, three_classes))


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    # The learning rate rises to ten over a hundred epochs, from one that the first epoch bears.
    settings = toy_settings.with_values(
        {
            "model.name": "custom_cnn_base",
            "optimizer.learning_rate": 10.0,
            "optimizer.momentum": 0.99,
            "epochs": 400,
            "scheduler.warmup_epochs": 100.0,
        }
    )
    with pytest.raises(DivergedError) as caught:
        train(settings, toy_data, three_classes, workers=alone(tmp_path))
    told = re.fullmatch(
        r"epoch (\d+): .*(at step \d+ of the epoch, on images|val image) [0-9a-f]{64}.*; "
        rf"the last good checkpoint is after epoch (\d+), in {tmp_path}",
        str(caught.value),
    )
    assert told is not None
    assert int(told[1]) - 1 == int(told[3]) == load_checkpoint(tmp_path / "checkpoint.pt").epochs_done
