"""A mailbox between the workers and the caller: reports one way, answers the other.

The workers post to an actor; a thread of the caller's process collects, asks the caller's function, and
posts its answer before the workers begin their next epoch. Ray has to run already.
"""

import asyncio
import threading
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainers.fitting.epoch_report import EpochReport, OnEpoch


def open_mailbox() -> Any:
    """Start a mailbox on this node; return a handle that can travel to the workers."""
    # On this node: the mailbox is needed as long as this process lives, and not longer.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


class Mailbox:
    """An actor between the workers and the caller: reports one way, answers the other."""

    def __init__(self) -> None:
        self._reports: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[bool]] = {}
        self._fatal: tuple[str, str] | None = None

    async def tell(self, report: dict[str, Any]) -> bool:
        """Post a report and wait for the answer; an epoch that is told twice is answered as the first time."""
        epoch = int(report["epoch"])
        if epoch not in self._answers:
            self._answers[epoch] = asyncio.get_running_loop().create_future()
            await self._reports.put(report)
        return await asyncio.shield(self._answers[epoch])

    async def collect(self) -> dict[str, Any] | None:
        """Return the next report; None when the mailbox is closed."""
        return await self._reports.get()

    async def answer(self, epoch: int, stop: bool) -> None:
        """Answer a report."""
        self._answers[epoch].set_result(stop)

    async def close(self) -> None:
        """Let `collect` return None after what is waiting."""
        await self._reports.put(None)

    async def fail(self, kind: str, message: str) -> None:
        """Note why the run cannot succeed; the first reason counts."""
        self._fatal = self._fatal or (kind, message)

    async def fatal(self) -> tuple[str, str] | None:
        """Return why the run cannot succeed, if it is known."""
        return self._fatal


class Postman:
    """Carries reports from the mailbox to the caller's function while Ray Train holds the main thread."""

    def __init__(self, mailbox: Any, on_epoch: OnEpoch | None) -> None:
        self._mailbox = mailbox
        self._on_epoch = on_epoch
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._carry, name="epoch reports", daemon=True)

    def __enter__(self) -> "Postman":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        ray.get(self._mailbox.close.remote())
        self._thread.join()

    def raise_if_failed(self) -> None:
        """Raise what the caller's function raised; the run was stopped because of it."""
        if self._failure is not None:
            raise self._failure

    def _carry(self) -> None:
        while (report := ray.get(self._mailbox.collect.remote())) is not None:
            ray.get(self._mailbox.answer.remote(report["epoch"], self._ask(report)))

    def _ask(self, report: dict[str, Any]) -> bool:
        if self._failure is not None:
            return True
        if self._on_epoch is None:
            return False
        try:
            return bool(self._on_epoch(EpochReport.model_validate(report)))
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            self._failure = error
            return True
