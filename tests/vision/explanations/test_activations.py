"""What a layer sees: the same numbers as the layer gives, the strongest channels first, nothing left behind."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from records.errors import ConfigError
from vision.explanations.activations import channel_grid_png, layer_names, layer_output, strongest_channels


@pytest.fixture
def network():
    features = nn.Sequential()
    features.add_module("first", nn.Conv2d(3, 4, 3, padding=1))
    features.add_module("second", nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)))
    full = nn.Sequential()
    full.add_module("features", features)
    full.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    return full.eval()


def test_a_layer_gives_what_it_gives(network):
    inputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert layer_names(network) == ["features.first", "features.second", "features.second.0", "features.second.1"]
    with torch.inference_mode():
        expected = network.features.first(inputs)
    assert np.allclose(layer_output(network, inputs, "features.first"), expected.numpy())
    assert np.allclose(layer_output(network, inputs, "second.0"), torch.relu(expected).numpy())
    assert not any(module._forward_hooks for module in network.modules())


def test_an_unknown_layer_is_named_with_those_there_are(network):
    with pytest.raises(ConfigError, match=r"no layer 'layer9'; there are first, second"):
        layer_output(network, torch.zeros(1, 3, 8, 8), "layer9")


def test_the_grid_shows_the_image_and_the_channels_that_vary_most():
    output = np.zeros((5, 4, 4), dtype=np.float32)
    output[3, 0, 0], output[1, 0, 0] = 9.0, 4.0
    channels = strongest_channels(output, 3)
    assert channels[:2].tolist() == [3, 1]
    with Image.open(io.BytesIO(channel_grid_png(np.zeros((8, 8, 3), np.uint8), output, channels))) as grid:
        assert grid.size == (4 * 132 - 4, 128)
