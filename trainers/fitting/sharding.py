"""Sharded tensors: full copies for checkpoints, local shards for updates, and a running mean of the weights (EMA).

A sharded tensor is a DTensor, as `fully_shard` leaves parameters, gradients and optimizer state. For a
plain tensor every function here is the identity, and no collective is run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainers.fitting.checkpoints import Weights

HOW = ("fused", "foreach", "capturable")
"""Options of an optimizer that say how it computes."""


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether other processes hold parts of the tensor."""
    return hasattr(tensor, "full_tensor")


def to_local(tensor: Tensor) -> Tensor:
    """Return this process's shard as `DTensor.to_local` does; it shares memory with the tensor."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def full_tensor(value: Any) -> Any:
    """Gather every DTensor in nested dicts and lists with `full_tensor`, a collective that all processes call."""
    if isinstance(value, Tensor):
        return (value.full_tensor() if is_sharded(value) else value).detach()  # type: ignore[attr-defined]
    if isinstance(value, dict):
        return {name: full_tensor(item) for name, item in value.items()}
    if isinstance(value, list):
        return [full_tensor(item) for item in value]
    return value


def split_like(value: Tensor, pattern: Tensor) -> Tensor:
    """Shard a full tensor like another one, a collective that all processes call."""
    if not is_sharded(pattern):
        return value
    from torch.distributed.tensor import distribute_tensor

    placed: Tensor = distribute_tensor(
        value.to(pattern.device),
        pattern.device_mesh,  # type: ignore[attr-defined]
        pattern.placements,  # type: ignore[attr-defined]
    )
    return placed


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state from a checkpoint, whose tensors are full, into parameters that may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        index: {name: _split_if_alike(item, parameters[index]) for name, item in entry.items()}
        for index, entry in state["state"].items()
    }
    # How the update is computed is the device's and not the run's: another one may go on with it.
    groups = [
        {**group, **{name: own[name] for name in HOW if name in own}}
        for group, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**state, "state": split, "param_groups": groups})


def _split_if_alike(item: Any, parameter: Tensor) -> Any:
    # Moments have the parameter's shape and are sharded with it; step counters are scalars and stay replicated.
    if isinstance(item, torch.Tensor) and item.shape == parameter.shape:
        return split_like(item, parameter)
    return item


class WeightAverage:
    """The mean over a network's parameters; with sharded ones, each process averages its part.

    Args:
        network: on its device, wrapped and sharded already.
        decay: share that the mean keeps per step in the long run, 0 to 1 without both ends.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(network.named_parameters())
        self._mean = {name: to_local(parameter).detach().clone() for name, parameter in self._parameters.items()}

    def update(self, num_updates: int) -> None:
        """Move the mean towards the weights.

        Args:
            num_updates: optimizer steps before this one, over the whole run.
        """
        # The warm-up of the decay: after n steps at most a share (1 + n) / (10 + n) is kept, so random initial
        # weights fade within a short run.
        weight = 1.0 - min(self._decay, (1.0 + num_updates) / (10.0 + num_updates))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                # On the local shard only: a mean is element-wise, so sharded training needs no collective here.
                self._mean[name].lerp_(to_local(parameter), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network hold the mean inside the block, and its own weights after it."""
        # Cloned and copied back instead of swapped: optimizer and DDP hold references to these very tensors.
        own = {name: to_local(parameter).detach().clone() for name, parameter in self._parameters.items()}
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(own)

    def state(self) -> Weights:
        """Return the mean, whole; all processes call it together."""
        with self.in_place():
            return {name: full_tensor(parameter).clone() for name, parameter in self._parameters.items()}

    def restore(self, state: Weights) -> None:
        """Take up a mean that `state` returned; all processes call it together."""
        for name, parameter in self._parameters.items():
            self._mean[name].copy_(to_local(split_like(state[name], parameter)))

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                to_local(parameter).copy_(weights[name])
