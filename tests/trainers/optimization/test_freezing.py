"""Frozen parts of a network: what is trained, what stays to the bit, and rates of features and head."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from records.arrays import IntArray, UInt8Array
from records.bundles import Geometry
from records.errors import ConfigError
from records.taxonomy import Taxonomy
from trainers.fitting.feeding import Batch
from trainers.fitting.loop import TrainingData, train
from trainers.fitting.steps import Stepper
from trainers.optimization.freezing import blocks_of, freeze, frozen_modules
from trainers.optimization.optimizers import build_optimizer
from trainers.settings import OptimizerSettings, TrainersSettings
from vision.networks import build_model

SIDES_PX = {"custom_cnn": 32, "resnet18": 16, "efficientnet_lite0": 32, "mobilenet_v3": 32, "timm/test_vit": 32}


def network_of(name: str) -> nn.Module:
    sized = {"side_px": SIDES_PX[name]} if name.startswith("timm/") else {}
    if sized:
        pytest.importorskip("timm")
    return build_model(name, 3, **sized)


@dataclass
class Pixels:
    """Four images that are not augmented."""

    values: UInt8Array

    def take(self, rows: IntArray) -> UInt8Array:
        return self.values[rows]


def step(network: nn.Module, side_px: int, settings: OptimizerSettings) -> Stepper:
    loss, geometry = nn.CrossEntropyLoss(), Geometry(side_px=side_px)
    stepper = Stepper(
        network, build_optimizer(network, settings), None, loss, geometry, "fp32", torch.device("cpu"), settings
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, side_px, side_px, 3), dtype=np.uint8)
    stepper.train_step(Batch(pixels, np.array([0, 1, 2, 0]), np.arange(4)))
    return stepper


@pytest.mark.parametrize("name", SIDES_PX)
def test_what_is_frozen_stays_and_the_rest_moves(name: str) -> None:
    network = network_of(name)
    blocks = blocks_of(network.get_submodule("features"))
    assert len(blocks) >= 4
    freeze(network, 2)
    trained = {key for key, one in network.named_parameters() if one.requires_grad}
    inside = {id(one) for block in blocks[-2:] for one in block.parameters()}
    assert {key for key, one in network.named_parameters() if id(one) in inside} <= trained
    assert {key for key, _ in network.named_parameters() if key.startswith("head.")} <= trained
    before = {key: value.clone() for key, value in network.state_dict().items()}
    stepper = step(network, SIDES_PX[name], OptimizerSettings(name="adamw", weight_decay=0.1, l1=1e-3))
    assert not any(module.training for block in blocks[:-2] for module in block.modules())
    assert all(block.training for block in blocks[-2:])
    pixels = np.full((4, SIDES_PX[name], SIDES_PX[name], 3), 90, dtype=np.uint8)
    stepper.refresh_statistics(Pixels(pixels), np.arange(4))
    kept = {id(one) for module in frozen_modules(network) for one in (*module.parameters(), *module.buffers())}
    for key, value in network.state_dict(keep_vars=True).items():
        if id(value) in kept or (isinstance(value, nn.Parameter) and not value.requires_grad):
            assert torch.equal(value, before[key]), key
    # Biases before a norm have no gradient.
    assert not any(
        torch.equal(one, before[key]) for key, one in network.named_parameters() if key in trained and one.ndim > 1
    )


def test_no_block_trains_the_head_alone_and_too_many_are_refused() -> None:
    network = network_of("resnet18")
    freeze(network, 0)
    assert [key for key, one in network.named_parameters() if one.requires_grad] == [
        key for key, _ in network.named_parameters() if key.startswith("head.")
    ]
    with pytest.raises(ConfigError, match=r"trainable_blocks is 99, and the network has \d+ blocks; take at most"):
        freeze(network_of("mobilenet_v3"), 99)
    with pytest.raises(ConfigError, match="trainable_blocks is 0, and the head of the network has no weights"):
        freeze(build_model("custom_cnn_base", 3), 0)


def test_a_run_with_frozen_blocks_keeps_what_it_started_from(
    toy_settings: TrainersSettings, toy_data: TrainingData, three_classes: Taxonomy
) -> None:
    settings = toy_settings.with_values({"epochs": 1, "optimizer.trainable_blocks": 1})
    model = train(settings, toy_data, three_classes)
    other = train(settings.with_values({"optimizer.learning_rate": 0.5}), toy_data, three_classes)
    one, two = model.weights(), other.weights()
    same = {key for key, value in one.items() if np.array_equal(value, two[key])}
    first = next(key for key in one if key.endswith("weight"))
    assert first in same
    assert len(same) < len(one)


def test_features_have_a_rate_of_their_own() -> None:
    network = network_of("resnet18")
    freeze(network, 1)
    groups = build_optimizer(network, OptimizerSettings(learning_rate=0.1, features_rate=0.2)).param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.1, 0.1, 0.02, 0.02])
    of_head = {id(one) for one in network.get_submodule("head").parameters()}
    assert {id(one) for group in groups[:2] for one in group["params"]} == of_head
    of_features = {id(one) for one in network.get_submodule("features").parameters() if one.requires_grad}
    assert {id(one) for group in groups[2:] for one in group["params"]} == of_features
