"""Load that rises tenfold and falls again, on a real Ray Serve with a fake device: replicas follow by themselves.

    .venv/bin/python -m bench.drills.scaling [--device-ms 50] [--rollout] [--kill-every 20] [--seconds 30]
    .venv/bin/python -m bench.drills.scaling --nodes 3 [--loopback] [--device-ms 200] [--rollout] [--kill-every 20]

Starts the service with one predictor that may become four. Three callers, then thirty, then one send images one after
the other. It holds if no request fails, the number of predictors follows, and throughput at four is at least 3.5
times that at one. `--rollout` does the same while a copy of the model is at 50 %; `--kill-every` kills a predictor
(kill -9) now and then. A prediction costs tens of milliseconds of CPU besides the device: on few or busy cores a longer
`--device-ms` keeps the device what limits. `--nodes 3` does it on a head that only listens for HTTP and two workers,
each in a network namespace (root, Linux; with `--loopback` all on this machine's loopback). Each has room for half of
the predictors, and has to hold some whenever all run. Prints one JSON object; the exit code is 1 if it does not hold.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.progress import Progress

from bench.drills.live_service import Callers
from bench.drills.nodes import Namespaces, Nodes, prepare_ray
from bench.processes import processes_with
from bench.serve.fake_device import fake_device
from bench.serve.peers import free_port
from records.models import find_bundle, register, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from serving.settings import ServingSettings

FEW, MANY = 3, 30
"""Callers; a few already keep one device busy, without more calls than one replica is to have."""
WANTED_RATIO = 3.5
WORKERS, NODE_CPUS = 2, 1
"""Nodes beside the head, and the CPUs of each as Ray counts them."""
TITLE = "ServeReplica:relook:predictor"
"""Of the process of a predictor."""


@dataclass
class ScalingReport:
    """What happened."""

    device_ms: float
    most: int
    replicas: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the start, running predictors) at each change"""
    by_node: list[dict[str, int]] = field(default_factory=list)
    """processes of predictors on each worker node at each change, those that start or stop included; empty on one"""
    per_s_at_one: float = 0.0
    per_s_at_most: float = 0.0
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    kills: int = 0
    came_back: bool = False

    @property
    def ratio(self) -> float:
        """Throughput at the largest number of replicas, divided by that at one."""
        return self.per_s_at_most / self.per_s_at_one if self.per_s_at_one else 0.0

    @property
    def went_up(self) -> bool:
        """Whether the largest number of replicas was reached."""
        return max((number for _, number in self.replicas), default=0) == self.most

    @property
    def spread(self) -> bool:
        """Whether every worker node held predictors whenever the largest number ran."""
        at_most = [held for (_, number), held in zip(self.replicas, self.by_node, strict=False) if number == self.most]
        return all(all(held.values()) for held in at_most)

    @property
    def holds(self) -> bool:
        """Whether all that the drill asks for was so."""
        followed = self.went_up and self.spread and self.came_back
        return not self.failures and followed and self.ratio >= WANTED_RATIO


def settings_for(port: int, most: int, **given: Any) -> ServingSettings:
    """Return the settings of the drill: one image per forward pass, so that the device is what limits."""
    return ServingSettings(
        port=port, page=False, max_batch_size=1, max_in_flight=64, rate_limit_per_minute=0,
        predictor_max_replicas=most, predictor_target_ongoing=4, predictor_cpus=0.4, explainer_cpus=0.1,
        scale_up_delay_s=1.0, scale_down_delay_s=5.0, start_timeout_s=600.0, **{"ingress_cpus": 0.1, **given},
    )  # fmt: skip


def settings_for_nodes(port: int, most: int) -> ServingSettings:
    """Return the same for two worker nodes, each with room for half of the predictors and the explainer, and no more.

    Nothing is reserved on the head, where the ingress listens.
    """
    settings = settings_for(port, most, ingress_cpus=0.0)
    room = NODE_CPUS - settings.explainer_cpus
    # A little less than the room, so that no rounding matters.
    return settings.model_copy(update={"predictor_cpus": round(0.98 * room / math.ceil(most / WORKERS), 3)})


class Watch(threading.Thread):
    """Notes how many predictors run, and where, and kills one now and then."""

    def __init__(self, report: ScalingReport, kill_every_s: float, seed: int, raylets: Mapping[str, int]) -> None:
        super().__init__(daemon=True)
        self._report, self._kill_every_s, self._random = report, kill_every_s, random.Random(seed)
        self._raylets = raylets
        self._over = threading.Event()
        self.running = 0

    def run(self) -> None:
        """Look four times a second."""
        from ray import serve

        from serving.remote import APPLICATION

        began_s = killed_s = time.monotonic()
        while not self._over.wait(0.25):
            deployment = serve.status().applications[APPLICATION].deployments["predictor"]
            running = {str(state): number for state, number in deployment.replica_states.items()}.get("RUNNING", 0)
            if running != self.running:
                self.running = running
                self._report.replicas.append((round(time.monotonic() - began_s, 1), running))
                if self._raylets:
                    held = {name: len(predictors(psutil.Process(pid))) for name, pid in self._raylets.items()}
                    self._report.by_node.append(held)
            if self._kill_every_s and running > 1 and time.monotonic() - killed_s > self._kill_every_s:
                killed_s = time.monotonic()
                self._random.choice(predictors()).kill()
                self._report.kills += 1

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self.join()

    def wait_for(self, number: int, timeout_s: float) -> bool:
        """Return whether so many predictors run before the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while self.running != number and time.monotonic() < deadline_s:
            time.sleep(0.1)
        return self.running == number


def predictors(below: psutil.Process | None = None) -> list[psutil.Process]:
    """Return the processes of predictors below one, by default this one, the oldest first."""
    return sorted(processes_with(TITLE, below=below), key=lambda process: process.create_time())


def throughput(callers: Callers, seconds: float) -> float:
    """Return the responses per second over a while."""
    before, began_s = len(callers.responses), time.monotonic()
    time.sleep(seconds)
    return (len(callers.responses) - before) / (time.monotonic() - began_s)


def drill(
    store: Store, images: Sequence[bytes], settings: ServingSettings, device_s: float, *, seconds: float,
    kill_every_s: float = 0.0, patience_s: float = 180.0, seed: int = 0, raylets: Mapping[str, int] | None = None,
) -> ScalingReport:  # fmt: skip
    """Raise and lower the load once; Ray has to be initialised.

    Args:
        store: with a champion.
        images: to send.
        settings: of `settings_for`.
        device_s: of one forward pass.
        seconds: over which throughput is measured.
        kill_every_s: how often a predictor is killed; 0 is never.
        patience_s: how long to wait for a number of replicas.
        seed: of the draw of the victims.
        raylets: their processes, by worker node; none if there is one node.
    Returns:
        What happened.
    """
    from serving.launch import run_service

    report = ScalingReport(device_s * 1000, settings.predictor_max_replicas)
    with run_service(settings, store.settings, predictor_class=fake_device(device_s)) as handle:
        watch = Watch(report, kill_every_s, seed, raylets or {})
        watch.start()
        try:
            watch.wait_for(1, patience_s)
            with Callers(handle.url, images, FEW) as few:
                report.per_s_at_one = throughput(few, seconds)
            with Callers(handle.url, images, MANY) as many:
                if watch.wait_for(report.most, patience_s):
                    report.per_s_at_most = throughput(many, seconds)
            with Callers(handle.url, images, 1) as one:
                report.came_back = watch.wait_for(1, patience_s)
        finally:
            watch.stop()
        for callers in (few, many, one):
            report.requests += len(callers.responses)
            report.failures += callers.failures
    return report


def start_rollout(store: Store) -> None:
    """Begin a rollout of a copy of the champion at 50 %."""
    from cluster.demo.faults import twin
    from serving.rollout.control import roll_out

    with store.ledger.read() as tx:
        champion = serving_id(tx)
    copy = twin(store, find_bundle(store, str(champion)))
    with store.ledger.begin() as tx:
        register(tx, copy)
    roll_out(store, copy.id, 50, actor="drill", reason="a drill")


@contextmanager
def worker_nodes(scratch: Path, *, on_loopback: bool) -> Iterator[Nodes]:
    """Start a head and two workers for the length of a block; Ray must not have been imported.

    Args:
        scratch: for the folders of nodes in namespaces.
        on_loopback: instead of in network namespaces.
    Yields:
        The nodes, which join by and by.
    """
    with (
        tempfile.TemporaryDirectory(prefix="rn", ignore_cleanup_errors=True) as ray_folder,
        nullcontext() if on_loopback else Namespaces(scratch) as namespaces,
    ):
        prepare_ray(Path(ray_folder), on_loopback=on_loopback)
        nodes = Nodes(Path(ray_folder), namespaces, NODE_CPUS)
        try:
            yield nodes
        finally:
            nodes.cluster.shutdown()


def options_of() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-ms", type=float, default=50.0, help="of one forward pass")
    parser.add_argument("--most", type=int, default=4, help="replicas of the predictor, at most")
    parser.add_argument("--seconds", type=float, default=30.0, help="over which throughput is measured")
    parser.add_argument("--rollout", action="store_true", help="while a rollout is at 50 %%")
    parser.add_argument("--kill-every", type=float, default=0.0, help="kill a predictor this often, seconds")
    parser.add_argument("--nodes", type=int, choices=(1, 1 + WORKERS), default=1, help="three: a head and two workers")
    parser.add_argument("--loopback", action="store_true", help="no network of its own for every worker")
    return parser.parse_args()


def main() -> int:
    """Train a small model, then run the drill."""
    options = options_of()
    with ExitStack() as stack:
        # Ray prints there that predictors were killed.
        stack.enter_context(redirect_stdout(sys.stderr))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="relook-scaling-")))
        records = RecordsSettings(home=folder / "home")
        sets, nodes = ["cluster.logical_cpus=8", f"records.home={records.home}"], None
        settings = settings_for(free_port(), options.most)
        if options.nodes > 1:
            settings = settings_for_nodes(settings.port, options.most)
            nodes = stack.enter_context(worker_nodes(folder, on_loopback=options.loopback))
            sets.append(f"cluster.ray_address={nodes.cluster.address}")
        from bench.serve.subject import images_of, prepare
        from cluster.session import start_ray
        from cluster.sources import load_settings

        ray_settings = load_settings(sets=sets)
        with Progress(disable=True) as bar:
            prepare(records, None, ray_settings.trainers, folder, bar)
            images = images_of(None, folder, bar)[:40]
        store = stack.enter_context(closing(open_store(records)))
        if options.rollout:
            start_rollout(store)
        stack.enter_context(start_ray(ray_settings))
        if nodes is not None:
            nodes.wait()
        report = drill(
            store, images, settings, options.device_ms / 1000, seconds=options.seconds,
            kill_every_s=options.kill_every, raylets=None if nodes is None else nodes.raylets,
        )  # fmt: skip
    print(json.dumps({**asdict(report), "ratio": round(report.ratio, 2), "holds": report.holds}, indent=2))
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
