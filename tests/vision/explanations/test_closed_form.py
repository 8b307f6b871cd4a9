"""Closed-form Grad-CAM: numbers worked out by hand, and captum's LayerGradCam."""

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from records.errors import ContractError
from vision.explanations.closed_form import PooledClassMaps, PooledLinear, batch_norm_scale, closed_form_of
from vision.explanations.gradients import head_gradcam
from vision.networks import MODELS

TOLERANCE = 1e-5
"""Largest difference over the largest value of a map."""


def test_pooled_linear_by_hand():
    # One 1x1 convolution makes two channels of a one-channel image: A1 = x, A2 = 10 - x.
    conv = nn.Conv2d(1, 2, 1)
    linear = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        conv.bias.copy_(torch.tensor([0.0, 10.0]))
        linear.weight.copy_(torch.tensor([[2.0, 1.0], [1.0, -1.0]]))
    image = torch.tensor([[[[1.0, 2.0], [6.0, 8.0]]]])
    with torch.no_grad():
        features = conv(image)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), linear).eval()
    maps = closed_form_of(head).maps(features)
    # class 0: relu(2x + (10 - x)) / 4 = (10 + x) / 4;  class 1: relu(x - (10 - x)) / 4 = relu(2x - 10) / 4
    assert maps[0, 0].tolist() == [[2.75, 3.0], [4.0, 4.5]]
    assert maps[0, 1].tolist() == [[0.0, 0.0], [0.5, 1.5]]


def test_class_maps_by_hand():
    norm = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([4.0, -6.0]))
        norm.running_var.copy_(torch.tensor([4.0 - 1e-5, 9.0 - 1e-5]))
        norm.running_mean.copy_(torch.tensor([100.0, -7.0]))
    head = nn.Sequential(nn.ReLU(), norm, nn.Dropout(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    features = torch.tensor([[[[1.0, 2.0], [-3.0, 8.0]], [[-1.0, 2.0], [-4.0, -8.0]]]])
    maps = closed_form_of(head).maps(features)
    # class 0: scale 2, 3 of 4 positions above zero: 2 * 3/4 / 4 = 0.375 times relu of the map.
    assert maps[0, 0].numpy() == pytest.approx(np.array([[0.375, 0.75], [0.0, 3.0]]))
    # class 1: scale -2, 1 of 4 above zero: -0.125; what is below zero speaks for the class.
    assert maps[0, 1].numpy() == pytest.approx(np.array([[0.125, 0.0], [0.5, 1.0]]))


def test_a_class_whose_map_is_nowhere_above_zero_has_an_empty_map():
    maps = PooledClassMaps(torch.tensor([1.0])).maps(torch.full((1, 1, 2, 2), -3.0))
    assert (maps == 0).all()


@pytest.mark.parametrize(
    ("name", "side_px", "seeds"),
    [
        ("custom_cnn", 64, 5),
        ("custom_cnn_base", 64, 2),
        ("squeezenet", 64, 1),
        pytest.param("resnet18", 32, 3, marks=pytest.mark.soak),
        ("custom_cnn", 224, 1),
    ],
)
def test_it_equals_captum(name, side_px, seeds, make_network):
    compared = 0
    for seed in range(seeds):
        network = make_network(name, 7, seed)
        inputs = torch.randn(2, 3, side_px, side_px, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            maps = closed_form_of(network.head).maps(network.features(inputs))
        layer = network.get_submodule(MODELS[name].target_layer)
        for target in range(7):
            expected = LayerGradCam(network, layer).attribute(inputs, target=target, relu_attributions=True)
            for ours, theirs in zip(maps[:, target], expected[:, 0].detach(), strict=True):
                assert (ours - theirs).abs().max() <= TOLERANCE * theirs.max()
                compared += int(theirs.max() > 0)
    assert compared >= 3 * seeds


def test_differentiating_the_head_gives_the_same_maps(make_network):
    for name in ("custom_cnn", "squeezenet", "mobilenet_v3"):
        network = make_network(name, 7, 1)
        with torch.inference_mode():
            features = network.features(torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        target = torch.tensor([0, 3, 6])
        ours = closed_form_of(network.head).maps(features)[torch.arange(3), target]
        theirs = head_gradcam(network.head, features, target)
        assert (ours - theirs).abs().max() <= TOLERANCE * theirs.max()


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(6, 5), nn.Hardswish(), nn.Linear(5, 4), nn.Hardswish(), nn.Dropout(0.3), nn.Linear(4, 3)],
        [nn.LayerNorm(6), nn.Linear(6, 3)],
        [nn.Linear(6, 5), nn.LayerNorm(5, eps=0.1), nn.Hardswish(), nn.Linear(5, 3)],
        [nn.Linear(6, 6), nn.Linear(6, 3, bias=False)],
    ],
    ids=["two hard swishes", "layer norm", "layer norm between", "two linear layers"],
)
def test_a_chain_after_the_pool_equals_differentiating_it(layers):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.normal_(parameter, 0.3, 1.0)
        # Values on both sides of where a hard swish bends, whose slope is another in each part.
        features = 3.0 * torch.randn(16, 6, 3, 2)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers).eval()
    with torch.inference_mode():
        maps = closed_form_of(head).maps(features)
    for target in range(3):
        theirs = head_gradcam(head, features, torch.full((16,), target))
        assert (maps[:, target] - theirs).abs().max() <= TOLERANCE * theirs.max()
        assert theirs.max() > 0


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)),
        nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        nn.Sequential(),
    ],
    ids=["two linear layers", "max pooling", "norm before relu", "nothing"],
)
def test_other_heads_have_no_closed_form(head):
    assert closed_form_of(head) is None


def test_pooling_to_more_than_one_position_has_no_closed_form():
    assert closed_form_of(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 2))) is None


def test_batch_norm_without_statistics_has_no_scale():
    with pytest.raises(ContractError, match="running statistics"):
        batch_norm_scale(nn.BatchNorm2d(2, track_running_stats=False))


def test_faint_maps_are_not_noise():
    # 512 channels that cancel but for one in ten million: fp32 sums would lose it.
    weight = torch.ones(512, 1, dtype=torch.float64)
    features = torch.full((1, 512, 1, 1), 1000.0)
    features[:, 1::2] = -1000.0
    features[:, 0] += 1e-1
    expected = float(np.float32(1000.1)) - 1000.0
    assert PooledLinear(weight).maps(features).item() == pytest.approx(expected, rel=1e-6)
