"""Kill a training (SIGKILL) at random moments, resume it, and compare it with an undisturbed one.

With one worker the model ids must be equal, that is weights, calibration and metrics bit for bit. With two workers
under Ray Train the metrics must agree within 1e-3; workers and the whole command are killed alternately. Every kill
waits for some new checkpoints and a random moment more; a run that finishes before its last kill fails. Prints one
JSON line per run; the exit code is 1 at the first difference.

    .venv/bin/python -m bench.drills.kill_training --kills 10 --rounds 3
    .venv/bin/python -m bench.drills.kill_training --workers 2 --kills 3
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from records.errors import IntegrityError
from trainers.fitting.checkpoints import load_checkpoint

SETTINGS = (
    "model.name=custom_cnn_base",
    "model.dropout=0",
    "model.side_px=32",
    "epochs=12",
    "batch_size=16",
    "precision=fp32",
    "workers.threads=1",
    "workers.use_gpu=false",
    "workers.checkpoint_every_steps=4",
    "optimizer.ema_decay=0.95",
    "optimizer.clip_norm=1.0",
    "workers.max_failures=1000",
)
TOLERANCE = 1e-3
MOST_CHECKPOINTS = 12
"""From one kill to the next: two epochs and a half."""
MOST_WAIT_S = 0.5
"""From a checkpoint to the kill."""
LIMIT_S = 1200.0


def command(data: Path, workers: int, seed: int, resume: bool) -> list[str]:
    """Return a command line that trains."""
    sets = [word for one in (*SETTINGS, f"seed={seed}") for word in ("--set", f"trainers.{one}")]
    line = [sys.executable, "-m", "cluster.cli", "train", "--data", str(data), "--workers", str(workers), "--json"]
    return [*line, *sets, *(["--resume"] if resume else [])]


def uninterrupted(data: Path, home: Path, workers: int, seed: int) -> dict[str, Any]:
    """Train to the end and return what the command printed."""
    line = command(data, workers, seed, False)
    done = subprocess.run(line, env=environ(home), capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def parts(workers: int, kills: int, seed: int) -> list[str]:
    """Return what to kill, alternately; a run with one worker has only its command."""
    return ["command" if workers == 1 or (number + seed) % 2 else "worker" for number in range(kills)]


def environ(home: Path) -> dict[str, str]:
    """Return the environment of a training with a home of its own."""
    return {**os.environ, "RELOOK_HOME": str(home), "OMP_NUM_THREADS": "1"}


def begun(home: Path) -> bool:
    """Return whether a training left something to resume."""
    return any(home.glob("runs/train-*/metrics.jsonl"))


def checkpoints(home: Path) -> list[tuple[int, Path]]:
    """Return moment and path of the run's checkpoints, the oldest first, without those gone meanwhile."""
    found = []
    for path in home.glob("runs/train-*/**/checkpoint.pt"):
        with contextlib.suppress(FileNotFoundError):
            found.append((path.stat().st_mtime_ns, path))
    return sorted(found)


def progress(home: Path) -> int:
    """Return the moment of the newest checkpoint, 0 before the first."""
    return max((moment for moment, _ in checkpoints(home)), default=0)


def position(home: Path) -> str:
    """Return where the newest checkpoint stands, in epochs and steps."""
    for _, path in reversed(checkpoints(home)):
        with contextlib.suppress(IntegrityError):  # Ray may be copying or removing it
            return load_checkpoint(path).position
    return "none"


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it hit, and the newest checkpoint of that moment, from which the run goes on."""

    hit: str
    checkpoint: str


class Run:
    """A training that is killed repeatedly, and its command restarted."""

    def __init__(self, line: Callable[[bool], list[str]], home: Path, chance: random.Random) -> None:
        self._line, self._home, self._chance = line, home, chance
        self._process = self._start()
        self.kills: list[Kill] = []

    def _start(self) -> subprocess.Popen[str]:
        self._errors = (self._home / "stderr").open("w+")
        line = self._line(begun(self._home))
        return subprocess.Popen(
            line, env=environ(self._home), stdout=subprocess.PIPE, stderr=self._errors, text=True
        )  # fmt: skip

    def finish(self, limit_s: float) -> dict[str, Any]:
        """Wait for the end of the training and return what it printed."""
        output = self._process.communicate(timeout=limit_s)[0]
        if self._process.returncode:
            raise SystemExit(f"training ended with {self._process.returncode}: {self._error()}")
        result: dict[str, Any] = json.loads(output)
        return result

    def _error(self) -> str:
        self._errors.seek(0)
        return self._errors.read().strip()[-500:]

    def kill(self, part: str, limit_s: float) -> None:
        """Wait for a random number of checkpoints and a random moment more, and kill a part of the run.

        Args:
            part: `worker` or `command`.
            limit_s: until it has to train.
        """
        start = time.monotonic()
        for _ in range(self._chance.randint(1, MOST_CHECKPOINTS)):
            before = progress(self._home)
            while progress(self._home) <= before:
                self._require_running()
                if time.monotonic() > start + limit_s:
                    raise SystemExit(f"no progress in {limit_s:.0f} s after {len(self.kills)} kills: {self._error()}")
                time.sleep(0.005)
        time.sleep(self._chance.uniform(0.0, MOST_WAIT_S))
        self._require_running()
        self.kills.append(Kill(part, position(self._home)))
        self._kill_now(part)

    def _require_running(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"the training was over after {len(self.kills)} kills; give it more epochs")

    def _kill_now(self, part: str) -> None:
        # Listed before the kill: afterwards the children belong to init and are not found any more.
        family = psutil.Process(self._process.pid).children(recursive=True)
        if part == "worker":
            names = ("relook_fit", "RayTrainWorker")
            workers = [one for one in family if any(name in " ".join(one.cmdline()) for name in names)]
            if not workers:
                raise SystemExit("no worker was found to kill")
            self._chance.choice(workers).kill()
            return
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        # Ray would outlive its driver, and the next run would share the cores with it.
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process = self._start()


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Return the largest difference between the last lines of two runs' metrics."""
    last: list[dict[str, Any]] = [
        json.loads((Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()[-1]) for run in (left, right)
    ]
    names = ("train_loss", "val_loss", "val_balanced_accuracy", "val_accuracy")
    return float(max(abs(last[0][name] - last[1][name]) for name in names))


def main() -> int:
    """Compare killed runs with whole ones, round by round, each with a seed of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-kill-") as folder:
        data = Path(folder) / "images"
        made = [sys.executable, "-m", "cluster.cli", "data", "synth", str(data), "--lesions", "400", "--json"]
        # One import, then copies: another home would have another key, and draw other splits.
        imported = Path(folder) / "imported"
        brought = [sys.executable, "-m", "cluster.cli", "data", "import", str(data), "--json"]
        for preparation in (made, brought):
            subprocess.run(preparation, env=environ(imported), check=True, stdout=subprocess.DEVNULL)
        for number in range(options.rounds):
            seed = options.seed + number
            homes = [Path(folder) / f"{kind}-{seed}" for kind in ("whole", "killed")]
            for home in homes:
                shutil.copytree(imported, home)
            whole = uninterrupted(data, homes[0], options.workers, seed)
            run = Run(partial(command, data, options.workers, seed), homes[1], random.Random(seed))
            for part in parts(options.workers, options.kills, seed):
                run.kill(part, LIMIT_S)
            resumed = run.finish(LIMIT_S)
            difference = largest_difference(whole, resumed)
            same = whole["model_id"] == resumed["model_id"]
            facts = {"seed": seed, "workers": options.workers, "kills": [asdict(kill) for kill in run.kills]}
            print(json.dumps({**facts, "same_model": same, "largest_difference": difference}), flush=True)
            if difference > TOLERANCE or (options.workers == 1 and not same):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
