"""Compare every acquisition rule with random selection, by the protocol in docs/protocols/acquisition.md.

.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR features.npz
.venv/bin/python -m bench.label.acquisition_curves features.npz --out curves.json --plot docs/images/acquisition.png
"""

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from labeling.acquisition.registry import RULES, Pool, choose
from records.arrays import Float32Array, FloatArray, IntArray
from records.taxonomy import load_taxonomy

STEPS = (100, 150, 200, 300, 400, 600, 800, 1_200, 1_600)
MELANOMAS_UNTIL = 600
HELD_OUT, COMPONENTS, STRENGTH = 0.2, 128, 0.01
PASSES, DROPPED = 20, 0.1
TAXONOMY = load_taxonomy("ham10000")
CLASSES = list(TAXONOMY.codes)
COSTS = np.array([each.miss_cost for each in TAXONOMY.classes])
MELANOMA = CLASSES.index("mel")


@dataclass(frozen=True)
class Splits:
    """Pool [P] and held-out images [H] of one seed; features are reduced by a PCA of the pool."""

    ids: list[str]
    pool: Float32Array
    pool_labels: IntArray
    held_out: Float32Array
    held_out_labels: IntArray


def split(path: str, seed: int) -> Splits:
    """Hold out a fifth of the lesions of each class; the pool has the first image of each remaining lesion."""
    data = np.load(path)
    labels = np.array([CLASSES.index(label) for label in data["labels"]])
    _, first, lesion = np.unique(data["lesions"], return_index=True, return_inverse=True)
    chance, out = np.random.default_rng(seed), np.zeros(len(first), dtype=bool)
    for c in range(len(CLASSES)):
        members = np.flatnonzero(labels[first] == c)
        out[chance.permutation(members)[: round(HELD_OUT * len(members))]] = True
    rows, tested = np.sort(first[~out]), np.flatnonzero(out[lesion])
    scaler = StandardScaler().fit(data["features"][rows])
    pool = scaler.transform(data["features"][rows])
    reduced = PCA(COMPONENTS, svd_solver="covariance_eigh", random_state=0).fit(pool)
    held_out = reduced.transform(scaler.transform(data["features"][tested]))
    found = reduced.transform(pool).astype(np.float32)
    return Splits([str(i) for i in data["ids"][rows]], found, labels[rows], held_out.astype(np.float32), labels[tested])


@dataclass(frozen=True)
class Head:
    """Logistic regression over all classes; a class without labels gets probability 0."""

    model: LogisticRegression
    shares: FloatArray

    def probabilities(self, features: Float32Array | FloatArray) -> FloatArray:
        """Return [N, C]."""
        found = np.zeros((len(features), len(CLASSES)))
        found[:, self.model.classes_] = self.model.predict_proba(features.astype(np.float64))
        return np.asarray(found / found.sum(axis=1, keepdims=True))

    def balanced_accuracy(self, features: Float32Array, labels: IntArray) -> float:
        """Return the mean recall of decisions at equal class shares."""
        found = self.probabilities(features) / np.where(self.shares > 0, self.shares, np.inf)
        right = found.argmax(axis=1) == labels
        return float(np.mean([right[labels == c].mean() for c in range(len(CLASSES))]))


def fit(features: Float32Array | FloatArray, labels: IntArray) -> Head:
    """Fit the head on the labelled images."""
    # This solver ends nearer to the optimum than lbfgs, and in float32 after half of the time.
    model = LogisticRegression(C=STRENGTH, max_iter=2_000, solver="newton-cg")
    model.fit(features.astype(np.float32), labels)
    return Head(model, np.bincount(labels, minlength=len(CLASSES)) / len(labels))


def pool_of(rules: list[str], splits: Splits, head: Head, known: list[int], seed: int) -> tuple[NDArray[np.intp], Pool]:
    """Return the rows without a label, and what the rules read about them."""
    blocked = np.zeros(len(splits.ids), dtype=bool)
    blocked[known] = True
    free = np.flatnonzero(~blocked)
    features = splits.pool[free]
    samples = None
    if any("samples" in RULES[rule].needs for rule in rules):
        chance = np.random.default_rng(seed)
        masks = (chance.random((PASSES, COMPONENTS)) >= DROPPED) / (1 - DROPPED)
        samples = np.stack([head.probabilities(features * mask) for mask in masks])
    ids = [splits.ids[row] for row in free]
    counts = np.bincount(splits.pool_labels[known], minlength=len(CLASSES))
    probabilities = head.probabilities(features)
    return free, Pool(ids, ids, probabilities, features, samples, splits.pool[known], COSTS, head.shares, counts)


def choose_next(rule: str, splits: Splits, head: Head, known: list[int], count: int, seed: int) -> list[int]:
    """Return the rows of the pool that a rule chooses next."""
    free, pool = pool_of([rule], splits, head, known, seed)
    # The protocol gives the rules their probabilities unchanged.
    return [int(free[row]) for row in choose(rule, pool, count, seed=seed, prevalence="natural")]


def learning_curve(rule: str, splits: Splits, seed: int) -> tuple[list[float], list[int]]:
    """Return balanced accuracy and the number of labelled melanomas at each step."""
    chance = np.random.default_rng(1_000 + seed)
    known = [int(row) for row in chance.choice(len(splits.ids), STEPS[0], replace=False)]
    accuracies, melanomas = [], []
    for step in STEPS:
        if step > len(known):
            head = fit(splits.pool[known], splits.pool_labels[known])
            known += choose_next(rule, splits, head, known, step - len(known), 10_000 * seed + step)
        assert len(set(known)) == step
        head = fit(splits.pool[known], splits.pool_labels[known])
        accuracies.append(head.balanced_accuracy(splits.held_out, splits.held_out_labels))
        melanomas.append(int((splits.pool_labels[known] == MELANOMA).sum()))
    return accuracies, melanomas


def one_seed(path: str, seed: int) -> dict[str, Any]:
    """Return the curves of all rules for one seed, and the balanced accuracy with the whole pool labelled."""
    splits = split(path, seed)
    full = fit(splits.pool, splits.pool_labels).balanced_accuracy(splits.held_out, splits.held_out_labels)
    rules = {}
    for rule in RULES:
        accuracies, melanomas = learning_curve(rule, splits, seed)
        rules[rule] = {"balanced_accuracy": accuracies, "melanomas": melanomas}
    return {"seed": seed, "full": full, "pool": len(splits.ids), "rules": rules}


def half_width(values: FloatArray) -> FloatArray:
    """Return half of the 95 % band of a mean over overlapping splits (Nadeau and Bengio 2003); [seeds, ...]."""
    return np.asarray(stats.t.ppf(0.975, len(values) - 1) * _error(values))


def p_value(differences: FloatArray) -> float:
    """Return the two-sided p-value of a mean difference of 0; [seeds]."""
    if not differences.any():
        return 1.0
    return float(2 * stats.t.sf(abs(differences.mean() / _error(differences)), len(differences) - 1))


def holm(p_values: dict[str, float], tests: int = 0) -> dict[str, float]:
    """Return p-values adjusted for their number, or for a larger number of tests, of which some are not known yet.

    The unknown ones are taken for the largest, so that no adjusted value can become larger by them (Holm 1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, highest, number = {}, 0.0, max(tests, len(p_values))
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (number - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def labels_needed(curve: FloatArray, target: float, steps: tuple[int, ...] = STEPS) -> float | None:
    """Return the number of labels at which a curve first reaches a target, linear between steps; None if never."""
    reached = np.flatnonzero(curve >= target)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(steps[0])
    share = (target - curve[at - 1]) / (curve[at] - curve[at - 1])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def summarise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the protocol for every rule."""
    curves = {rule: np.array([s["rules"][rule]["balanced_accuracy"] for s in seeds]) for rule in RULES}
    areas = {rule: np.trapezoid(curve, STEPS, axis=1) / (STEPS[-1] - STEPS[0]) for rule, curve in curves.items()}
    adjusted = holm({rule: p_value(areas[rule] - areas["random"]) for rule in RULES if rule != "random"})
    full = float(np.mean([s["full"] for s in seeds]))
    until = STEPS.index(MELANOMAS_UNTIL)
    rules = {}
    for rule in RULES:
        counts = np.array([s["rules"][rule]["melanomas"] for s in seeds])
        found = 100.0 * (counts[:, until] - counts[:, 0]) / (MELANOMAS_UNTIL - STEPS[0])
        gain = areas[rule] - areas["random"]
        rules[rule] = {
            "area": float(areas[rule].mean()),
            "gain": float(gain.mean()),
            "gain_band": float(half_width(gain)) if rule != "random" else None,
            "holm_p": adjusted.get(rule),
            "labels_needed": labels_needed(curves[rule].mean(axis=0), 0.95 * full),
            "melanomas_per_100": float(found.mean()),
            "melanomas_band": float(half_width(found)),
            "at_1600": float(curves[rule][:, -1].mean()),
        }
    return {"full": full, "target": 0.95 * full, "seeds": len(seeds), "rules": rules}


def plot(seeds: list[dict[str, Any]], target: float, out: Path) -> None:
    """Plot the mean curves with their bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 5, figsize=(17, 6), sharex=True, sharey=True, layout="constrained")
    base = np.array([s["rules"]["random"]["balanced_accuracy"] for s in seeds])
    for panel, rule in zip(panels.flat, RULES, strict=True):
        curve = np.array([s["rules"][rule]["balanced_accuracy"] for s in seeds])
        mean, half = curve.mean(axis=0), half_width(curve)
        panel.plot(STEPS, base.mean(axis=0), color="0.5", label="random")
        panel.plot(STEPS, mean, color="tab:blue", label=rule)
        panel.fill_between(STEPS, mean - half, mean + half, color="tab:blue", alpha=0.2)
        panel.axhline(target, color="0.7", linestyle=":")
        panel.set_title(rule)
    figure.supxlabel("labels")
    figure.supylabel("held-out balanced accuracy; dotted: 95 % of the figure with all labels")
    figure.savefig(out, dpi=90)


def main() -> None:
    """Run all seeds, write the curves and figures, and plot them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    seeds = list(range(options.seeds))
    # Set before the workers start: each uses one core.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as workers:
        found = list(workers.map(one_seed, [options.features] * len(seeds), seeds))
    figures = summarise(found)
    options.out.write_text(json.dumps({"figures": figures, "courses": found}, indent=1))
    if options.plot:
        plot(found, figures["target"], options.plot)
    print(json.dumps(figures, indent=1))


def _error(values: FloatArray) -> FloatArray:
    variance = np.square(values - values.mean(axis=0)).sum(axis=0) / (len(values) - 1)
    return np.asarray(np.sqrt(variance * (1 / len(values) + HELD_OUT / (1 - HELD_OUT))))


if __name__ == "__main__":
    main()
