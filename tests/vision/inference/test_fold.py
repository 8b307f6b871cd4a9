"""Folding batch norm changes nothing but the time it takes."""

import threading

import pytest
import torch
from torch import nn

from vision.inference.fold import ChannelClamp, fold_batch_norm


def randomise(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
            nn.init.normal_(module.running_mean, generator=generator)
            nn.init.uniform_(module.running_var, 0.2, 2.0, generator=generator)
    return network.eval()


def assert_same_function(network, folded):
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = network(inputs), folded(inputs)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def num_norms(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@pytest.mark.parametrize("name", ["custom_cnn", "custom_cnn_base", "resnet18", "efficientnet_lite0"])
def test_a_model_computes_the_same_with_nothing_left_to_fold(name, make_network):
    features = make_network(name, 7, 3).features
    norms_before = num_norms(features)
    folded = fold_batch_norm(features)
    assert num_norms(folded) == 0
    assert num_norms(features) == norms_before
    assert_same_function(features, folded)


def test_norm_after_relu_is_exact_at_padded_borders_and_for_negative_scales():
    network = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(4),
        )
    )  # fmt: skip
    assert (network[2].weight < 0).any()
    folded = fold_batch_norm(network)
    assert num_norms(folded) == 0
    assert sum(isinstance(module, ChannelClamp) for module in folded.modules()) == 2
    assert_same_function(network, folded)


def test_norm_directly_after_a_convolution_without_bias():
    network = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
    assert_same_function(network, fold_batch_norm(network))


def test_a_norm_without_gain_and_shift_is_folded_too():
    network = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Identity()))
    network[1] = nn.BatchNorm2d(8, affine=False).eval()
    folded = fold_batch_norm(network)
    assert num_norms(folded) == 0
    assert_same_function(network, folded)


class Shared(nn.Module):
    """One convolution whose output is used twice, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.other = nn.BatchNorm2d(4)

    def forward(self, inputs):
        raw = self.conv(inputs)
        normed = self.norm(torch.relu(raw))
        return raw + self.other(self.twice(self.twice(normed)))


def test_what_is_used_elsewhere_is_left_alone():
    network = randomise(Shared())
    folded = fold_batch_norm(network)
    assert num_norms(folded) == 2
    assert_same_function(network, folded)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1)],
        [nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)],
    ],
    ids=["norm first", "pool between", "no statistics"],
)
def test_other_patterns_are_left_alone(layers):
    network = randomise_known(nn.Sequential(*layers))
    folded = fold_batch_norm(network)
    assert num_norms(folded) == 1
    assert_same_function(network, folded)


def randomise_known(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            nn.init.uniform_(module.running_var, 0.2, 2.0)
    return network.eval()


def test_nan_stays_nan_through_the_clamp():
    clamp = ChannelClamp(torch.tensor([0.0]), torch.tensor([torch.inf]))
    out = clamp(torch.tensor([[[[torch.nan, -1.0, 2.0]]]]))
    assert torch.isnan(out[0, 0, 0, 0])
    assert out[0, 0, 0, 1:].tolist() == [0.0, 2.0]


def test_networks_run_in_other_threads_while_one_is_folded(make_network):
    running = fold_batch_norm(make_network("custom_cnn", 7, 3).features)
    inputs = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = running(inputs)
    stop, failed = threading.Event(), []

    def run():
        while not stop.is_set():
            try:
                with torch.inference_mode():
                    assert torch.equal(running(inputs), expected)
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                failed.append(error)
                return

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        fold_batch_norm(make_network("custom_cnn", 7, 3).features)
    stop.set()
    for thread in threads:
        thread.join()
    assert failed == []
