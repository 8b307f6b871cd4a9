"""Kill a training (SIGKILL) at random moments, resume it, and compare it with one that was left alone.

One worker has to end with the same model id, that is with equal weights, calibration and metrics, bit for bit.
Two workers under Ray Train have to end with metrics within 1e-3; either a worker or the whole command is killed.
One JSON line per run; exit code 1 at the first difference.

    .venv/bin/python bench/kill_training.py --kills 10 --rounds 3
    .venv/bin/python bench/kill_training.py --workers 2 --kills 3
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
from pathlib import Path
from typing import Any

import psutil

SETTINGS = (
    "model=custom_cnn_base",
    "dropout=0",
    "side_px=32",
    "epochs=12",
    "batch_size=16",
    "precision=fp32",
    "threads_per_worker=1",
    "use_gpu=false",
    "checkpoint_every_steps=4",
    "ema_decay=0.95",
    "clip_norm=1.0",
    "max_failures=1000",
)
TOLERANCE = 1e-3


def command(data: Path, workers: int, seed: int, resume: bool) -> list[str]:
    """Return a command line that trains."""
    sets = [word for one in (*SETTINGS, f"seed={seed}") for word in ("--set", f"trainers.{one}")]
    line = [sys.executable, "-m", "cluster.cli", "train", "--data", str(data), "--workers", str(workers), "--json"]
    return [*line, *sets, *(["--resume"] if resume else [])]


def finish(line: list[str], home: Path) -> dict[str, Any]:
    """Run a training to its end and return what it printed."""
    done = subprocess.run(line, env=environ(home), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"training ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def environ(home: Path) -> dict[str, str]:
    """Return the environment of a training with a home of its own."""
    return {**os.environ, "RELOOK_HOME": str(home), "OMP_NUM_THREADS": "1"}


def begun(home: Path) -> bool:
    """Tell whether a training left something to resume."""
    return any(home.glob("runs/train-*/metrics.jsonl"))


def kill_one(process: subprocess.Popen[str], chance: random.Random, whole: bool) -> str:
    """Kill the command with all that it started, or one of Ray Train's workers; return what was killed."""
    family = psutil.Process(process.pid).children(recursive=True)
    workers = [one for one in family if "RayTrainWorker" in " ".join(one.cmdline())]
    if workers and not whole:
        chance.choice(workers).kill()
        return "worker"
    process.send_signal(signal.SIGKILL)
    process.wait()
    for one in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    return "command"


def killed_run(
    data: Path, home: Path, workers: int, seed: int, kills: int, chance: random.Random
) -> tuple[dict[str, Any], list[str]]:
    """Train with kills; return what the last command printed, and what was killed."""
    killed: list[str] = []
    while len(killed) < kills:
        process = subprocess.Popen(
            command(data, workers, seed, begun(home)), env=environ(home), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + chance.uniform(4.0, 12.0 if workers == 1 else 40.0)
        while process.poll() is None and (time.monotonic() < deadline or not begun(home)):
            time.sleep(0.01)
        if process.poll() is not None:
            output = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"training ended with {process.returncode}: {output[-500:]}")
            return json.loads(output), killed  # it was quicker than the next kill
        with contextlib.suppress(psutil.NoSuchProcess):
            killed.append(kill_one(process, chance, whole=workers == 1 or chance.random() < 0.5))
        if killed and killed[-1] == "worker":
            output = process.communicate()[0]
            if process.returncode:
                raise SystemExit(f"training did not survive a lost worker: {output[-500:]}")
            return json.loads(output), killed
    return finish(command(data, workers, seed, begun(home)), home), killed


def largest_difference(left: dict[str, Any], right: dict[str, Any]) -> float:
    """Return the largest difference between the last lines of two runs' metrics."""
    last = [json.loads((Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()[-1]) for run in (left, right)]
    names = ("train_loss", "val_loss", "val_balanced_accuracy", "val_accuracy")
    return max(abs(last[0][name] - last[1][name]) for name in names)


def main() -> int:
    """Compare killed runs with whole ones, round by round, each with a seed of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=1)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-kill-") as folder:
        data = Path(folder) / "pictures"
        made = [sys.executable, "-m", "cluster.cli", "data", "synth", str(data), "--lesions", "400", "--json"]
        # One import, then copies: another home would have another key, and draw other sides.
        imported = Path(folder) / "imported"
        brought = [sys.executable, "-m", "cluster.cli", "data", "import", str(data), "--json"]
        for line in (made, brought):
            subprocess.run(line, env=environ(imported), check=True, stdout=subprocess.DEVNULL)
        for number in range(options.rounds):
            seed = options.seed + number
            homes = [Path(folder) / f"{kind}-{seed}" for kind in ("whole", "killed")]
            for home in homes:
                shutil.copytree(imported, home)
            whole = finish(command(data, options.workers, seed, resume=False), homes[0])
            chance = random.Random(seed)
            resumed, killed = killed_run(data, homes[1], options.workers, seed, options.kills, chance)
            difference = largest_difference(whole, resumed)
            same = whole["model_id"] == resumed["model_id"]
            line = {"seed": seed, "workers": options.workers, "killed": killed, "same_model": same}
            print(json.dumps({**line, "largest_difference": difference}), flush=True)
            if difference > TOLERANCE or (options.workers == 1 and not same):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
