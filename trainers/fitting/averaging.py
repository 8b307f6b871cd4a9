"""A running mean of the weights (EMA): smoother than the last step's, and what is validated and served.

After n updates the mean forgets at min(decay, (1 + n) / (10 + n)), so that the random weights of the start
are gone within a short run, too. Batch norm's running statistics are not averaged; the loop measures them
anew under the averaged weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from trainers.fitting.checkpoints import Weights
from trainers.fitting.sharding import local, split_like, whole


class WeightAverage:
    """The mean over a network's parameters; with sharded ones, each process averages its part.

    Args:
        network: on its device, wrapped and sharded already.
        decay: share that the mean keeps per step in the long run, 0 to 1 without both ends.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._decay = decay
        self._parameters = dict(network.named_parameters())
        self._mean = {name: local(parameter).detach().clone() for name, parameter in self._parameters.items()}

    def update(self, num_updates: int) -> None:
        """Move the mean towards the weights.

        Args:
            num_updates: optimizer steps before this one, over the whole run.
        """
        weight = 1.0 - min(self._decay, (1.0 + num_updates) / (10.0 + num_updates))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._mean[name].lerp_(local(parameter), weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network hold the mean inside the block, and its own weights after it."""
        own = {name: local(parameter).detach().clone() for name, parameter in self._parameters.items()}
        self._put(self._mean)
        try:
            yield
        finally:
            self._put(own)

    def state(self) -> Weights:
        """Return the mean, whole; all processes call it together."""
        with self.in_place():
            return {name: whole(parameter).clone() for name, parameter in self._parameters.items()}

    def restore(self, state: Weights) -> None:
        """Take up a mean that `state` returned; all processes call it together."""
        for name, parameter in self._parameters.items():
            self._mean[name].copy_(local(split_like(state[name], parameter)))

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                local(parameter).copy_(weights[name])
