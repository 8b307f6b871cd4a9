"""Time and memory of comparing all images with all: choosing 1,000 of a million, and near-duplicates among them.

Features are random float16 in a memory-mapped file; the probabilities are random as well. The largest resident memory
is that of the whole process, including pages of the mapped file that are in memory.

    python -m bench.scale.select [--rule k_center] [--rows 1000000] [--features 512] [--budget 1000]
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

from images.near_duplicates import hash_pairs
from labeling.acquisition.registry import Pool, choose

CLASSES, ROWS_AT_ONCE = 7, 20_000


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=["k_center", "badge", "none"], default="k_center")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--budget", type=int, default=1000)
    options = parser.parse_args()
    chance = np.random.default_rng(0)
    hashes = chance.integers(0, 2**64, options.rows, dtype=np.uint64)
    began = time.perf_counter()
    pairs, _ = hash_pairs(hashes)
    figures = {"rows": options.rows, "near_duplicates_s": round(time.perf_counter() - began, 1), "pairs": len(pairs)}
    if options.rule != "none":
        with tempfile.TemporaryDirectory(prefix="relook-scale-") as folder:
            path, shape = Path(folder) / "features", (options.rows, options.features)
            features = np.memmap(path, dtype=np.float16, mode="w+", shape=shape)
            for at in range(0, options.rows, ROWS_AT_ONCE):
                part = features[at : at + ROWS_AT_ONCE]
                part[:] = chance.standard_normal(part.shape, dtype=np.float32) * chance.gamma(4, size=(len(part), 1))
            ids = [f"{number:064x}" for number in range(options.rows)]
            probabilities = chance.dirichlet(np.ones(CLASSES), options.rows)
            pool = Pool(ids=ids, group_ids=ids, probabilities=probabilities, features=features)
            began = time.perf_counter()
            chosen = choose(options.rule, pool, options.budget)
            took_s = time.perf_counter() - began
            figures |= {"rule": options.rule, "chosen": len(set(chosen)), "select_1m_s": round(took_s, 1)}
    figures["memory_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({**figures, "load": os.getloadavg()}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
