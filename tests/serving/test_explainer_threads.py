"""Explanations compute at a priority of their own, and the replica around them does not."""

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from records.store import Store
from serving.explainer_threads import LOWEST, NICENESS, idle_cores_only
from serving.settings import ServingSettings
from vision.explanations.methods import METHODS

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")


def policy() -> tuple[int, int]:
    return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)


def policies() -> set[tuple[int, int]]:
    """The policies of all threads of this process; those of other tests may end meanwhile."""
    found = set()
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            found.add((os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)))
    return found


@pytest.mark.parametrize("method", list(METHODS))
def test_a_replica_explains_in_threads_of_low_priority(store: Store, method: str) -> None:
    from serving.deployments import ExplainerReplica

    async def use() -> tuple[Any, tuple[int, int]]:
        replica = ExplainerReplica(ServingSettings(), store.settings)
        return await replica._in_thread(method, policy), policy()  # type: ignore[arg-type]

    before = policy()
    computing, loop = asyncio.run(use())
    assert computing == ((before[0], NICENESS) if method == "gradcam" else (os.SCHED_IDLE, LOWEST))
    assert loop == policy() == before


def test_the_threads_of_an_operator_follow_the_one_that_started_them() -> None:
    def computed() -> set[tuple[int, int]]:
        torch.set_num_threads(2)
        before = policies()
        torch.randn(512, 512) @ torch.randn(512, 512)
        return policies() - before

    with ThreadPoolExecutor(1, initializer=idle_cores_only) as pool:
        assert pool.submit(computed).result() <= {(os.SCHED_IDLE, LOWEST)}


@pytest.mark.parametrize("missing", [AttributeError, PermissionError, OSError])
def test_where_the_kernel_refuses_the_niceness_remains(
    monkeypatch: pytest.MonkeyPatch, missing: type[Exception]
) -> None:
    def refuses(*_: Any) -> None:
        raise missing

    monkeypatch.setattr(os, "sched_setscheduler", refuses)
    before = policy()
    with ThreadPoolExecutor(1, initializer=idle_cores_only) as pool:
        assert pool.submit(policy).result() == (before[0], LOWEST)
