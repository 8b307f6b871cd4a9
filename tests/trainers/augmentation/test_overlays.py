"""What is painted by us: where it falls, how much it covers, and that it follows from the seed alone."""

import numpy as np
import pytest

from records.arrays import UInt8Array
from trainers.augmentation.overlays import Painted, paint_hair, paint_ruler, paint_vignette
from trainers.augmentation.parameters import HairParameters, Parameters, RulerParameters, VignetteParameters

PAINTERS = [
    (paint_vignette, VignetteParameters()),
    (paint_hair, HairParameters()),
    (paint_ruler, RulerParameters()),
]


def skin(side_px: int) -> UInt8Array:
    return np.full((side_px, side_px, 3), (210, 160, 140), dtype=np.uint8)


@pytest.mark.parametrize(("painter", "parameters"), PAINTERS)
@pytest.mark.parametrize("side_px", [8, 33, 224])
def test_the_seed_alone_decides_at_any_side(painter, parameters: Parameters, side_px: int) -> None:
    first, second, other = (painter(skin(side_px), parameters, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (side_px, side_px, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, second)
    assert side_px == 8 or not np.array_equal(first, other)


def test_a_vignette_keeps_the_centre_and_darkens_the_corners() -> None:
    parameters = VignetteParameters(radius=(0.9, 0.9), softness=(0.02, 0.02), shift=0)
    out = paint_vignette(skin(100), parameters, np.random.default_rng(0))
    assert np.array_equal(out[20:80, 20:80], skin(100)[20:80, 20:80])
    assert out[[0, 0, -1, -1], [0, -1, 0, -1]].max() <= 30
    bright = (out == skin(100)).all(axis=-1).mean()
    assert bright == pytest.approx(np.pi * 0.45**2, abs=0.03)


def test_hairs_are_thin_and_dark() -> None:
    parameters = HairParameters(count=(1, 1), width=(0.01, 0.01), opacity=(1.0, 1.0))
    painted = [paint_hair(skin(200), parameters, np.random.default_rng(seed)) for seed in range(40)]
    covered = [(image != skin(200)).any(axis=-1).mean() for image in painted]
    # At most 1.2 sides long and, with its soft edge, about 3 px wide.
    assert max(covered) < 1.3 * 3.5 / 200
    assert min(covered) > 0
    many = HairParameters(count=(20, 20), width=(0.01, 0.01), opacity=(1.0, 1.0))
    hairy = paint_hair(skin(200), many, np.random.default_rng(0))
    assert hairy.max(axis=-1).min() < 120
    assert (hairy <= skin(200)).all()


def test_a_ruler_has_evenly_spaced_marks_along_one_edge() -> None:
    parameters = RulerParameters(spacing=(0.1, 0.1), length=(0.05, 0.05), opacity=(1.0, 1.0))
    out = paint_ruler(skin(200), parameters, np.random.default_rng(3))
    changed = (out != skin(200)).any(axis=-1)
    edges = [changed[:70], changed[-70:], changed[:, :70], changed[:, -70:]]
    assert max(edge.sum() for edge in edges) == changed.sum() > 0
    along = changed.any(axis=0) if changed.any(axis=0).sum() > changed.any(axis=1).sum() else changed.any(axis=1)
    starts = np.flatnonzero(np.diff(along.astype(int)) == 1)
    assert 9 <= len(starts) <= 12
    assert np.diff(starts) == pytest.approx(20, abs=4)


def test_probability_is_the_share_that_is_painted() -> None:
    painted = Painted(paint_vignette, VignetteParameters(), 0.25)
    painted.set_random_state(np.random.default_rng(0), None)  # type: ignore[arg-type]
    image = skin(16)
    changed = [painted(image=image)["image"] is not image for _ in range(1000)]
    assert np.mean(changed) == pytest.approx(0.25, abs=0.05)
    assert np.array_equal(image, skin(16))
