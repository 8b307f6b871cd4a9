"""Parts of a batch, computed side by side on a CPU by one thread for each.

torch divides every operation among its threads, which then wait for each other a few hundred times in a step. Where a
part has a thread of its own, they wait once in a step: two cores train 5 to 41 % faster, and up to eight times
as fast beside a busy program, which takes a core for milliseconds at a time. The gradients of the parts add up in
the order of the parts, as where they are computed one after the other (decision 067).

Random numbers of a thread come from a generator of its own, since torch's global one would give them in the order in
which the threads ask for them.
"""

import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from trainers.fitting.feeding import Batch
from trainers.fitting.workers import threads_of
from trainers.optimization.strategies import strategy_of
from trainers.settings import TrainersSettings

SMALLEST_PART = 32
"""A part of `auto` has so many images or more, because batch norm takes its mean over a part."""
SWITCH_S = 50e-6
"""After so long a thread that augments gives Python's lock to one that computes, in place of 5 ms: the latter asks for
it after each operation. The custom CNN trains a tenth faster so, and no slower where nothing else wants the lock."""

logger = logging.getLogger(__name__)
Weighted = tuple[Batch, float]
Gradients = tuple[Tensor | None, ...]


def parallel_parts_of(settings: TrainersSettings, device: torch.device) -> int:
    """Return the number of parts of a batch that a worker computes side by side; 1 on a GPU and where workers share."""
    workers = settings.workers
    if device.type != "cpu" or strategy_of(workers).processes != "1" or workers.compile:
        return 1
    if workers.parallel_parts != "auto":
        return workers.parallel_parts
    threads = threads_of(workers)
    most = settings.images_per_step // settings.optimizer.accumulate_steps // SMALLEST_PART
    return max((parts for parts in range(1, threads + 1) if threads % parts == 0 and parts <= most), default=1)


def part_threads(network: nn.Module, settings: TrainersSettings, device: torch.device) -> "PartThreads | None":
    """Start the threads of a worker; None where it computes whole batches."""
    parts = parallel_parts_of(settings, device)
    return PartThreads(network, parts, threads_of(settings.workers)) if parts > 1 else None


class PartThreads:
    """Threads that compute the gradients of parts of a batch.

    Args:
        network: on the CPU; its parameters are read by all threads.
        count: number of threads.
        threads: of torch, which they share.
    """

    def __init__(self, network: nn.Module, count: int, threads: int) -> None:
        self.count = count
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        self._together = True
        self._switch_before_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        each, before = max(1, threads // count), torch.get_num_threads()
        self._pool = ThreadPoolExecutor(count, "part", initializer=_compute_with, initargs=(each,))
        # All are started here, which the barrier makes sure of, before the caller's number is set again.
        started = threading.Barrier(count)
        wait([self._pool.submit(started.wait) for _ in range(count)])
        torch.set_num_threads(before)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        sys.setswitchinterval(self._switch_before_s)

    def add_gradient(self, loss_of: Callable[[Batch], Tensor], parts: Sequence[Weighted]) -> Tensor:
        """Add the gradient of a batch to its parameters' `grad`, `count` parts at a time.

        Args:
            loss_of: a part's mean loss.
            parts: with the weight of each part's loss.
        Returns:
            The weighted loss, detached.
        """
        total = torch.zeros(())
        with _without_running_statistics(self._norms):
            for first in range(0, len(parts), self.count):
                for loss, gradients in self._computed(loss_of, parts[first : first + self.count]):
                    total += loss
                    self._add(gradients)
        return total

    def _computed(
        self, loss_of: Callable[[Batch], Tensor], parts: Sequence[Weighted]
    ) -> list[tuple[Tensor, Gradients]]:
        seeds = torch.randint(2**62, (len(parts),)).tolist()
        state = torch.get_rng_state()

        def compute(part: Weighted, seed: int) -> tuple[Tensor, Gradients]:
            with _OwnRandom(seed):
                return self._gradient(loss_of, *part)

        if self._together:
            running = [self._pool.submit(compute, part, seed) for part, seed in zip(parts, seeds, strict=True)]
            wait(running)
            found = [future.result() for future in running]
            if torch.equal(torch.get_rng_state(), state):
                return found
            # What was computed depends on which thread drew first, and is forgotten.
            torch.set_rng_state(state)
            self._together = False
            logger.warning(
                "the network draws random numbers by a function that has no generator of its own: the parts of a batch "
                "are computed one after the other"
            )
        return [self._gradient(loss_of, *part) for part in parts]

    def _gradient(self, loss_of: Callable[[Batch], Tensor], part: Batch, weight: float) -> tuple[Tensor, Gradients]:
        loss = loss_of(part) * weight
        return loss.detach(), torch.autograd.grad(loss, self._parameters, allow_unused=True)

    def _add(self, gradients: Gradients) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient


def _compute_with(num_threads: int) -> None:
    """Set the number of threads of the calling thread for good."""
    torch.set_num_threads(num_threads)
    # torch keeps a number for each thread, which it replaces by the last that was set anywhere when the thread asks for
    # the first time; so that has to be now.
    torch.get_num_threads()


@contextmanager
def _without_running_statistics(norms: list[_BatchNorm]) -> Iterator[None]:
    """Keep threads from writing the same running means; they are measured anew before each validation."""
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = norm.track_running_stats and not norm.training
    try:
        yield
    finally:
        for norm, before in zip(norms, tracked, strict=True):
            norm.track_running_stats = before


_DRAWS = frozenset({
    torch.Tensor.bernoulli_, torch.Tensor.normal_, torch.Tensor.uniform_, torch.bernoulli, torch.rand, torch.randint,
    torch.randn, torch.randperm,
})  # fmt: skip
"""Functions that take a generator."""


class _OwnRandom(TorchFunctionMode):
    """Inside its block a thread draws from a generator of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _DRAWS:
            given.setdefault("generator", self._generator)
        if func is functional.dropout:
            return self._dropout(*args, **given)
        return func(*args, **given)

    def _dropout(self, values: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As torch's, which takes no generator."""
        if not training or p == 0.0:
            return values
        kept = torch.empty_like(values).bernoulli_(1.0 - p, generator=self._generator)
        return values * kept.div_(1.0 - p) if p < 1.0 else values * kept
