"""Time and memory of what is done in the ledger while a million review items wait.

The ledger is filled with generated items. In a process whose largest resident memory is reported, two things are timed:
what a push reads before it sends the first task (the plan of reads, the number of items of each project, the first
pages), and the lookup of open items of the images of one batch of predictions.

    python -m bench.scale.queue [--items 1000000]
"""

import argparse
import json
import multiprocessing as mp
import os
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from labeling.queue import waiting_pages, waiting_reads
from labeling.reads import plan_reads, stale_items
from labeling.settings import LabelingSettings
from records.ids import new_id, sha256_hex, utc_now
from records.ledger.tables import TABLES
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ReasonCode, ReviewItem, ReviewState
from serving.outbox import merge_items

PAGES, LOOKUPS, BATCH = 20, 20, 16
_ROWS_AT_ONCE = 20_000


def fill(store: Store, items: int) -> None:
    """Write waiting review items, each with a heat map, of random priority."""
    chance, now = np.random.default_rng(0), utc_now()
    base = ReviewItem(
        id="0", created_at=now, image_id="0" * 64, reasons=[ReasonCode.REFER], priority=0.0,
        heat_map=chance.integers(0, 256, (7, 7)).tolist(), state=ReviewState.NEW,
    ).model_dump()  # fmt: skip
    for start in range(0, items, _ROWS_AT_ONCE):
        numbers = range(start, min(start + _ROWS_AT_ONCE, items))
        rows = [
            {**base, "id": new_id(), "image_id": sha256_hex(f"{n}".encode()), "priority": float(chance.random() * 300)}
            for n in numbers
        ]
        with store.ledger.begin() as tx:
            tx.connection.execute(sa.insert(TABLES[ReviewItem]), rows)


def read(settings: RecordsSettings) -> dict[str, Any]:
    """Read what a push reads, and return times and memory."""
    labeling = LabelingSettings(blind_share=0.0)
    with closing(open_store(settings)) as store:
        began = time.perf_counter()
        plan_reads(store, labeling)
        planned = time.perf_counter()
        with store.ledger.read() as tx:
            counts = waiting_reads(tx)
        counted = time.perf_counter()
        pages = [len(page) for page in islice(waiting_pages(store, counts, labeling.push_batch), PAGES)]
        paged = time.perf_counter()
        stale = len(stale_items(store))
        ended = time.perf_counter()
        with store.ledger.begin() as tx:
            items = tx.find(ReviewItem, limit=LOOKUPS * BATCH)
            found = time.perf_counter()
            for start in range(0, len(items), BATCH):
                merge_items(tx, items[start : start + BATCH])
            merged = time.perf_counter()
        return {
            "waiting": sum(counts.values()),
            "plan_s": round(planned - began, 2),
            "count_s": round(counted - planned, 2),
            "page_s": round((paged - counted) / len(pages), 4),
            "stale_s": round(ended - paged, 2),
            "batch_ms": round(1000 * (merged - found) / max(1, len(items) / BATCH), 2),
            "stale": stale,
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }


def main() -> int:
    """Print one JSON object; 1 if an item is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-scale-") as scratch:
        settings = RecordsSettings(home=Path(scratch) / "home")
        with closing(open_store(settings)) as store:
            fill(store, options.items)
        with ProcessPoolExecutor(1, mp_context=mp.get_context("spawn")) as pool:
            figures = pool.submit(read, settings).result()
    print(json.dumps({**figures, "load": os.getloadavg()}, indent=2))
    return 0 if figures["waiting"] == options.items else 1


if __name__ == "__main__":
    sys.exit(main())
