"""A group of processes joined by torch.distributed, whoever started them: torchrun, a test, or Ray Train.

The default process group exists already (gloo on CPUs, NCCL on GPUs). Checkpoints go to one folder that
every process sees; rank 0 writes.
"""

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch import nn

from trainers.fitting.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from trainers.fitting.workers import CHECKPOINT_FILE
from trainers.optimization.strategies import StrategyRecipe


class ProcessGroup:
    """A `WorkerGroup` over the default process group.

    Args:
        strategy: how the processes share the work.
        rank: of this process.
        world_size: number of processes.
        device: where this process computes.
        run_dir: where checkpoints go; None keeps none.
    """

    def __init__(
        self,
        strategy: StrategyRecipe,
        rank: int,
        world_size: int,
        device: torch.device,
        run_dir: Path | None = None,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.kept_in = run_dir
        self._strategy = strategy

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network with gradients averaged over the group; on GPUs batch norm is shared, too."""
        return network if self.world_size == 1 else self._strategy.wrap(network, self.device)

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Return every worker's array, in order of rank, on every worker."""
        if self.world_size == 1:
            return [array]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, array)
        return gathered

    def average_buffers(self, network: nn.Module) -> None:
        """Replace running statistics by their mean over the group."""
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if self.world_size == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        dist.all_reduce(flat)
        flat /= self.world_size
        means = torch.split(flat, [buffer.numel() for buffer in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))

    def save(self, checkpoint: Checkpoint) -> None:
        """Let rank 0 write the checkpoint; all workers meet here."""
        if self.kept_in is not None and self.rank == 0:
            save_checkpoint(checkpoint, self.kept_in / CHECKPOINT_FILE)
        if self.world_size > 1:
            dist.barrier()

    def load(self) -> Checkpoint | None:
        """Return the checkpoint of the folder, if there is one."""
        path = self.kept_in / CHECKPOINT_FILE if self.kept_in is not None else None
        return load_checkpoint(path) if path is not None and path.is_file() else None
