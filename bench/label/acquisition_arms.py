"""The arms of protocol 2 over frozen features, see docs/protocols/acquisition_2.md; can be stopped and run again.

.venv/bin/python -m bench.label.acquisition_arms features.npz --work FOLDER

Every curve (one arm, one seed) is a file of FOLDER as soon as it is done, and is not computed again. Progress goes to
standard error and to FOLDER/progress.log. `bench.label.acquisition_tables` makes tables of what is there.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bench.label import acquisition_curves as curves
from labeling.acquisition.registry import RULES, Prevalence, budgets_of, choose_mixed
from records.arrays import FloatArray, IntArray
from records.errors import DataError

STEPS = (100, 150, 200, 300, 400, 600, 800, 1_200, 1_600, 2_200, 2_800, 3_600, 4_400)
FIRST_SEED, ATLAS_PER_CLASS, RAREST = 1_000, 10, 3
MIX = {"random": 0.1, "rare_margin": 0.6, "expected_miss_cost": 0.3}
COUNTED_UNTIL = (600, 1_600)
FEWEST_SEEDS = 3
"""An arm with fewer has no figures yet."""


@dataclass(frozen=True)
class Arm:
    """Shares of each step by rule, the prevalence that the rules read, and whether an atlas is among the first 100."""

    shares: dict[str, float]
    prevalence: Prevalence = "equal"
    atlas: bool = False


TESTED = {**{rule: Arm({rule: 1.0}) for rule in RULES}, "mix": Arm(MIX)}
ARMS = {
    **TESTED,
    **{f"{rule}@natural": Arm({rule: 1.0}, "natural") for rule in ("margin", "badge", "expected_miss_cost")},
    **{f"{name}+atlas": Arm(TESTED[name].shares, atlas=True) for name in ("random", "rare_margin", "mix")},
}

split = lru_cache(maxsize=2)(curves.split)


def first_rows(splits: curves.Splits, seed: int, *, atlas: bool) -> list[int]:
    """Return the first 100 rows: random ones, or 10 of each class and the first of the random ones besides."""
    drawn = np.random.default_rng(1_000 + seed).choice(len(splits.ids), STEPS[0], replace=False).tolist()
    if not atlas:
        return [int(row) for row in drawn]
    chance, taken = np.random.default_rng(2_000 + seed), list[int]()
    for c in range(len(curves.CLASSES)):
        members = np.flatnonzero(splits.pool_labels == c)
        taken += chance.permutation(members)[:ATLAS_PER_CLASS].tolist()
    return (taken + [row for row in drawn if row not in taken])[: STEPS[0]]


def curve_of(path: str, name: str, seed: int) -> dict[str, Any]:
    """Return balanced accuracy and labels by class at every step; of random also the figure with all labels."""
    splits, arm = split(path, seed), ARMS[name]
    known = first_rows(splits, seed, atlas=arm.atlas)
    accuracies, counts = [], []
    head = curves.fit(splits.pool[known], splits.pool_labels[known])
    for step in STEPS:
        if step > len(known):
            budgets = budgets_of(arm.shares, step - len(known))
            free, pool = curves.pool_of(list(budgets), splits, head, known, 10_000 * seed + step)
            chosen = choose_mixed(budgets, pool, seed=10_000 * seed + step, prevalence=arm.prevalence)
            known += [int(free[row]) for row, _ in chosen]
            head = curves.fit(splits.pool[known], splits.pool_labels[known])
        accuracies.append(head.balanced_accuracy(splits.held_out, splits.held_out_labels))
        counts.append(np.bincount(splits.pool_labels[known], minlength=len(curves.CLASSES)).tolist())
    found = {"arm": name, "seed": seed, "balanced_accuracy": accuracies, "counts": counts}
    if name == "random":
        full = curves.fit(splits.pool, splits.pool_labels)
        found["full"] = full.balanced_accuracy(splits.held_out, splits.held_out_labels)
        found["pool_counts"] = np.bincount(splits.pool_labels, minlength=len(curves.CLASSES)).tolist()
    return found


def summarise(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the protocol for every arm, each against random on the seeds that both have."""
    random = {int(one["seed"]): one for one in found if one["arm"] == "random"}
    by_arm = {
        name: sorted((f for f in found if f["arm"] == name and f["seed"] in random), key=lambda f: int(f["seed"]))
        for name in ARMS
    }
    by_arm = {name: ones for name, ones in by_arm.items() if len(ones) >= FEWEST_SEEDS}
    rarest = np.argsort(np.mean([one["pool_counts"] for one in random.values()], axis=0))[:RAREST]
    arms, logs = {}, {}
    for name, ones in by_arm.items():
        base = [random[one["seed"]] for one in ones]
        needed, of_base = ([_needed(one, 0.95 * r["full"]) for one, r in zip(some, base, strict=True)]
                           for some in (ones, base))  # fmt: skip
        logs[name] = np.log([n or STEPS[-1] for n in needed]) - np.log([n or STEPS[-1] for n in of_base])
        gain = _curves(ones) - _curves(base)
        area = np.asarray(np.trapezoid(gain, STEPS, axis=1)) / (STEPS[-1] - STEPS[0])
        counts = np.array([one["counts"] for one in ones])
        arms[name] = {
            "seeds": len(ones),
            "labels_mean": float(np.mean([n or STEPS[-1] for n in needed])),
            "not_reached": sum(n is None for n in needed),
            "ratio": _interval(logs[name], np.exp),
            "area_gain": _interval(area),
            "gain_by_step": [_interval(column) for column in gain.T],
            **{f"melanomas_per_100_to_{n}": _asked(counts[:, :, [curves.MELANOMA]], n) for n in COUNTED_UNTIL},
            **{f"rarest_per_100_to_{n}": _asked(counts[:, :, rarest], n) for n in COUNTED_UNTIL},
        }
    tested = {name: curves.p_value(values) for name, values in logs.items() if name in TESTED and name != "random"}
    adjusted = curves.holm(tested, len(TESTED) - 1)
    for name, one in arms.items():
        one["holm_p"] = adjusted.get(name)
    full = float(np.mean([one["full"] for one in random.values()]))
    return {"full": full, "seeds": len(random), "rarest": [curves.CLASSES[c] for c in rarest], "arms": arms}


def _curves(ones: list[dict[str, Any]]) -> FloatArray:
    return np.array([one["balanced_accuracy"] for one in ones])


def _needed(one: dict[str, Any], target: float) -> float | None:
    return curves.labels_needed(np.array(one["balanced_accuracy"]), target, STEPS)


def _asked(counts: IntArray, until: int) -> list[float]:
    asked = counts[:, STEPS.index(until)].sum(axis=1) - counts[:, 0].sum(axis=1)
    return _interval(100.0 * asked / (until - STEPS[0]))


def _interval(values: FloatArray, scale: Any = float) -> list[float]:
    """Return mean, lower and upper bound; all of random's differences from itself are 0."""
    half = float(curves.half_width(values)) if np.ptp(values) else 0.0
    return [float(scale(values.mean() + at)) for at in (0.0, -half, half)]


def write_curves(features: str, work: Path, arms: list[str], seed: int) -> None:
    """Compute the curves of a seed; each is a file as soon as it is done."""
    for name in arms:
        path = work / f"{name}-{seed}.json"
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(curve_of(features, name, seed)))
        fresh.replace(path)


def run(features: Path, work: Path, arms: list[str], seeds: list[int], workers: int) -> list[dict[str, Any]]:
    """Compute the curves that the folder does not have yet and return all of them.

    Raises DataError: the folder has curves of other features.
    """
    work.mkdir(parents=True, exist_ok=True)
    digest, origin = hashlib.sha256(features.read_bytes()).hexdigest(), work / "features.sha256"
    if origin.is_file() and origin.read_text().strip() != digest:
        raise DataError(f"{work} has curves of other features than {features}; give another folder")
    origin.write_text(digest + "\n")
    wanted = {seed: {name: work / f"{name}-{seed}.json" for name in arms} for seed in seeds}
    missing = {seed: [name for name, path in paths.items() if not path.is_file()] for seed, paths in wanted.items()}
    missing = {seed: names for seed, names in missing.items() if names}
    began = time.monotonic()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, (work / "progress.log").open("a") as log:
        # A seed is one task: its principal components are found once.
        waiting = {pool.submit(write_curves, str(features), work, names, seed): seed for seed, names in missing.items()}
        for done, each in enumerate(as_completed(waiting), 1):
            each.result()
            took_h = (time.monotonic() - began) / 3600
            left_h = took_h / done * (len(missing) - done)
            said = f"seed {waiting[each]}: {done} of {len(missing)}, {took_h:.2f} h, {left_h:.2f} h left"
            print(said, file=sys.stderr, flush=True)
            print(said, file=log, flush=True)
    return [json.loads(path.read_text()) for paths in wanted.values() for path in paths.values()]


def main() -> None:
    """Run arms on seeds of the protocol."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    # Set before the workers start: each uses one core.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    seeds = list(range(FIRST_SEED, FIRST_SEED + options.seeds))
    run(options.features, options.work, options.arms, seeds, options.workers)


if __name__ == "__main__":
    main()
