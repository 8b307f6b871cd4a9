"""`relook doctor --cluster`: what all nodes of a Ray cluster need in common, one check for each node.

In: `Settings`. Out: a list of `Check`. A task on every node reads its versions, GPUs, disk and clock, and opens the
ledger and the blobs from there: an address that only the head can reach fails here, and not in the middle of a fit.
"""

import contextlib
import importlib.metadata
import os
import platform
import secrets
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.doctor import DISK_FAIL_BYTES, DISK_WARN_BYTES, GB, Check, check_blobs, check_ledger
from cluster.session import ray_is_running, start_ray
from cluster.settings import Settings
from records.durable import make_folders, write_file
from records.errors import RelookError

PATIENCE_S = 120.0
CLOCKS_APART_S = 5.0
_PACKAGES = ("ray", "torch", "numpy", "relook")


class Node(BaseModel):
    """What a task found on a node."""

    versions: dict[str, str]
    gpus: int
    disk_free: int
    clock: float
    """seconds since 1970, by the node's clock"""
    sees_home: bool
    """whether the driver's RELOOK_HOME is the same folder there"""
    checks: list[Check]
    """ledger and blobs, opened from there"""


class Placed(BaseModel):
    """A node as Ray knows it, with what was found on it, or why nothing was."""

    name: str
    cpus: float
    gpus: float
    asked_at: float = 0.0
    returned_at: float = 0.0
    """by this machine's clock; the node read its own in between"""
    found: Node | None = None
    error: str | None = None


def examine_cluster(settings: Settings) -> list[Check]:
    """Return the checks of every node of the cluster at `cluster.ray_address`, or of a Ray that is started here."""
    try:
        with contextlib.nullcontext() if ray_is_running() else start_ray(settings):
            return judge(_ask_all(settings), look(settings, None), settings)
    except RelookError as error:
        return [Check(name="cluster", state="fail", detail=str(error))]


def look(settings: Settings, mark: tuple[str, str] | None) -> Node:
    """Look at this machine.

    Args:
        settings: of the driver.
        mark: a file that the driver wrote into its home and what is in it.
    Returns:
        What was found.
    """
    import torch

    seen = False
    if mark is not None:
        with contextlib.suppress(OSError):
            seen = Path(mark[0]).read_text() == mark[1]
    checks = []
    for name, check in (("ledger", check_ledger), ("blobs", check_blobs)):
        try:
            checks.append(check(settings))
        except RelookError as error:
            checks.append(Check(name=name, state="fail", detail=str(error)))
    return Node(
        versions={"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        gpus=torch.cuda.device_count(),
        disk_free=shutil.disk_usage(tempfile.gettempdir()).free,
        clock=time.time(),
        sees_home=seen,
        checks=checks,
    )


def judge(nodes: Sequence[Placed], here: Node, settings: Settings) -> list[Check]:
    """Return one check for the cluster and one for each node, against what this machine has."""
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    needed = settings.serving.needed_cpus, settings.serving.needed_gpus
    many = "node" if len(nodes) == 1 else "nodes"
    detail = f"{len(nodes)} {many}, {cpus:g} CPUs, {gpus:g} GPUs; the service may need {needed[0]:g} and {needed[1]:g}"
    whole = Check(name="cluster", state="ok", detail=detail)
    if needed[0] > cpus or needed[1] > gpus:
        fix = "more nodes (an autoscaler may add them), or fewer serving.*_max_replicas"
        whole = whole.model_copy(update={"state": "warn", "fix": fix})
    twice = Counter(node.name for node in nodes)
    names = [n.name if twice[n.name] == 1 else f"{n.name} ({at})" for at, n in enumerate(nodes, start=1)]
    return [whole, *(_node(name, node, here, settings) for name, node in zip(names, nodes, strict=True))]


def _node(name: str, node: Placed, here: Node, settings: Settings) -> Check:
    name = f"node {name}"
    if node.found is None:
        fix = "look at the node's Ray (ray status); stop it if it is gone for good"
        return Check(name=name, state="fail", detail=node.error or "did not respond", fix=fix)
    found, wrong, doubtful = node.found, list[str](), list[str]()
    for package, version in here.versions.items():
        if found.versions.get(package) != version:
            wrong.append(f"{package} {found.versions.get(package)}, here {version}")
    if node.gpus and not found.gpus:
        wrong.append(f"Ray counts {node.gpus:g} GPUs there, and PyTorch finds none")
    wrong += [f"{check.name}: {check.detail}" for check in found.checks if check.state == "fail"]
    local = settings.records.database is None or settings.records.blobs is None
    if not found.sees_home and local:
        wrong.append("RELOOK_HOME is another folder there, and ledger or blobs are in it")
    if found.disk_free < DISK_WARN_BYTES:
        (wrong if found.disk_free < DISK_FAIL_BYTES else doubtful).append(f"{found.disk_free / GB:.0f} GB of disk free")
    apart_s = found.clock - min(max(found.clock, node.asked_at), node.returned_at)
    if abs(apart_s) > CLOCKS_APART_S:
        doubtful.append(f"its clock differs by {apart_s:+.0f} s")
    if wrong or doubtful:
        fix = "the same environment on every node, and addresses that all of them reach: docs/operate.md"
        return Check(name=name, state="fail" if wrong else "warn", detail="; ".join([*wrong, *doubtful]), fix=fix)
    shared = "sees RELOOK_HOME" if found.sees_home else "has a RELOOK_HOME of its own"
    detail = f"{node.cpus:g} CPUs, {found.gpus} GPUs, {found.disk_free / GB:.0f} GB free, {shared}; ledger, blobs: ok"
    return Check(name=name, state="ok", detail=detail)


def _ask_all(settings: Settings) -> list[Placed]:
    """Run `look` on every node that is alive."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    told = settings.model_copy(update={"records": settings.records.model_copy(update={"home": _home(settings)})})
    mark = _home(settings) / f".doctor-{os.getpid()}", secrets.token_hex(8)
    make_folders(mark[0].parent)
    write_file(mark[0], mark[1], mode=0o600)
    task: Any = ray.remote(num_cpus=0, max_retries=0)(look)
    nodes, calls = list[Placed](), list[Any]()
    try:
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if not node["Alive"]:
                continue
            resources = node["Resources"]
            cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
            nodes.append(Placed(name=node["NodeManagerHostname"], cpus=cpus, gpus=gpus, asked_at=time.time()))
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            calls.append(task.options(scheduling_strategy=where).remote(told, (str(mark[0]), mark[1])))
        ended, _ = ray.wait(calls, num_returns=len(calls), timeout=PATIENCE_S)
        return [_returned(node, call, call in ended) for node, call in zip(nodes, calls, strict=True)]
    finally:
        mark[0].unlink(missing_ok=True)


def _returned(node: Placed, call: Any, ended: bool) -> Placed:
    import ray

    if not ended:
        return node.model_copy(update={"error": f"did not respond within {PATIENCE_S:.0f} s"})
    try:
        found: Node = ray.get(call)
    except Exception as error:  # noqa: BLE001 - whatever ended the task is what is wrong with the node
        reason = " ".join(str(error).split())[-300:]
        return node.model_copy(update={"error": f"the task ended with {type(error).__name__}: {reason}"})
    return node.model_copy(update={"found": found, "returned_at": time.time()})


def _home(settings: Settings) -> Path:
    return settings.records.home.absolute()
