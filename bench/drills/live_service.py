"""A service in a process of its own for the drills: a trained model, `relook serve`, and threads that send requests."""

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from bench.processes import processes_with
from records.bundles import Bundle
from records.errors import RelookError
from records.models import find_bundle
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import FlagReason
from serving.access.keys import admin_token
from serving.client import Client
from serving.schemas import FlagRequest, PredictionResponse

START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class LiveService:
    """A running `relook serve`.

    Args:
        url: base URL.
        store: its ledger and bundles, opened from here.
        process: of the command; Ray and the replicas are among its descendants.
    """

    url: str
    store: Store
    process: psutil.Process

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Return the worker processes of one deployment."""
        return processes_with(f"ServeReplica:relook:{deployment}", below=self.process)

    def admin(self) -> Client:
        """Return a client that may do everything."""
        return Client(self.url, admin_token(self.store.home))


def relook(home: Path, *arguments: str, database: str | None = None) -> None:
    """Run the command to its end.

    Args:
        home: its folder.
        arguments: verb and options.
        database: of the ledger; default: SQLite in the home.
    Raises:
        CalledProcessError: it did not end well.
    """
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    subprocess.run(command, env=_environ(home, database), check=True, stdout=subprocess.DEVNULL)


def trained_champion(home: Path, images: Path, lesions: int = 120, database: str | None = None) -> str:
    """Generate images, train a small model on them, and serve it.

    Args:
        home: an empty folder.
        images: where the images go.
        lesions: how many.
        database: of the ledger; default: SQLite in the home.
    Returns:
        The model's id.
    """
    relook(home, "data", "synth", str(images), "--lesions", str(lesions), database=database)
    relook(home, "data", "import", str(images), database=database)
    relook(home, "train", "--set", "trainers.epochs=8", database=database)
    with contextlib.closing(open_store(RecordsSettings(home=home, database=database))) as store:
        (path,) = store.home.bundles.iterdir()
        model_id = path.name
    relook(home, "promote", model_id, "--provisional", database=database)
    return model_id


def add_replica_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a drill that may run with several replicas."""
    parser.add_argument("--predictors", type=int, default=1, help="replicas of the predictor")
    parser.add_argument("--ingresses", type=int, default=1, help="HTTP replicas, which share one port")


def replica_sets(options: argparse.Namespace) -> tuple[str, ...]:
    """Return the settings of those options; Ray hands out as many CPUs as they need."""
    most = {"predictor": options.predictors, "ingress": options.ingresses}
    numbers = [f"serving.{part}_{end}_replicas={most[part]}" for part in most for end in ("min", "max")]
    return (*numbers, f"cluster.logical_cpus={4 + options.predictors + options.ingresses}")


@contextlib.contextmanager
def live_service(home: Path, *sets: str, database: str | None = None) -> Iterator[LiveService]:
    """Serve from a home with a model, for the length of a block.

    Args:
        home: the folder.
        sets: settings, such as `serving.page=false`.
        database: of the ledger; default: SQLite in the home.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cluster.cli", "serve", "--port", str(port)]
    command += [part for text in sets for part in ("--set", text)]
    log = (home / "logs" / "drill.log").open("w")
    with subprocess.Popen(
        command, env=_environ(home, database), stdout=log, stderr=log, start_new_session=True
    ) as process:
        try:
            # Opened beside the service: conditions are checked in the ledger, not in what the service says of itself.
            with contextlib.closing(open_store(RecordsSettings(home=home, database=database))) as store:
                service = LiveService(f"http://127.0.0.1:{port}", store, psutil.Process(process.pid))
                _wait_until_ready(service)
                yield service
        finally:
            process.terminate()
            process.wait(60)
            log.close()


def bundle_of(service: LiveService, model_id: str) -> Bundle:
    """Return a bundle of the service's store."""
    return find_bundle(service.store, model_id)


@dataclass
class Callers:
    """Threads that send images, and now and then a flag, until they are stopped.

    Args:
        url: of the service.
        images: that are sent, in a cycle.
        threads: how many.
        retry_s: how long a client repeats a request without a response; 0 shows every failure.
        flag_every: every n-th prediction is flagged; 0 flags none.
    """

    url: str
    images: Sequence[bytes]
    threads: int = 3
    retry_s: float = 0.0
    flag_every: int = 0
    responses: list[tuple[float, PredictionResponse]] = field(default_factory=list)
    """(time.monotonic, response)"""
    flags: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the threads."""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(self.threads)]

    def __enter__(self) -> Self:
        """Start sending."""
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the requests that are under way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, more: int, timeout_s: float = 120.0) -> None:
        """Wait for so many more responses.

        Raises:
            TimeoutError: they did not come in time.
        """
        deadline, wanted = time.monotonic() + timeout_s, len(self.responses) + more
        while len(self.responses) < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.responses)} of {wanted} responses after {timeout_s:g} s")
            time.sleep(0.02)

    def _ask(self, number: int) -> None:
        with Client(self.url, retry_s=self.retry_s) as client:
            while not self._stop.is_set():
                try:
                    response = client.predict(self.images[number % len(self.images)])
                    self.responses.append((time.monotonic(), response))
                    if self.flag_every and number % self.flag_every == 0:
                        made = client.flag(response.id, FlagRequest(reason=FlagReason.OTHER, comment="a drill"))
                        self.flags.append(made.id)
                except RelookError as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                number += 1


def _environ(home: Path, database: str | None) -> dict[str, str]:
    named = {} if database is None else {"RELOOK_RECORDS__DATABASE": database}
    return {**os.environ, "RELOOK_HOME": str(home), **named}


def _wait_until_ready(service: LiveService) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with Client(service.url, retry_s=0.0) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(RelookError):
                if client.ready().ready:
                    return
            time.sleep(0.2)
    raise TimeoutError(f"the service was not ready within {START_TIMEOUT_S:g} s")
