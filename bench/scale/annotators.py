"""Annotations per second that a local Label Studio takes from many concurrent annotators, and their latency.

Every annotator is a thread that opens and annotates tasks without a pause, so the rate is the maximum of the server.
Divided by the rate of a person, who needs seconds to look, it gives the number of annotators that the server carries.
The server is the real one on SQLite, as `relook label up` starts it. At the end one pull reads all annotations.

    python -m bench.scale.annotators [--annotators 100] [--tasks 1000]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np

from bench.label.annotating import LOOK_S, work
from bench.label.bulk import add_review_items, counted
from labeling.client import LabelStudioClient
from labeling.local_server import LocalLabelStudio
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from records.settings import RecordsSettings
from records.store import open_store
from records.types import ReviewItem


def main() -> int:
    """Print one JSON object; 1 if an annotation is missing or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=1000)
    options = parser.parse_args()
    settings = LabelingSettings(port=0, blind_share=0.0)
    with (
        tempfile.TemporaryDirectory(prefix="relook-scale-") as scratch,
        closing(open_store(RecordsSettings(home=Path(scratch) / "home"))) as store,
    ):
        local = LocalLabelStudio(store.home, settings)
        server = local.up()
        try:
            with LabelStudioClient(server.url, server.token, timeout_s=300.0) as client:
                add_review_items(store, options.tasks, seed=0)
                began = time.perf_counter()
                push(store, client, settings)
                pushed = time.perf_counter()
                with store.ledger.read() as tx:
                    tasks = [item.task_id for item in tx.find(ReviewItem) if item.task_id is not None]
                shares = [tasks[number :: options.annotators] for number in range(options.annotators)]
                with ThreadPoolExecutor(options.annotators) as pool:
                    started = time.perf_counter()
                    took = list(pool.map(work, [client] * len(shares), shares, ["nv"] * len(shares)))
                    annotated = time.perf_counter()
                report = pull(store, client, settings)
                pulled = time.perf_counter()
                exact = counted(store, client)
        finally:
            local.down()
    took_s = np.concatenate(took)
    per_s = len(tasks) / (annotated - started)
    print(
        json.dumps(
            {
                "annotators": options.annotators,
                "tasks": len(tasks),
                "push_per_s": round(len(tasks) / (pushed - began), 1),
                "annotations_per_s": round(per_s, 1),
                "wait_p50_s": round(float(np.percentile(took_s, 50)), 2),
                "wait_p95_s": round(float(np.percentile(took_s, 95)), 2),
                "look_s": LOOK_S,
                "annotators_supported": int(per_s * LOOK_S),
                "pull_per_s": round(report.new_labels / (pulled - annotated), 1),
                "lost": exact["lost"],
                "doubled": exact["doubled"],
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )
    return 1 if exact["lost"] or exact["doubled"] else 0


if __name__ == "__main__":
    sys.exit(main())
