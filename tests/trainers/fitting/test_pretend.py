"""The leak demonstration: what each cut puts on both splits, and that the leaky ones boast."""

from dataclasses import replace

import numpy as np
import pytest

from records.datasets import build_version
from records.errors import DataError
from records.store import Store
from trainers.fitting.pretend import cut_at_random, cut_by_group, cut_oversampled, pretend
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings


def test_cutting_by_group_shares_no_group() -> None:
    groups = np.array([f"g{n // 3}" for n in range(300)])
    cut = cut_by_group(groups, seed=1)
    assert not set(groups[cut.train]) & set(groups[cut.test])
    assert len(cut.test) == pytest.approx(60, abs=3)
    assert sorted([*cut.train, *cut.test]) == list(range(300))
    two = cut_by_group(np.array(["a", "a", "b"]), seed=0)
    assert len(two.train) > 0
    assert len(two.test) > 0


def test_cutting_at_random_splits_groups_but_no_image() -> None:
    cut = cut_at_random(300, seed=1)
    assert (len(cut.train), len(cut.test)) == (240, 60)
    assert sorted([*cut.train, *cut.test]) == list(range(300))
    groups = np.arange(300) // 3
    assert np.isin(groups[cut.test], groups[cut.train]).mean() > 0.9


def test_oversampling_first_puts_copies_on_both_splits() -> None:
    labels = np.repeat([0, 1, 2], [270, 20, 10])
    cut = cut_oversampled(labels, seed=1)
    both = [*cut.train, *cut.test]
    assert np.bincount(labels[both]).tolist() == [100, 100, 100]
    rare = [row for row in cut.test if labels[row] > 0]
    assert np.isin(rare, cut.train).all()
    common = [row for row in cut.test if labels[row] == 0]
    assert not np.isin(common, cut.train).any()
    # Every image of a small class comes equally often, within one.
    counts = np.bincount(both, minlength=300)[270:]
    assert set(counts.tolist()) == {5, 10}


def test_leaky_splits_boast(filled_store: Store) -> None:
    settings = TrainersSettings(
        model=ModelSettings(name="custom_cnn", side_px=32),
        epochs=1,
        batch_size=32,
        precision="fp32",
        workers=WorkersSettings(threads=1, use_gpu=False),
        augmentation="flips",
    )
    dataset = build_version(filled_store).version
    report = pretend(filled_store, settings, dataset)
    honest, random, oversampled = report.splits
    assert [split.name for split in report.splits] == ["by_lesion", "random_images", "oversampled_first"]
    assert honest.leaked_test_share == 0.0
    assert random.leaked_test_share > 0.1
    assert oversampled.leaked_test_share > 0.5
    for split in report.splits:
        assert split.gap == pytest.approx(split.pretended.balanced_accuracy - split.honest.balanced_accuracy, abs=1e-4)


def test_too_few_images_are_refused(filled_store: Store) -> None:
    dataset = build_version(filled_store).version
    rows = dataset.rows[dataset.rows["split"] != "val"]
    with pytest.raises(DataError, match="at least two groups on the train split and an image on the val split"):
        pretend(filled_store, TrainersSettings(model=ModelSettings(side_px=32)), replace(dataset, rows=rows))
