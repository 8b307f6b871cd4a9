"""Train with peers on loopback, and compare their loss with that of one process after the same images.

    .venv/bin/python -m bench.drills.peers [--lesions 400] [--epochs 8]
    .venv/bin/python -m bench.drills.peers --data HAM10000 --batch 64 --set model.name=resnet18 --set model.side_px=64

Every peer is a process with a home of its own and a part of the training images, divided by group. Two peers train
together; then three, of which one joins late and one is killed (kill -9). The loss on val of every peer that
finishes may be at most 5 % above that of one process that trains on all images, at the epoch after which it has seen
as many. Prints one JSON object; the exit code is 1 if a peer failed, one loss is higher, or a process is left.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

MOST_ABOVE = 0.05
LIMIT_S = 900.0
GONE_WITHIN_S = 60.0
SETTINGS = (
    "model.name=custom_cnn_base",
    "model.dropout=0",
    "model.side_px=32",
    "augmentation=none",
    "optimizer.learning_rate=0.003",
    "best_epoch_by=last",
    "precision=fp32",
    "workers.use_gpu=false",
    "workers.threads=1",
)


@dataclass(frozen=True)
class Peer:
    """A training that runs.

    Args:
        home: of its own.
        process: of the command.
        family: processes that were seen below it; they outlive one that is killed, with another parent.
    """

    home: Path
    process: subprocess.Popen[bytes]
    family: set[psutil.Process] = field(default_factory=set, repr=False)

    def look(self) -> None:
        """Note the processes below the command."""
        with suppress(psutil.NoSuchProcess):
            self.family.update(psutil.Process(self.process.pid).children(recursive=True))

    def address(self) -> str:
        """Wait for the address that others join by, and return it."""
        return self._first("peer-address.txt").read_text().split()[0]

    def wait_for_epochs(self, count: int) -> None:
        """Wait until so many epochs are done."""
        self._until(lambda: len(val_losses(self.home)) >= count)

    def _first(self, name: str) -> Path:
        self._until(lambda: any(self.home.glob(f"runs/*/{name}")))
        return next(self.home.glob(f"runs/*/{name}"))

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the peer in {self.home} did not get on:\n{(self.home / 'log').read_text()[-2000:]}")
            self.look()
            time.sleep(0.05)


def val_losses(home: Path) -> list[float]:
    """Return the loss on val after each epoch that is done."""
    lines = [line for path in home.glob("runs/*/metrics.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line)["val_loss"] for line in lines]


def generated(folder: Path, lesions: int) -> Path:
    """Generate images of so many lesions; return the folder."""
    command = [sys.executable, "-m", "cluster.cli", "data", "synth", str(folder), "--lesions", str(lesions)]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return folder


def prepared(home: Path, images: Path) -> Path:
    """Import the images into a home of its own."""
    command = [sys.executable, "-m", "cluster.cli", "data", "import", str(images)]
    subprocess.run(command, env=_environment(home), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return home


def start(
    home: Path, epochs: int, settings: Sequence[str], peer: Sequence[str] = (), addresses: Sequence[str] = ()
) -> Peer:
    """Start a training on the images of a home; `peer` holds further settings of trainers.workers.peers."""
    chosen = [*SETTINGS, f"epochs={epochs}", *settings]
    words = [word for setting in chosen for word in ("--set", f"trainers.{setting}")]
    words += [word for setting in peer for word in ("--set", f"trainers.workers.peers.{setting}")]
    strategy = ["--strategy", "hivemind"] if peer else []
    strategy += ["--peers", ",".join(addresses)] if addresses else []
    with (home / "log").open("wb") as log:
        command = [sys.executable, "-m", "cluster.cli", "train", *strategy, *words]
        return Peer(home, subprocess.Popen(command, env=_environment(home), stdout=log, stderr=log))


def finish(*peers: Peer) -> None:
    """Wait for the end of trainings that all have to succeed; one that fails keeps the others waiting."""
    deadline = time.monotonic() + LIMIT_S
    while any(peer.process.poll() is None for peer in peers):
        for peer in peers:
            peer.look()
            if peer.process.poll() or time.monotonic() > deadline:
                raise SystemExit(f"the peer in {peer.home} failed:\n{(peer.home / 'log').read_text()[-2000:]}")
        time.sleep(0.1)
    for peer in peers:
        if peer.process.returncode:
            raise SystemExit(f"the peer in {peer.home} failed:\n{(peer.home / 'log').read_text()[-2000:]}")


@dataclass(frozen=True)
class Plan:
    """What all trainings have in common.

    Args:
        epochs: of each.
        batch: images of a step of one process; peers divide it.
        settings: further ones of `trainers`, as NAME=VALUE.
        peers: further ones of `trainers.workers.peers`.
    """

    epochs: int
    batch: int = 24
    settings: Sequence[str] = ()
    peers: Sequence[str] = ()

    def start(self, home: Path, peers: int, *peer: str, addresses: Sequence[str] = ()) -> Peer:
        """Start one of so many peers, with further settings of `trainers.workers.peers`; of one, no peer at all."""
        chosen = [*self.settings, f"batch_size={self.batch // peers}"]
        return start(home, self.epochs, chosen, [*self.peers, *peer] if peers > 1 else (), addresses)


def two_peers(homes: Sequence[Path], plan: Plan, alone: Sequence[float]) -> dict[str, Any]:
    """Let two peers train together from start to end."""
    with ExitStack() as stack:
        first = _until_end(stack, plan.start(homes[0], 2, "part=1/2", "fewest=2"))
        group = [first.address()]
        second = _until_end(stack, plan.start(homes[1], 2, "part=2/2", "fewest=2", addresses=group))
        finish(first, second)
    return {
        "left_running": left_running(first, second),
        "peers": [_compared(home, plan.epochs, alone) for home in homes[:2]],
    }


def three_peers(homes: Sequence[Path], plan: Plan, alone: Sequence[float]) -> dict[str, Any]:
    """Let a third peer join after an epoch, and kill the second one after that and half of all."""
    epochs = plan.epochs
    with ExitStack() as stack:
        first = _until_end(stack, plan.start(homes[0], 3, "part=1/3", "fewest=2"))
        group = [first.address()]
        second = _until_end(stack, plan.start(homes[1], 3, "part=2/3", "fewest=2", addresses=group))
        first.wait_for_epochs(1)
        third = _until_end(stack, plan.start(homes[2], 3, "part=3/3", addresses=group))
        # Alone, the first one would be through before a peer that is still starting could join.
        third.wait_for_epochs(1)
        second.wait_for_epochs(epochs // 2)
        second.process.kill()
        killed_after = len(val_losses(second.home))
        finish(first, third)
    joined_after = received_epochs(third.home)
    seen = (epochs + killed_after + epochs - joined_after) / 3
    peers = [_compared(peer.home, seen, alone) for peer in (first, third)]
    return {
        "joined_after_epochs": joined_after, "killed_after_epochs": killed_after, "peers": peers,
        "left_running": left_running(first, second, third),
    }  # fmt: skip


def received_epochs(home: Path) -> int:
    """Return how many epochs the only model of a home has from another peer."""
    (path,) = home.glob("bundles/*/bundle.json")
    found: int = json.loads(path.read_text())["metrics"]["training"]["peers"]["received_epochs"]
    return found


def _compared(home: Path, seen: float, alone: Sequence[float]) -> dict[str, float]:
    """Compare the last loss of a peer with that of one process after so many passes over all images."""
    own = val_losses(home)[-1]
    one = float(np.interp(seen, np.arange(1, len(alone) + 1), alone))
    return {"val_loss": own, "of_one_process": one, "ratio": own / one}


def _until_end(stack: ExitStack, peer: Peer) -> Peer:
    def end() -> None:
        with suppress(ProcessLookupError):
            peer.process.send_signal(signal.SIGKILL)
        peer.process.wait()

    stack.callback(end)
    return peer


def _environment(home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    return {**os.environ, "RELOOK_HOME": str(home)}


def left_running(*peers: Peer) -> list[str]:
    """Return the names of processes of peers that are there after a time in which all should have ended."""
    family = set().union(*(peer.family for peer in peers))
    if not family:
        raise SystemExit("no process of a peer was seen, so nothing can be said about what is left")
    _, alive = psutil.wait_procs(family, timeout=GONE_WITHIN_S)
    return [process.name() for process in alive]


def main() -> int:
    """Run all cases and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: generated ones")
    parser.add_argument("--lesions", type=int, default=400, help="lesions to generate")
    parser.add_argument("--epochs", type=int, default=8, help="of every training")
    parser.add_argument("--batch", type=int, default=24, help="images of a step of one process; peers divide it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="further ones of trainers")
    parser.add_argument("--averages", type=int, default=4, help="averagings per epoch")
    parser.add_argument("--matchmaking-s", type=float, default=1.0, help="time in which peers find each other, seconds")
    parser.add_argument("--cases", nargs="+", choices=("two", "three"), default=["two", "three"], help="what is run")
    arguments = parser.parse_args()
    peers = [f"matchmaking_s={arguments.matchmaking_s}", f"averages_per_epoch={arguments.averages}"]
    plan = Plan(arguments.epochs, arguments.batch, arguments.set, peers)
    with tempfile.TemporaryDirectory(prefix="relook-peers-") as name:
        folder = Path(name)
        images = arguments.data or generated(folder / "images", arguments.lesions)
        alone_in, copied = prepared(folder / "alone", images), folder / "imported"
        shutil.copytree(alone_in, copied)
        finish(plan.start(alone_in, 1))
        alone = val_losses(alone_in)
        result: dict[str, Any] = {"one_process": alone}
        for case, run in (("two", two_peers), ("three", three_peers)):
            if case in arguments.cases:
                homes = [folder / f"{case}{number}" for number in range(3 if case == "three" else 2)]
                for home in homes:
                    shutil.copytree(copied, home)
                result[case] = run(homes, plan, alone)
    worst = max(peer["ratio"] for case in arguments.cases for peer in result[case]["peers"])
    left = [name for case in arguments.cases for name in result[case]["left_running"]]
    result["holds"] = worst <= 1 + MOST_ABOVE and not left
    print(json.dumps(result))
    return 0 if result["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
