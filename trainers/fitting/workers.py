"""Worker groups: the loop's view of the processes that train together.

A group provides rank, device, wrapped network, gathered arrays and storage for checkpoints. `SingleWorker` is one
process with a folder; `ProcessGroup` works over torch.distributed, whoever started the processes (torchrun, a test,
or Ray Train through `trainers.fitting.ray_group`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist
from torch import nn

from records.errors import IntegrityError, UnavailableError
from trainers.fitting.checkpoints import Checkpoint, further, load_checkpoint, save_checkpoint
from trainers.optimization.strategies import StrategyRecipe, WorkersSettings

if TYPE_CHECKING:
    from trainers.fitting.training_data import Rgb

CHECKPOINT_FILE = "checkpoint.pt"
GROUP_FOLDER = "ray"
"""Where Ray Train keeps the checkpoints of a group, below the run's folder."""
MOST_FEEDERS = 16
THREADS_PER_FEEDER = 8


class WorkerGroup(Protocol):
    """Processes that share every batch. All of them call the same methods in the same order."""

    rank: int
    world_size: int
    device: torch.device
    kept_in: Path | None
    """Where checkpoints go; None keeps none."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network with gradients averaged over the group; its parameters may be sharded after it."""
        ...

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Return every worker's array, in order of rank, on every worker."""
        ...

    def average_buffers(self, network: nn.Module) -> None:
        """Make the running statistics of batch norm the same on every worker."""
        ...

    def shared_pixels(self, mean: "Rgb", std: "Rgb") -> "tuple[Rgb, Rgb]":
        """Return mean and deviation of the images, the same on every worker."""
        ...

    def after_step(self, network: nn.Module, epoch: int, step: int, steps: int) -> None:
        """Called after an optimizer step, the 1-based `step` of `steps`, with the weights, which it may change."""
        ...

    def save(self, checkpoint: Checkpoint) -> None:
        """Keep a checkpoint, replacing the one before."""
        ...

    def load(self) -> Checkpoint | None:
        """Return the latest checkpoint, or None at the start of a run."""
        ...


class _OnOneData:
    """What workers have in common that train on the same images: nothing is left to agree on."""

    def shared_pixels(self, mean: "Rgb", std: "Rgb") -> "tuple[Rgb, Rgb]":
        """Return them: every worker computed the same."""
        return mean, std

    def after_step(self, network: nn.Module, epoch: int, step: int, steps: int) -> None:
        """Do nothing: gradients were averaged before the step."""


class SingleWorker(_OnOneData):
    """A group of one.

    Args:
        run_dir: where the checkpoint goes, made if it is not there; None keeps none, and the run cannot be resumed.
        use_gpu: as in the settings.
    """

    rank = 0
    world_size = 1

    def __init__(self, run_dir: Path | None = None, use_gpu: Literal["auto"] | bool = "auto") -> None:
        self.device = choose_device(use_gpu)
        self.kept_in = run_dir
        if run_dir is not None:
            # Here and never again: a folder that vanishes later is an unmounted disk, and a new folder would hide that.
            run_dir.mkdir(parents=True, exist_ok=True)

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return the network as it is."""
        return network

    def gather(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the one array."""
        return [array]

    def average_buffers(self, network: nn.Module) -> None:
        """Do nothing: there is one set of statistics."""

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint to the run's folder, if there is one."""
        if self.kept_in is not None:
            save_checkpoint(checkpoint, self.kept_in / CHECKPOINT_FILE)

    def load(self) -> Checkpoint | None:
        """Return the checkpoint of the run's folder that is furthest on, one of a group of workers included."""
        return None if self.kept_in is None else furthest_in(self.kept_in)


def result_in(run_dir: Path) -> Checkpoint:
    """Return the checkpoint of a run that has ended, as `furthest_in`; UnavailableError if it left none."""
    found = furthest_in(run_dir)
    if found is None:
        raise UnavailableError(f"the run in {run_dir} ended without a checkpoint")
    return found


def furthest_in(run_dir: Path) -> Checkpoint | None:
    """Return the checkpoint that is furthest on, whether one worker or a group under Ray Train left it."""
    path = run_dir / CHECKPOINT_FILE
    found = load_checkpoint(path) if path.is_file() else None
    for kept in (run_dir / GROUP_FOLDER).glob(f"*/{CHECKPOINT_FILE}"):
        # One that was cut off by a kill is no longer the run's last one.
        with suppress(IntegrityError):
            found = further(found, load_checkpoint(kept))
    return found


def choose_device(use_gpu: Literal["auto"] | bool) -> torch.device:
    """Return where one process computes.

    Raises ConfigError: a GPU is demanded and there is none.
    """
    from records.errors import ConfigError

    available = torch.cuda.is_available()
    if use_gpu is True and not available:
        raise ConfigError("trainers.workers.use_gpu is true, but torch sees no GPU here; set it to auto or false")
    return torch.device("cuda" if available and use_gpu is not False else "cpu")


def threads_of(settings: WorkersSettings) -> int:
    """Return how many CPU threads one worker computes with."""
    if settings.threads is not None:
        return settings.threads
    # The affinity mask and not the core count: taskset or a cpuset may leave only some of the cores.
    return max(1, len(os.sched_getaffinity(0)) // settings.count)


def feeders_of(settings: WorkersSettings, device: torch.device) -> int:
    """Return how many processes prepare one worker's batches; 0 if a thread does."""
    if settings.feeders != "auto":
        return settings.feeders
    if settings.data_source == "stream":
        return 0
    threads = threads_of(settings)
    # A GPU leaves the CPUs to the feeders, except one that launches its kernels. A network on the CPUs takes a
    # hundred times longer for an image than its augmentation, so one process keeps up with several cores.
    return min(threads - 1, MOST_FEEDERS) if device.type == "cuda" else threads // THREADS_PER_FEEDER


@contextmanager
def compute_threads(num_threads: int) -> Iterator[None]:
    """Let torch compute with so many threads inside the block, and as before after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Restore torch's global generators after the block, so that a caller's random numbers do not depend on it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def mean_over(group: WorkerGroup, value: float) -> float:
    """Return the mean of a number over the group."""
    return float(np.mean(np.concatenate(group.gather(np.array([value], dtype=np.float64)))))


def any_of(group: WorkerGroup, flag: bool) -> bool:
    """Return on every worker whether one of them said yes."""
    return bool(np.concatenate(group.gather(np.array([flag]))).any())


class ProcessGroup(_OnOneData):
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
        # Pickled objects: the arrays are small, and no worker has to know the others' shapes in advance.
        dist.all_gather_object(gathered, array)
        return gathered

    def average_buffers(self, network: nn.Module) -> None:
        """Replace running statistics by their mean over the group."""
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if self.world_size == 1 or not buffers:
            return
        # One collective for all buffers instead of one per layer.
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
            # No worker continues before the file is complete: after a crash all resume from the same checkpoint.
            dist.barrier()

    def load(self) -> Checkpoint | None:
        """Return the checkpoint of the folder, if there is one."""
        path = self.kept_in / CHECKPOINT_FILE if self.kept_in is not None else None
        return load_checkpoint(path) if path is not None and path.is_file() else None
