"""Reports per second that the driver of a search processes: decisions and journal for each epoch of each trial.

No trial is trained and Ray is not started: a hundred simulated trials report alternately to the judge, the log and the
journal of a real search, every line on disk before the next. A search on N GPUs, one per trial, sends N reports per
epoch, so N over the rate is the shortest epoch that it can follow.

    python -m bench.scale.search [--at-once 100] [--trials 300] [--epochs 30]
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from tuning.journal import open_journal
from tuning.judge import Halving, Judge
from tuning.log import SearchLog
from tuning.trials import Origin, SearchHeader, TrialPlan


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=100, help="trials that run beside one another")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=30)
    options = parser.parse_args()
    header = SearchHeader(
        dataset_id="0" * 64, base={}, seed=0, search=(), space_hash="0" * 64, trials=options.trials,
        trial_epochs=options.epochs, grace_epochs=1, reduction_factor=3, train_images=1, train_images_available=1,
        val_images=1,
    )  # fmt: skip
    chance, reports = np.random.default_rng(0), 0
    quality = chance.random(options.trials)
    with tempfile.TemporaryDirectory(prefix="relook-scale-") as folder, open_journal(Path(folder), header) as journal:
        log = SearchLog(header, journal)
        judge = Judge(Halving(1, 3, options.epochs), options.epochs, lambda number: number == 0)
        waiting = list(range(options.trials))
        running: dict[int, int] = {}
        began = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < options.at_once:
                number = waiting.pop(0)
                log.started(TrialPlan(number=number, origin=Origin.SAMPLED, overrides={"seed": number}))
                running[number] = 0
            for number in list(running):
                running[number] += 1
                score = float(quality[number] * (1 - 0.9 ** running[number]) + chance.normal(0, 0.01))
                decision = judge.decide(number, running[number], score)
                log.epoch(decision, seconds=1.0, key_class_sensitivity=None)
                reports += 1
                if running[number] == options.epochs or not decision.goes_on:
                    log.ended(number)
                    del running[number]
        took_s = time.perf_counter() - began
        journal_mb = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
    print(
        json.dumps(
            {
                "at_once": options.at_once,
                "trials": options.trials,
                "reports": reports,
                "reports_per_s": round(reports / took_s, 1),
                "shortest_epoch_s": round(options.at_once * took_s / reports, 2),
                "journal_mb": round(journal_mb, 2),
                "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
