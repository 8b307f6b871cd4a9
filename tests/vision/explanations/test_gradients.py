"""Methods that differentiate or cover: hand numbers, completeness, seeds, classes compared, no state left behind."""

import pytest
import torch
from torch import nn

from vision.explanations.gradients import (
    ClassAgainst,
    gradient_shap,
    head_gradcam,
    in_flight,
    integrated_gradients,
    integrated_gradients_within,
    occlusion,
)
from vision.explanations.methods import METHODS


@pytest.fixture
def linear_network():
    """logit_c = sum of weights_c * image: attributions are known exactly."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2, bias=False)).eval().requires_grad_(False)
    nn.init.normal_(network[1].weight, generator=torch.Generator().manual_seed(0))
    return network


def test_integrated_gradients_of_a_linear_network_is_weight_times_input(linear_network):
    inputs = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([0, 1, 1])
    expected = (linear_network[1].weight[target].view(3, 3, 8, 8) * inputs).sum(dim=1)
    assert torch.allclose(integrated_gradients(linear_network, inputs, target), expected, atol=1e-5)


def test_integrated_gradients_add_up_to_the_change_of_the_logit(make_network):
    network = make_network("custom_cnn", 7, 0).requires_grad_(False)
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    target = torch.tensor([0, 4])
    maps = integrated_gradients(network, inputs, target, steps=200)
    with torch.inference_mode():
        change = (network(inputs) - network(torch.zeros_like(inputs)))[torch.arange(2), target]
    assert torch.allclose(maps.sum(dim=(1, 2)), change, rtol=0.1, atol=0.05)


def test_occlusion_of_a_linear_network_is_the_part_under_the_window(linear_network):
    inputs = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    maps = occlusion(linear_network, inputs, torch.tensor([1]), window_px=1)
    expected = (linear_network[1].weight[1].view(3, 8, 8) * inputs[0]).sum(dim=0)
    assert torch.allclose(maps[0], expected, atol=1e-5)


def test_gradcam_of_a_head_with_layers_after_the_pooling_by_hand():
    # One channel, 2x2. pooled = mean(A) = 2; logit_0 = relu(3 * pooled) -> weight 3/4; logit_1 = relu(-pooled) -> 0.
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2, bias=False), nn.ReLU()).eval()
    with torch.no_grad():
        head[2].weight.copy_(torch.tensor([[3.0], [-1.0]]))
    features = torch.tensor([[[[1.0, -2.0], [4.0, 5.0]]]]).repeat(2, 1, 1, 1)
    maps = head_gradcam(head, features, torch.tensor([0, 1]))
    assert maps.tolist() == [[[0.75, 0.0], [3.0, 3.75]], [[0.0, 0.0], [0.0, 0.0]]]


def test_nothing_is_left_on_a_network(make_network):
    network = make_network("custom_cnn", 7, 0)
    inputs, target = torch.randn(1, 3, 32, 32), torch.tensor([2])
    integrated_gradients(network, inputs, target, steps=2)
    occlusion(network, inputs, target)
    with torch.inference_mode():
        features = network.features(inputs)
    head_gradcam(network.head, features, target)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
    assert inputs.grad is None
    assert not inputs.requires_grad


def test_large_images_are_computed_in_smaller_numbers(linear_network):
    assert [in_flight(side) for side in (32, 112, 224, 299, 2000)] == [32, 32, 8, 4, 1]
    inputs = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    target = torch.arange(40) % 2
    together = integrated_gradients(linear_network, inputs, target, steps=4)
    alone = integrated_gradients(linear_network, inputs[39:], target[39:], steps=4)
    assert torch.allclose(together[39:], alone, atol=1e-5)


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


@pytest.mark.parametrize("method", [method for method in METHODS.records if method.function is not None])
def test_every_registered_function_maps_one_image_and_states_its_facts(linear_network, method):
    found = method.function(ClassAgainst(linear_network, 1, None), image())
    expected = (linear_network[1].weight[1].view(3, 8, 8) * image()[0]).sum(dim=0)
    assert found.values.shape == (1, 8, 8)
    assert (found.steps is None) == (not method.needs_gradients)
    assert method.needs_fp32
    if method.name == "integrated_gradients":
        assert torch.allclose(found.values[0], expected, atol=1e-4)
