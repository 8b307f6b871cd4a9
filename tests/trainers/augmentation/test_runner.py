"""Running policies: reproducible per image and seed, whatever the batch, for every policy and operation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from records.arrays import UInt8Array
from trainers.augmentation import OPERATIONS, POLICIES, Augmenter, Operation, Policy, load_policy
from trainers.augmentation.operations import Canvas
from vision.seeding import image_seeds

SIDE_PX = 32
CANVAS = Canvas(SIDE_PX, (200.0, 120.0, 90.0))
KEYS = np.arange(40, dtype=np.uint64)


def seeds(epoch: int = 0, occurrence: int = 0) -> NDArray[np.uint64]:
    return image_seeds(7, epoch, KEYS, np.full(len(KEYS), occurrence))


@pytest.fixture(scope="module")
def images() -> UInt8Array:
    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX]
    base = np.stack([rows * 6, columns * 6, 60 + rows + columns], axis=-1)
    return np.clip(base[None] + np.arange(40)[:, None, None, None], 0, 255).astype(np.uint8)


def only(name: str) -> Policy:
    return Policy(name=name, operations=(Operation(operation=name, probability=1.0),))


ALL = [*(load_policy(name) for name in POLICIES), *(only(name) for name in OPERATIONS)]


def test_the_suite_runs_all_policies_and_operations() -> None:
    assert len(ALL) == 8 + 15


@pytest.mark.parametrize("policy", ALL, ids=lambda policy: policy.name)
def test_an_image_depends_on_its_seed_and_on_nothing_else(policy: Policy, images: UInt8Array) -> None:
    together = Augmenter(policy, CANVAS).apply(images.copy(), seeds())
    assert together.shape == images.shape
    assert together.dtype == np.uint8
    augmenter = Augmenter(policy, CANVAS)
    backwards = augmenter.apply(images[::-1].copy(), seeds()[::-1])
    assert np.array_equal(backwards[::-1], together)
    alone = augmenter.apply(images[7:8].copy(), seeds()[7:8])
    assert np.array_equal(alone[0], together[7])


@pytest.mark.parametrize("policy", ALL[1:], ids=lambda policy: policy.name)
def test_another_epoch_or_a_second_showing_looks_different(policy: Policy, images: UInt8Array) -> None:
    augmenter = Augmenter(policy, CANVAS)
    first = augmenter.apply(images.copy(), seeds())
    if policy.name in {"horizontal_flip", "vertical_flip"}:
        assert not np.array_equal(first, images)
        return
    assert not np.array_equal(first, augmenter.apply(images.copy(), seeds(epoch=1)))
    assert not np.array_equal(first, augmenter.apply(images.copy(), seeds(occurrence=1)))


def test_no_policy_changes_nothing(images: UInt8Array) -> None:
    assert np.array_equal(Augmenter(load_policy("none"), CANVAS).apply(images.copy(), seeds()), images)


def test_flips_are_flips(images: UInt8Array) -> None:
    flipped = Augmenter(only("horizontal_flip"), CANVAS).apply(images.copy(), seeds())
    assert np.array_equal(flipped, images[:, :, ::-1])
    upside_down = Augmenter(only("vertical_flip"), CANVAS).apply(images.copy(), seeds())
    assert np.array_equal(upside_down, images[:, ::-1])


def test_probability_is_the_share_of_changed_images(images: UInt8Array) -> None:
    policy = Policy(name="some", operations=(Operation(operation="horizontal_flip", probability=0.3),))
    many = np.repeat(images[:1], 2000, axis=0)
    keys = np.arange(2000, dtype=np.uint64)
    changed = Augmenter(policy, CANVAS).apply(many.copy(), image_seeds(0, 0, keys, np.zeros(2000, dtype=np.int64)))
    share = (changed != many).any(axis=(1, 2, 3)).mean()
    assert share == pytest.approx(0.3, abs=0.04)


def test_cutout_covers_with_the_mean_colour(images: UInt8Array) -> None:
    out = Augmenter(only("cutout"), CANVAS).apply(images.copy(), seeds())
    changed = (out != images).any(axis=-1)
    assert changed.any(axis=(1, 2)).all()
    assert np.array_equal(np.unique(out[changed], axis=0), [[200, 120, 90]])
    assert changed.mean() < 0.3**2 + 0.01


def test_parameters_reach_the_transform(images: UInt8Array) -> None:
    dull = Operation(
        operation="color_jitter", probability=1.0, parameters={"brightness": 0, "contrast": 0, "saturation": 0}
    )
    out = Augmenter(Policy(name="dull", operations=(dull,)), CANVAS).apply(images.copy(), seeds())
    assert np.abs(out.astype(int) - images).max() <= 1
