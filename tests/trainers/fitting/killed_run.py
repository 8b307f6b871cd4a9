"""A training that kills its own process: `python killed_run.py FOLDER KILL_AT [KILL_AT ...]`.

KILL_AT is the how-manieth reading of pixels the process dies at: mean and deviation, every batch, batch norm's
statistics and val are one each. For every number but the last a child dies first, so one import of torch is
enough for many deaths. `test_loop` and `bench/drills/kill_training.py` go on with what is left behind.
"""

import hashlib
import os
import signal
import sys
from pathlib import Path

import numpy as np

from records.taxonomy import load_taxonomy
from trainers.fitting.loop import TrainedModel, TrainingData, train
from trainers.fitting.workers import SingleWorker
from trainers.settings import ModelSettings, OptimizerSettings, TrainersSettings, WorkersSettings

EPOCHS, STEPS = 3, 4
READINGS = 1 + EPOCHS * (STEPS + 2)


class Rows:
    """Images in memory that kill the process when they were taken often enough."""

    def __init__(self, kill_at: int) -> None:
        self._pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        self._left = kill_at

    def __len__(self) -> int:
        return 40

    def take(self, indices: object) -> np.ndarray:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._pixels[indices]


def train_here(run_dir: Path, kill_at: int = -1) -> TrainedModel:
    """Train three epochs with everything that has a state, or die on the way."""
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]
    data = TrainingData(Rows(kill_at), ids, np.arange(40) % 7, np.arange(32), np.arange(32, 40))
    settings = TrainersSettings(
        model=ModelSettings(side_px=32, dropout=0.05),
        epochs=EPOCHS,
        batch_size=32 // STEPS,
        precision="fp32",
        workers=WorkersSettings(threads=1, prefetch_batches=1, checkpoint_every_steps=3),
        augmentation="light",
        optimizer=OptimizerSettings(ema_decay=0.9, clip_norm=1.0, l1=1e-5, accumulate_steps=2),
    )
    return train(settings, data, load_taxonomy("ham10000"), workers=SingleWorker(run_dir, use_gpu=False))


def die_in_children(run_dir: Path, kills: list[int]) -> None:
    """Let one child after the other go on with the run and die of SIGKILL."""
    for kill_at in kills:
        child = os.fork()
        if child == 0:
            train_here(run_dir, kill_at)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        # A kill that comes after the run is over kills nothing.
        print(kill_at, "killed" if os.WIFSIGNALED(status) else "finished", flush=True)


if __name__ == "__main__":
    die_in_children(Path(sys.argv[1]), [int(number) for number in sys.argv[2:-1]])
    train_here(Path(sys.argv[1]), int(sys.argv[-1]))
