"""Methods that differentiate: completeness, hand numbers, and nothing left behind."""

import pytest
import torch
from torch import nn

from vision.explanations.gradients import head_gradcam, in_flight, integrated_gradients, occlusion


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
