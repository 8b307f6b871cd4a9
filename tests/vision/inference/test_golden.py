"""Golden images: the same for ever, generated, and in a network's usual range."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from records.bundles import Geometry
from records.ids import sha256_hex
from vision.inference.fold import fold_batch_norm
from vision.inference.golden import CONTRASTS, NUM_IMAGES, golden_arrays, golden_images
from vision.inference.loaded import GOLDEN_TOLERANCE, reference_logits
from vision.networks import build_model
from vision.preprocess import scale_pixels, to_tensor

COLOURS = ((230, 160, 40), (60, 160, 70), (130, 60, 130))
GEOMETRY = Geometry(side_px=48, mean=(0.7, 0.55, 0.5), std=(0.15, 0.15, 0.2))


def test_equal_geometries_give_equal_images() -> None:
    images = golden_images(GEOMETRY)
    assert images.shape == (NUM_IMAGES, 48, 48, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images, golden_images(GEOMETRY))
    assert not np.array_equal(images, golden_images(GEOMETRY.model_copy(update={"mean": (0.6, 0.55, 0.5)})))


def test_they_differ_from_each_other_and_look_like_the_training_images() -> None:
    images = golden_images(GEOMETRY)
    assert len({sha256_hex(image.tobytes()) for image in images}) == NUM_IMAGES
    standardised = (images / 255.0 - np.array(GEOMETRY.mean)) / np.array(GEOMETRY.std)
    assert np.abs(standardised.mean()) < 1.0
    assert 0.3 < standardised.std() < 2.0


class Magnifier(nn.Module):
    """Two logits: the mean of an image, and rounding magnified, but only beyond `limit` deviations."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, inputs: Tensor) -> Tensor:
        """Return [N, 2] for [N, 3, S, S]."""
        mean, largest = inputs.mean(dim=(1, 2, 3)), inputs.abs().amax(dim=(1, 2, 3))
        lost = ((mean + 1e4) - 1e4 - mean) * (largest > self.limit)
        return torch.stack([mean, lost * 1e3], dim=1)


@pytest.mark.parametrize(
    ("limit", "contrast"),
    [(1e9, CONTRASTS[0]), (4.0, CONTRASTS[1]), (2.5, CONTRASTS[2]), (-1.0, CONTRASTS[0])],
    ids=["well conditioned", "at the first contrast", "at two of them", "at every one"],
)
def test_they_have_the_highest_contrast_at_which_rounding_decides_no_logit(limit: float, contrast: float) -> None:
    geometry = GEOMETRY.model_copy(update={"mean": (0.5, 0.5, 0.5), "std": (0.1, 0.1, 0.1)})
    found = golden_arrays(Magnifier(limit).eval(), geometry)
    assert np.array_equal(found["inputs"], golden_images(geometry, contrast))
    assert np.array_equal(found["logits"], reference_logits(Magnifier(limit), found["inputs"], geometry))


@pytest.mark.parametrize("name", ["efficientnet_b0"])
def test_a_network_whose_statistics_are_of_few_alike_images_computes_its_golden_logits_folded(name: str) -> None:
    torch.manual_seed(0)
    network = build_model(name, 3)
    rows, columns = np.mgrid[:32, :32]
    random = np.random.default_rng(3)
    pixels = random.normal(200, 15, (18, 32, 32, 3))
    for number, image in enumerate(pixels):
        image[np.hypot(rows - 16, columns - 16) < random.integers(6, 14)] = COLOURS[number % 3]
    pixels = pixels.clip(0, 255).astype(np.uint8)
    values = pixels.reshape(-1, 3) / 255.0
    geometry = Geometry(side_px=32, mean=tuple(values.mean(axis=0)), std=tuple(values.std(axis=0)))
    with torch.no_grad():
        for module in network.eval().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
                module.momentum = None
                module.train()
        network(scale_pixels(to_tensor(pixels), geometry))
    golden = golden_arrays(network.eval(), geometry)
    folded = nn.Sequential(fold_batch_norm(network.get_submodule("features")), network.get_submodule("head"))
    difference = np.abs(reference_logits(folded, golden["inputs"], geometry) - golden["logits"]).max()
    assert difference <= 0.1 * GOLDEN_TOLERANCE["fp32"] * max(1.0, float(np.abs(golden["logits"]).max()))
