"""Attacks on linear models, where the epsilon at which a prediction flips can be computed by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from records.bundles import Calibration, Geometry
from records.errors import ContractError
from trainers.evaluation.robustness import PixelNetwork, Sample, attacks_on, robustness_curves, work_of
from vision.inference.loaded import reference_logits
from vision.preprocess import scale_pixels, to_tensor

PLAIN = Geometry(side_px=2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
"""Pixel values in [0, 1] as they are."""


class ThreeColours(nn.Module):
    """logit_c = sum over pixels of colour c: three classes, one per colour."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.sum(dim=(2, 3))


def images_of(*colours: tuple[int, int, int]) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), colour, dtype=np.uint8) for colour in colours])


def sample_of(taxonomy, labels, threshold=None, shares=None):
    labels = np.array(labels)
    shares = np.full(3, 1 / 3) if shares is None else np.array(shares)
    return Sample(labels, np.arange(len(labels)), shares, taxonomy, threshold)


def figures(report, attack, name):
    return {point.epsilon: getattr(point, name) for point in report.attacks[attack]}


def test_a_linear_prediction_flips_where_computed(three_classes):
    # Red leads green by 20 of 255 and blue by 100. The gradient lowers red and raises the others, so the
    # lead over green shrinks by 2 epsilon: at 9 it is still 2, at 11 it is gone.
    pixels = images_of((120, 100, 20), (120, 100, 20))
    report = robustness_curves(
        PixelNetwork(ThreeColours(), PLAIN), pixels, sample_of(three_classes, [0, 0]), epsilons=(9, 11)
    )
    for attack in ("fgsm", "pgd"):
        assert figures(report, attack, "accuracy") == {0: 1.0, 9: 1.0, 11: 0.0}
    assert (report.images, report.groups, report.key_class) == (2, 2, None)


def test_values_stay_in_the_valid_range(three_classes):
    # Green cannot rise above 255: the lead of 41 shrinks by epsilon plus at most 1.
    pixels = images_of((255, 214, 0))
    clipped = images_of((255, 254, 0))
    model = PixelNetwork(ThreeColours(), PLAIN)
    report = robustness_curves(model, pixels, sample_of(three_classes, [0]), epsilons=(20, 21))
    assert figures(report, "fgsm", "accuracy") == {
        0: 1.0, 20: 1.0, 21: 0.0,
    }  # fmt: skip
    attack = attacks_on(model)["pgd"]
    values = torch.from_numpy(clipped.transpose(0, 3, 1, 2)).float() / 255
    changed = attack(values, torch.tensor([1]), 30 / 255)
    assert changed.min() >= 0
    assert changed.max() <= 1
    assert (changed - values).abs().max() <= 30 / 255 + 1e-6


def test_a_sure_network_is_attacked_too(three_classes):
    # 1 - p is 4e-14 here: the cross-entropy's gradient is zero in fp32 and would call this network robust.
    calibration = Calibration(temperature=0.01, bias=[0.0, 0.0, 0.0])
    pixels = images_of((120, 100, 20))
    report = robustness_curves(
        PixelNetwork(ThreeColours(), PLAIN, calibration), pixels, sample_of(three_classes, [0]), epsilons=(11,)
    )
    assert figures(report, "fgsm", "accuracy") == {0: 1.0, 11: 0.0}


def test_key_class_and_shares_by_hand(three_classes):
    # Blue is the key class. p(blue) of the first is softmax(4 * (0, 0, 0.2))_2 = 0.527, of the second 0.330.
    pixels = images_of((100, 100, 151), (100, 100, 99), (120, 100, 20), (100, 120, 20))
    sample = sample_of(three_classes, [2, 2, 0, 1], threshold=0.32, shares=[0.7, 0.2, 0.1])
    report = robustness_curves(PixelNetwork(ThreeColours(), PLAIN), pixels, sample, epsilons=(11,))
    clean, attacked = report.attacks["pgd"]
    assert (clean.key_class_sensitivity, clean.key_class_referred) == (0.5, 1.0)
    # 1, 1 and one half of the classes at their shares 0.7, 0.2 and 0.1
    assert clean.accuracy == pytest.approx(0.95)
    assert clean.balanced_accuracy == pytest.approx(2.5 / 3)
    # The first keeps its lead of 51 - 22 and is both predicted and referred; the second is lost.
    assert (attacked.key_class_sensitivity, attacked.key_class_referred) == (0.5, 0.5)
    assert attacked.balanced_accuracy == pytest.approx(0.5 / 3)
    assert attacked.accuracy == pytest.approx(0.05)
    assert attacked.key_class_sensitivity_ci[0] < 0.5 < attacked.key_class_sensitivity_ci[1]


@pytest.mark.parametrize("scaling", ["mean_std", "min_max"])
def test_epsilon_zero_is_the_clean_prediction(make_network, filled_store, scaling):
    taxonomy = filled_store.taxonomy
    geometry = Geometry(side_px=32, scaling=scaling, mean=(0.7, 0.6, 0.5), std=(0.2, 0.25, 0.3))
    network = make_network("custom_cnn", 7, 3)
    pixels = np.random.default_rng(1).integers(0, 256, size=(40, 32, 32, 3), dtype=np.uint8)
    pixels[0] = 77
    logits = reference_logits(network, pixels, geometry)
    labels = logits.argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % 7
    sample = Sample(labels, np.arange(40) // 2, np.bincount(labels, minlength=7) / 40, taxonomy)
    model = PixelNetwork(network, geometry)
    values = torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float() / 255
    assert model(values).numpy() == pytest.approx(
        network(scale_pixels(to_tensor(pixels), geometry)).detach().numpy(), abs=1e-4
    )
    seen = []
    report = robustness_curves(model, pixels, sample, epsilons=(2, 1), pgd_steps=3, on_batch=seen.append)
    assert sum(seen) == work_of(40, (1, 2)) == 160
    for points in report.attacks.values():
        assert [point.epsilon for point in points] == [0, 1, 2]
        # 30 of 40 are right, and the class shares are the sample's own
        assert points[0].accuracy == pytest.approx(0.75)
    pgd = figures(report, "pgd", "accuracy")
    assert pgd[0] >= pgd[1] >= pgd[2]
    assert report == robustness_curves(model, pixels, sample, epsilons=(1, 2), pgd_steps=3)


def test_refused(three_classes):
    model = PixelNetwork(ThreeColours(), PLAIN)
    pixels = images_of((120, 100, 20))
    with pytest.raises(ContractError, match="not negative"):
        robustness_curves(model, pixels, sample_of(three_classes, [0]), epsilons=(-1,))
    with pytest.raises(ContractError, match="an image per label"):
        robustness_curves(model, pixels, sample_of(three_classes, [0, 1]))
    broken = PixelNetwork(ThreeColours(), PLAIN, Calibration(temperature=1.0, bias=[float("nan"), 0.0, 0.0]))
    with pytest.raises(ContractError, match="not finite"):
        robustness_curves(broken, pixels, sample_of(three_classes, [0]))
