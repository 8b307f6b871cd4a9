"""The preview shows what a run would draw."""

import hashlib

import numpy as np
import pytest

from records.arrays import UInt8Array
from records.errors import ContractError
from trainers.augmentation import POLICIES, Augmenter, load_policy
from trainers.augmentation.operations import Canvas
from trainers.augmentation.preview import operation_grid, paint_preview, policy_grid
from vision.seeding import image_keys, image_seeds

IDS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(3)]


@pytest.fixture(scope="module")
def pixels() -> UInt8Array:
    return np.random.default_rng(0).integers(80, 200, size=(3, 24, 24, 3), dtype=np.uint8)


def test_columns_are_the_epochs_of_a_run(pixels: UInt8Array) -> None:
    policy = load_policy("dermatoscope")
    grid = policy_grid(policy, pixels, IDS, draws=2, seed=5)
    assert grid.shape == (3, 3, 24, 24, 3)
    assert np.array_equal(grid[:, 0], pixels)
    mean = [float(round(v)) for v in pixels.mean(axis=(0, 1, 2))]
    augmenter = Augmenter(policy, Canvas(24, (mean[0], mean[1], mean[2])))
    seeds = image_seeds(5, 1, image_keys(IDS), np.zeros(3, dtype=np.int64))
    assert np.array_equal(grid[:, 2], augmenter.apply(pixels.copy(), seeds))


def test_operations_are_shown_alone_and_always(pixels: UInt8Array) -> None:
    policy = load_policy("dermatoscope")
    grid = operation_grid(policy, pixels, IDS, draws=3)
    assert grid.shape == (9, 4, 24, 24, 3)
    changed = (grid[:, 1:] != grid[:, :1]).any(axis=(2, 3, 4))
    assert changed.any(axis=1).all()
    assert operation_grid(load_policy("none"), pixels, IDS, draws=3).shape == (0, 4, 24, 24, 3)


@pytest.mark.parametrize("name", POLICIES)
def test_a_sheet_holds_every_row(name: str, pixels: UInt8Array) -> None:
    policy = load_policy(name)
    sheet = paint_preview(policy, pixels, IDS, ["a", "b", "c"], draws=2)
    assert sheet.height >= 28 * (3 + len(policy.operations))


def test_nothing_to_show_is_refused(pixels: UInt8Array) -> None:
    with pytest.raises(ContractError, match="a preview needs images"):
        policy_grid(load_policy("none"), pixels, IDS[:2], draws=2)
    with pytest.raises(ContractError, match="a preview needs images"):
        policy_grid(load_policy("none"), pixels, IDS, draws=0)
