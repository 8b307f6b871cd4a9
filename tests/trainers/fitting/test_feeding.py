"""Batches: the same whoever computes them; shares add up; errors and early exits leave no thread behind."""

import threading

import numpy as np
import pytest

from trainers.augmentation import Augmenter, load_policy
from trainers.augmentation.operations import Canvas
from trainers.fitting.feeding import Batch, Feeder
from trainers.fitting.training_data import TrainingData
from trainers.settings import TrainersSettings

CANVAS = Canvas(32, (128.0, 128.0, 128.0))


def feeder(data: TrainingData, rank: int = 0, world_size: int = 1, **changes: object) -> Feeder:
    settings = TrainersSettings().with_values({"batch_size": 16, "augmentation": "light", **changes})
    augmenter = Augmenter(load_policy(settings.augmentation), CANVAS)
    return Feeder(
        data.pixels,
        data.labels,
        data.image_ids,
        data.train_index,
        augmenter,
        settings,
        rank=rank,
        world_size=world_size,
    )


def joined(batches: list[Batch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.concatenate([getattr(b, name) for b in batches]) for name in ("pixels", "labels", "rows"))  # type: ignore[return-value]


def test_an_epoch_is_whole_batches_of_training_images_with_their_labels(toy_data: TrainingData) -> None:
    batches = list(feeder(toy_data).epoch(0))
    assert len(batches) == feeder(toy_data).steps_per_epoch == 5
    pixels, labels, rows = joined(batches)
    assert pixels.shape == (80, 32, 32, 3)
    assert np.array_equal(labels, toy_data.labels[rows])
    assert np.isin(rows, toy_data.train_index).all()


def test_a_feeder_repeats_itself_however_far_it_runs_ahead(toy_data: TrainingData) -> None:
    first = joined(list(feeder(toy_data, **{"workers.prefetch_batches": 1}).epoch(2)))
    second = joined(list(feeder(toy_data, **{"workers.prefetch_batches": 64}).epoch(2)))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    other = joined(list(feeder(toy_data).epoch(3)))
    assert not np.array_equal(first[0], other[0])


def test_an_epoch_of_a_policy_with_phases_holds_what_its_phase_alone_would_make(toy_data: TrainingData) -> None:
    """Byte for byte, in whichever order the epochs are asked for: a run that goes on sees what it would have seen."""
    first, later = "rotate@1*0.1+d4@1", "rotate@1*0.8+d4@1"
    changing = feeder(toy_data, augmentation=f"ops:{first}/3:{later}")
    for epoch, alone in ((2, later), (0, first), (1, first), (3, later)):
        left = joined(list(changing.epoch(epoch)))
        right = joined(list(feeder(toy_data, augmentation=f"ops:{alone}").epoch(epoch)))
        assert all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))
    assert not np.array_equal(left[0], joined(list(feeder(toy_data, augmentation=f"ops:{first}").epoch(3)))[0])


def test_two_shares_make_the_whole(toy_data: TrainingData) -> None:
    whole = list(feeder(toy_data).epoch(1))
    halves = [list(feeder(toy_data, rank, 2).epoch(1)) for rank in (0, 1)]
    for batch, left, right in zip(whole, *halves, strict=True):
        assert np.array_equal(batch.pixels[0::2], left.pixels)
        assert np.array_equal(batch.pixels[1::2], right.pixels)
        assert np.array_equal(batch.rows[1::2], right.rows)


def test_the_images_themselves_are_never_changed(toy_data: TrainingData) -> None:
    before = toy_data.pixels.take(np.arange(96)).copy()
    list(feeder(toy_data, augmentation="dissertation").epoch(0))
    assert np.array_equal(toy_data.pixels.take(np.arange(96)), before)


def test_leaving_early_ends_the_thread(toy_data: TrainingData) -> None:
    batches = feeder(toy_data).epoch(0)
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feeder")]


def test_an_error_in_the_background_reaches_the_loop(toy_data: TrainingData) -> None:
    broken = TrainingData(_Broken(), toy_data.image_ids, toy_data.labels, toy_data.train_index, toy_data.val_index)
    with pytest.raises(OSError, match="disk is gone"):
        list(feeder(broken).epoch(0))


class _Broken:
    def __len__(self) -> int:
        return 96

    def take(self, indices: object) -> np.ndarray:
        raise OSError("disk is gone")


@pytest.mark.parametrize("policy", ["mixup", "cutmix"])
def test_a_mixed_batch_is_the_same_however_it_is_shared(policy: str, toy_data: TrainingData) -> None:
    whole = list(feeder(toy_data, augmentation=policy).epoch(1))
    halves = [list(feeder(toy_data, rank, 2, augmentation=policy).epoch(1)) for rank in (0, 1)]
    mixed = [batch for batch in whole if batch.partner_labels is not None]
    assert 0 < len(mixed) < len(whole)
    for batch, *parts in zip(whole, *halves, strict=True):
        for rank, part in enumerate(parts):
            assert np.array_equal(batch.pixels[rank::2], part.pixels)
            assert batch.share == part.share
            assert (batch.partner_labels is None) == (part.partner_labels is None)
            if batch.partner_labels is not None:
                assert np.array_equal(batch.partner_labels[rank::2], part.partner_labels)


def test_mixing_changes_mixed_batches_only(toy_data: TrainingData) -> None:
    plain, mixed = (list(feeder(toy_data, augmentation=name).epoch(1)) for name in ("light", "mixup"))
    for before, after in zip(plain, mixed, strict=True):
        assert np.array_equal(before.labels, after.labels)
        assert np.array_equal(before.pixels, after.pixels) == (after.partner_labels is None)
