"""Kill a training (SIGKILL) at random moments, resume it, and compare it with an undisturbed one.

The model ids must be equal, that is weights, calibration and metrics bit for bit, and so must every file of the bundle
and all figures of the epochs that no clock decides. Of two workers under Ray Train, a worker and the whole command are
killed alternately; a command that goes on has another number of feeder processes. Every kill waits for some new
checkpoints and a random moment more; a run that finishes before its last kill fails. With `--first-epoch` every run
is killed at one named moment of its first epoch, or while the model is calibrated; the first run is killed at all of
them. Prints one JSON line per run; the exit code is 1 if one differs.

    .venv/bin/python -m bench.drills.kill_training --kills 10 --rounds 3
    .venv/bin/python -m bench.drills.kill_training --workers 2 --kills 3
    .venv/bin/python -m bench.drills.kill_training --workers 2 --first-epoch
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from bench.processes import processes_with
from records.errors import IntegrityError
from records.ids import sha256_hex
from trainers.fitting.checkpoints import Checkpoint, load_checkpoint
from trainers.fitting.epoch_report import CLOCKS

SETTINGS = (
    "model.name=custom_cnn_base",
    "model.dropout=0",
    "model.side_px=32",
    "batch_size=16",
    "precision=fp32",
    "workers.threads=1",
    "workers.use_gpu=false",
    "workers.checkpoint_every_steps=4",
    "optimizer.ema_decay=0.95",
    "optimizer.clip_norm=1.0",
    "workers.max_failures=1000",
)
FEEDERS = (0, 2, 1)
"""Of a command and of those that go on with its run, in turn."""
MOST_CHECKPOINTS = 12
"""From one kill to the next: two epochs and a half."""
MOST_WAIT_S = 0.5
"""From a checkpoint to the kill."""
LIMIT_S = 1200.0
LOOK_EVERY_S = 0.002

MOMENTS: dict[str, tuple[Callable[[Checkpoint | None], bool], float]] = {
    "start": (lambda _: True, MOST_WAIT_S),
    "first checkpoint": (lambda found: found is not None, 0.0),
    "within the epoch": (lambda found: found is not None and found.step > 4, 0.05),
    "end of the epoch": (lambda found: found is not None and found.epochs_done > 0, 0.0),
    "calibration": (lambda found: found is not None and found.finished, 0.2),
}
"""From which checkpoint on a moment is reached, and the longest wait from then to the kill, seconds."""


def command(data: Path, workers: int, seed: int, epochs: int, resume: bool, feeders: int) -> list[str]:
    """Return a command line that trains."""
    chosen = (*SETTINGS, f"seed={seed}", f"epochs={epochs}", f"workers.feeders={feeders}")
    sets = [word for one in chosen for word in ("--set", f"trainers.{one}")]
    line = [sys.executable, "-m", "cluster.cli", "train", "--data", str(data), "--workers", str(workers), "--json"]
    return [*line, *sets, *(["--resume"] if resume else [])]


def uninterrupted(line: list[str], home: Path) -> dict[str, Any]:
    """Train to the end and return what the command printed."""
    done = subprocess.run(line, env=environ(home), capture_output=True, text=True, check=False, timeout=LIMIT_S)
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def parts(workers: int, kills: int, seed: int) -> list[str]:
    """Return what to kill, alternately; a run with one worker has only its command."""
    return ["command" if workers == 1 or (number + seed) % 2 else "worker" for number in range(kills)]


def first_epoch_cases(workers: int) -> Iterator[list[tuple[str, str]]]:
    """Yield moments of runs and what is killed there; there is no worker any more when a model is calibrated."""
    several = ("command", "worker", "command", "worker", "command") if workers == 2 else ("command",) * len(MOMENTS)
    yield list(zip(MOMENTS, several, strict=True))
    for part in ("worker", "command")[2 - workers :]:
        yield from ([(moment, part)] for moment in MOMENTS if (moment, part) != ("calibration", "worker"))


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


def newest(home: Path) -> Checkpoint | None:
    """Return the newest checkpoint that can be read."""
    for _, path in reversed(checkpoints(home)):
        with contextlib.suppress(IntegrityError):  # Ray may be copying or removing it
            return load_checkpoint(path)
    return None


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: what it hit, the newest checkpoint of that moment, from which the run goes on, and epochs told."""

    hit: str
    moment: str
    checkpoint: str
    told: int


class Run:
    """A training that is killed repeatedly, and its command restarted."""

    def __init__(self, line: Callable[[bool, int], list[str]], home: Path, chance: random.Random) -> None:
        self._line, self._home, self._chance = line, home, chance
        self._starts = 0
        self._process = self._start()
        self.kills: list[Kill] = []

    def _start(self) -> subprocess.Popen[str]:
        self._errors = (self._home / "stderr").open("w+")
        line = self._line(begun(self._home), FEEDERS[self._starts % len(FEEDERS)])
        self._starts += 1
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

    def kill(self, part: str) -> None:
        """Wait for a random number of checkpoints and a random moment more, and kill a part of the run.

        Args:
            part: `worker` or `command`.
        """
        for _ in range(self._chance.randint(1, MOST_CHECKPOINTS)):
            before = progress(self._home)
            self._wait_until(lambda before=before: progress(self._home) > before)  # type: ignore[misc]
        self._hit("random", part, MOST_WAIT_S)

    def kill_at(self, moment: str, part: str) -> None:
        """Wait for a moment, and kill a part of the run there."""
        reached, most_wait_s = MOMENTS[moment]
        self._wait_until(lambda: any(self._home.glob("runs/train-*")) and reached(newest(self._home)))
        if part == "worker":
            self._wait_until(lambda: bool(self._workers()))
        self._hit(moment, part, most_wait_s)

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        start = time.monotonic()
        while not reached():
            self._require_running()
            if time.monotonic() > start + LIMIT_S:
                raise SystemExit(f"no progress in {LIMIT_S:.0f} s after {len(self.kills)} kills: {self._error()}")
            time.sleep(LOOK_EVERY_S)

    def _hit(self, moment: str, part: str, most_wait_s: float) -> None:
        time.sleep(self._chance.uniform(0.0, most_wait_s))
        self._require_running()
        found = newest(self._home)
        told = sum(path.read_bytes().count(b"\n") for path in self._home.glob("runs/train-*/metrics.jsonl"))
        self.kills.append(Kill(part, moment, found.position if found else "none", told))
        self._kill_now(part)

    def _workers(self) -> list[psutil.Process]:
        return processes_with("relook_fit", "RayTrainWorker", below=psutil.Process(self._process.pid))

    def _require_running(self) -> None:
        if self._process.poll() is not None:
            raise SystemExit(f"the training was over after {len(self.kills)} kills; give it more epochs")

    def _kill_now(self, part: str) -> None:
        if part == "worker":
            workers = self._workers()
            if not workers:
                raise SystemExit("no worker was found to kill")
            self._chance.choice(workers).kill()
            return
        # Listed before the kill: afterwards the children belong to init and are not found any more.
        family = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        # Ray would outlive its driver, and the next run would share the cores with it.
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process = self._start()


def epochs(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what a run's epochs reported, times left out."""
    lines = (Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCKS} for line in lines]


def bundle_files(home: Path, run: dict[str, Any]) -> dict[str, str]:
    """Return the hash of every file that a bundle's id covers, by name."""
    folder = next(home.rglob(f"bundles/{run['model_id']}"))
    return {path.name: sha256_hex(path.read_bytes()) for path in sorted(folder.iterdir()) if path.is_file()}


def differences(homes: Sequence[Path], runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return what two runs, each in its home, differ in: fields of epochs, files of the bundle, its id."""
    left, right = (epochs(run) for run in runs)
    found = [] if len(left) == len(right) else ["number of epochs"]
    for one, other in zip(left, right, strict=False):
        found += [f"{name} of epoch {one['epoch']}" for name, value in one.items() if other[name] != value]
    files, others = (bundle_files(home, run) for home, run in zip(homes, runs, strict=True))
    found += [name for name in sorted(files.keys() | others.keys()) if files.get(name) != others.get(name)]
    return found if runs[0]["model_id"] == runs[1]["model_id"] else [*found, "model id"]


class Drill:
    """Data in a folder, and runs on them.

    Args:
        folder: for images, and a home for each run.
        workers: 1 or 2.
        num_epochs: of a run.
    """

    def __init__(self, folder: Path, workers: int, num_epochs: int) -> None:
        self._folder, self._workers, self._epochs = folder, workers, num_epochs
        self._data, self._imported = folder / "images", folder / "imported"
        made = [sys.executable, "-m", "cluster.cli", "data", "synth", str(self._data), "--lesions", "400", "--json"]
        # One import, then copies: another home would have another key, and draw other splits.
        brought = [sys.executable, "-m", "cluster.cli", "data", "import", str(self._data), "--json"]
        for preparation in (made, brought):
            subprocess.run(preparation, env=environ(self._imported), check=True, stdout=subprocess.DEVNULL)

    def _line(self, seed: int) -> Callable[[bool, int], list[str]]:
        return partial(command, self._data, self._workers, seed, self._epochs)

    def _home(self, name: str) -> Path:
        return Path(shutil.copytree(self._imported, self._folder / name))

    def whole(self, seed: int) -> tuple[Path, dict[str, Any]]:
        """Return the home of an undisturbed run, and what it printed."""
        home = self._home(f"whole-{seed}")
        return home, uninterrupted(self._line(seed)(False, FEEDERS[0]), home)

    def compare(
        self, seed: int, name: str, whole: tuple[Path, dict[str, Any]], kills: Sequence[Callable[[Run], None]]
    ) -> bool:
        """Kill a run, print how it differs from the undisturbed one, and return whether it is the same."""
        home = self._home(f"killed-{name}")
        run = Run(self._line(seed), home, random.Random(f"{seed} {name}"))
        for kill in kills:
            kill(run)
        different = differences((whole[0], home), (whole[1], run.finish(LIMIT_S)))
        facts = {"seed": seed, "workers": self._workers, "kills": [asdict(kill) for kill in run.kills]}
        print(json.dumps({**facts, "same_model": not different, "differ": different}), flush=True)
        shutil.rmtree(home)
        return not different


def main() -> int:
    """Compare killed runs with whole ones, round by round, each with a seed of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-epoch", action="store_true")
    options = parser.parse_args()
    same = True
    with tempfile.TemporaryDirectory(prefix="relook-kill-") as folder:
        drill = Drill(Path(folder), options.workers, 2 if options.first_epoch else 12)
        for seed in range(options.seed, options.seed + options.rounds):
            whole = drill.whole(seed)
            if not options.first_epoch:
                hits = [lambda run, part=part: run.kill(part) for part in parts(options.workers, options.kills, seed)]
                same &= drill.compare(seed, f"{seed}", whole, hits)
                continue
            for number, case in enumerate(first_epoch_cases(options.workers)):
                hits = [lambda run, at=at: run.kill_at(*at) for at in case]
                same &= drill.compare(seed, f"{seed}-{number}", whole, hits)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
