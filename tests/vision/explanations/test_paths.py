"""Maps along paths: hand numbers, steps that are doubled, seeds, and one class held against another."""

import pytest
import torch
from torch import nn

from vision.explanations.paths import gradient_shap, integrated_gradients_within
from vision.inference.attribution import ClassAgainst


@pytest.fixture
def linear_network():
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2, bias=False)).eval().requires_grad_(False)
    nn.init.normal_(network[1].weight, generator=torch.Generator().manual_seed(0))
    return network


def image(seed=1):
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Steep(nn.Module):
    """A steep step half-way to the image: coarse integrals miss it."""

    def forward(self, inputs):
        return torch.sigmoid(400 * (inputs.mean(dim=(1, 2, 3)) - 0.37))[:, None]


def test_steps_are_doubled_until_the_map_adds_up_or_the_limit_comes():
    found = integrated_gradients_within(Steep(), torch.ones(1, 3, 8, 8))
    assert found.steps > 50
    assert found.completeness_error <= 0.02
    assert float(found.values.sum()) == pytest.approx(1.0, abs=0.02)
    never = integrated_gradients_within(Steep(), torch.ones(1, 3, 8, 8), allowed=-1.0)
    assert never.steps == 400


def test_a_class_against_another_is_the_difference_of_both(linear_network):
    maps = {
        key: integrated_gradients_within(ClassAgainst(linear_network, *key), image()).values
        for key in ((1, 0), (1, None), (0, None))
    }
    assert torch.allclose(maps[1, 0], maps[1, None] - maps[0, None], atol=1e-4)
    expected = ((linear_network[1].weight[1] - linear_network[1].weight[0]).view(3, 8, 8) * image()[0]).sum(dim=0)
    assert torch.allclose(maps[1, 0][0], expected, atol=1e-4)


def test_gradient_shap_of_a_linear_network_is_weight_times_distance_to_the_drawn_baselines(linear_network):
    network = ClassAgainst(linear_network, 1, None)
    found = gradient_shap(network, image(), num_samples=64, seed=3)
    # Whatever is drawn, a linear output is explained completely.
    assert found.completeness_error < 1e-4
    assert torch.equal(found.values, gradient_shap(network, image(), num_samples=64, seed=3).values)
    assert not torch.equal(found.values, gradient_shap(network, image(), num_samples=64, seed=4).values)


def test_an_output_that_does_not_change_has_no_completeness_error(linear_network):
    with torch.no_grad():
        linear_network[1].weight.zero_()
    found = integrated_gradients_within(ClassAgainst(linear_network, 1, None), image())
    assert (found.steps, found.completeness_error) == (50, None)
