"""How well the second-opinion queue finds wrong labels that were inserted into HAM10000.

.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR features.npz
.venv/bin/python -m bench.label.label_noise features.npz

Five-fold cross-validation by lesion, one image per lesion; the head is that of `acquisition_curves.py`, fitted on the
noisy labels of the other folds. One lesion in twenty gets another diagnosis, drawn evenly from the six others; the
queue is `suspicious_rows`.
"""

import argparse
import json
import math

import numpy as np
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from bench.label.acquisition_curves import CLASSES, COMPONENTS, fit
from labeling.acquisition.scores import suspicious_rows
from records.arrays import FloatArray, IntArray

NOISE, FOLDS, RECALL = 0.05, 5, 0.5


def one_seed(features: FloatArray, truth: IntArray, seed: int) -> dict[str, float | None]:
    """Return the precision at which half of the planted errors are found (None if never), and both over all rows."""
    chance = np.random.default_rng(seed)
    wrong = chance.choice(len(truth), round(NOISE * len(truth)), replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + chance.integers(1, len(CLASSES), len(wrong))) % len(CLASSES)
    fold = chance.permutation(np.arange(len(truth)) % FOLDS)
    probabilities = np.zeros((len(truth), len(CLASSES)))
    for k in range(FOLDS):
        learned = fold != k
        probabilities[~learned] = fit(features[learned], labels[learned]).probabilities(features[~learned])
    queue = suspicious_rows(labels, probabilities)
    hits = np.cumsum(np.isin(queue, wrong))
    needed = math.ceil(RECALL * len(wrong))
    found = int(hits[-1]) if len(hits) else 0
    reached = found >= needed
    return {
        "precision_at_half": needed / (int(np.searchsorted(hits, needed)) + 1) if reached else None,
        "queue": len(queue),
        "queue_precision": found / max(len(queue), 1),
        "queue_recall": found / len(wrong),
    }


def main() -> None:
    """Print the figures of ten seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features")
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    data = np.load(options.features)
    _, first = np.unique(data["lesions"], return_index=True)
    truth = np.array([CLASSES.index(label) for label in data["labels"][first]])
    scaled = StandardScaler().fit_transform(data["features"][first])
    features = PCA(COMPONENTS, svd_solver="covariance_eigh").fit_transform(scaled)
    print(json.dumps([one_seed(features, truth, seed) for seed in range(options.seeds)], indent=1))


if __name__ == "__main__":
    main()
