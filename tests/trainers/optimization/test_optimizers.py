"""Every registered optimizer passes the same suite."""

import pytest
import torch
from torch import nn

from trainers.optimization.optimizers import OPTIMIZERS, build_optimizer, learning_rate_of
from trainers.settings import OptimizerSettings


def test_the_suite_runs_all_optimizers() -> None:
    assert OPTIMIZERS.names == ("sgd", "rmsprop", "adam", "adamw")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_solves_a_small_problem_at_its_default_rate(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 1)
    optimizer = build_optimizer(network, OptimizerSettings(name=name, weight_decay=0.0))
    inputs = torch.randn(64, 4)
    truth = inputs @ torch.tensor([[0.3], [-0.2], [0.1], [0.2]])
    losses = []
    for _ in range(300):
        loss = (network(inputs) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rate_and_decay_arrive_and_biases_do_not_decay(name: str) -> None:
    settings = OptimizerSettings(name=name, learning_rate=0.007, weight_decay=0.02)
    decayed, free = build_optimizer(nn.Conv2d(3, 4, 3), settings).param_groups
    assert (decayed["lr"], decayed["weight_decay"], free["weight_decay"]) == (0.007, 0.02, 0.0)
    assert [p.ndim for p in decayed["params"]] == [4]
    assert [p.ndim for p in free["params"]] == [1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_default_rate_is_inside_the_tunable_range(name: str) -> None:
    recipe = OPTIMIZERS[name]
    assert recipe.default_learning_rate in recipe.tunable["learning_rate"]
    assert learning_rate_of(OptimizerSettings(name=name)) == recipe.default_learning_rate


def test_momentum_and_nesterov_reach_sgd() -> None:
    group = build_optimizer(nn.Linear(2, 2), OptimizerSettings(momentum=0.8, nesterov=True)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.8, True)
    plain = build_optimizer(nn.Linear(2, 2), OptimizerSettings(momentum=0.0, nesterov=True)).param_groups[0]
    assert (plain["momentum"], plain["nesterov"]) == (0, False)


def test_frozen_parameters_are_left_out() -> None:
    network = nn.Linear(2, 2)
    network.weight.requires_grad_(False)
    groups = build_optimizer(network, OptimizerSettings()).param_groups
    assert [len(group["params"]) for group in groups] == [0, 1]
