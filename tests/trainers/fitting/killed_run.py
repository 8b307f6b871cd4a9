"""A training that kills its own process in the middle of its second epoch: `python killed_run.py FOLDER`.

`test_loop` runs it, and goes on with what it leaves behind.
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
from trainers.settings import TrainersSettings


class Rows:
    """Pictures in memory that kill the process when they were taken often enough."""

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


def train_here(run_dir: Path, *, kill: bool) -> TrainedModel:
    """Train three epochs, or die in the middle of the second."""
    # Mean and deviation, four batches, batch norm's statistics and val come before the second epoch.
    rows = Rows(kill_at=1 + 4 + 1 + 1 + 3 if kill else -1)
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)]
    data = TrainingData(rows, ids, np.arange(40) % 7, np.arange(32), np.arange(32, 40))
    settings = TrainersSettings(
        side_px=32, epochs=3, batch_size=8, precision="fp32", threads_per_worker=1, augmentation="light",
        prefetch_batches=1,
    )  # fmt: skip
    return train(settings, data, load_taxonomy("ham10000"), workers=SingleWorker(run_dir, use_gpu=False))


if __name__ == "__main__":
    train_here(Path(sys.argv[1]), kill=True)
