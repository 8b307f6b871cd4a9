"""The channel between the workers of a distributed fit and the caller: reports and steps one way, "stop" the other.

The workers send reports to an actor. A thread in the caller's process receives them, calls the caller's `on_epoch`
and sends back whether to stop; the workers wait for that before their next epoch. Ray has to run already.

The actor's process starts with every fit, so this file imports little: settings and reports would take a second.
"""

import asyncio
import math
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

if TYPE_CHECKING:
    from trainers.fitting.epoch_report import EpochReport, OnEpoch, OnStep

STEPS_TOLD_EVERY_S = 5.0


def open_channel() -> Any:
    """Start a channel on this node; return a handle that can be pickled and sent to the workers."""
    # Pinned to this node: the actor is useless once this process is gone, and must not die with a worker's node.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Channel).options(num_cpus=0, scheduling_strategy=here).remote()


class Channel:
    """The actor: a queue of reports, and per epoch a future that holds whether to stop."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._replies: dict[int, asyncio.Future[bool]] = {}
        self._fatal: tuple[str, str] | None = None

    async def report(self, report: dict[str, Any]) -> bool:
        """Send a report and wait for the reply; a repeated epoch gets the reply of the first time."""
        # A worker group that was restarted reports again the epoch whose checkpoint was not kept.
        epoch = int(report["epoch"])
        if epoch not in self._replies:
            self._replies[epoch] = asyncio.get_running_loop().create_future()
            await self._reports.put(report)
        # Shielded: a worker that dies while it waits must not cancel the future that its replacement will await.
        return await asyncio.shield(self._replies[epoch])

    async def step(self, epochs_done: int, step: int, steps: int) -> None:
        """Send a position within an epoch; nobody waits for a reply."""
        await self._reports.put({"position": (epochs_done, step, steps)})

    async def next_report(self) -> dict[str, Any] | None:
        """Return the next report or position; None when the channel is closed."""
        return await self._reports.get()

    async def reply(self, epoch: int, stop: bool) -> None:
        """Set whether the workers stop after an epoch."""
        self._replies[epoch].set_result(stop)

    async def close(self) -> None:
        """Let `next_report` return None after the reports that are waiting."""
        await self._reports.put(None)

    async def fail(self, kind: str, message: str) -> None:
        """Note why the run cannot succeed; the first reason counts."""
        self._fatal = self._fatal or (kind, message)

    async def fatal(self) -> tuple[str, str] | None:
        """Return why the run cannot succeed, if it is known."""
        return self._fatal


def sender(channel: Any) -> "tuple[OnEpoch, OnStep]":
    """Return what a worker calls after every epoch and step: both send, and the first waits for the reply."""
    told_at_s = -math.inf

    def on_epoch(report: "EpochReport") -> bool:
        return bool(ray.get(channel.report.remote(report.model_dump())))

    def on_step(epochs_done: int, step: int, steps: int) -> None:
        nonlocal told_at_s
        if time.monotonic() - told_at_s >= STEPS_TOLD_EVERY_S:
            told_at_s = time.monotonic()
            channel.step.remote(epochs_done, step, steps)

    return on_epoch, on_step


class ReportThread:
    """Passes reports to the caller's function in a thread, because `TorchTrainer.fit` blocks the main one."""

    def __init__(self, channel: Any, on_epoch: "OnEpoch | None", on_step: "OnStep | None" = None) -> None:
        self._channel = channel
        self._on_epoch = on_epoch
        self._on_step = on_step
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._forward, name="epoch reports", daemon=True)

    def __enter__(self) -> "ReportThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self._channel.close.remote())
        self._thread.join()

    def raise_if_failed(self) -> None:
        """Raise what the caller's function raised; the run was stopped because of it."""
        if self._failure is not None:
            raise self._failure

    def _forward(self) -> None:
        while (report := ray.get(self._channel.next_report.remote())) is not None:
            if "position" not in report:
                ray.get(self._channel.reply.remote(report["epoch"], self._ask(report)))
            elif self._on_step is not None:
                self._on_step(*report["position"])

    def _ask(self, report: dict[str, Any]) -> bool:
        if self._failure is not None:
            return True
        if self._on_epoch is None:
            return False
        from trainers.fitting.epoch_report import EpochReport

        try:
            return bool(self._on_epoch(EpochReport.model_validate(report)))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._failure = error
            return True
