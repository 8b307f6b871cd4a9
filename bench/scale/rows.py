"""Times of what operators and callers do all day, in a ledger of many predictions: trace, list, monitor, retain.

The images of `bench.scale.version` get predictions, spread evenly; two of a hundred have a review item, half of these
in the audit sample. Every figure is the median and the 95th percentile of so many calls by one process.
"""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import sqlalchemy as sa

from bench.scale.ledger import prediction_rows
from bench.scale.version import image
from cluster.monitor import monitor
from records.ids import sha256_hex, utc_now
from records.ledger.tables import TABLES
from records.lineage import trace
from records.retention import find_due
from records.store import Store
from records.types import Decision, Prediction, ReasonCode, Record, ReviewItem
from serving.access.keys import LOCAL, Caller
from serving.metrics import Metrics
from serving.responses import read_page

ROWS_AT_ONCE = 20_000
EVERY_REVIEWED, EVERY_AUDITED = 50, 100


def prediction(number: int) -> str:
    """Return the id of a synthetic prediction; ids sort by number, as real ones do by time."""
    return f"{number:016x}{sha256_hex(str(number).encode())[:16]}"


def add_predictions(store: Store, rows: int, images: int) -> None:
    """Write predictions, a second apart, and their review items."""
    made, start = prediction_rows(doubtful=True), utc_now() - timedelta(seconds=rows)
    assert made.review is not None
    of_prediction, of_item = made.prediction.model_dump(), made.review.model_dump()
    for first in range(0, rows, ROWS_AT_ONCE):
        values: dict[type[Record], list[dict[str, Any]]] = {Prediction: [], ReviewItem: []}
        for number in range(first, min(first + ROWS_AT_ONCE, rows)):
            about = {"image_id": image(number % images), "created_at": start + timedelta(seconds=number)}
            ids = {"id": prediction(number), "request_id": prediction(number), "idempotency_key": prediction(number)}
            values[Prediction].append(of_prediction | about | ids | {"organisation": f"clinic {number % 10}"})
            if number % EVERY_REVIEWED == 0:
                drawn = number % EVERY_AUDITED == 0
                reasons = [ReasonCode.AUDIT_SAMPLE if drawn else ReasonCode.REFER]
                share = {"reasons": reasons, "selection_probability": 0.01 if drawn else None}
                names = {"id": ids["id"], "prediction_id": ids["id"]}
                values[ReviewItem].append(of_item | about | share | names)
        with store.ledger.begin() as tx:
            for record_type, some in values.items():
                tx.connection.execute(sa.insert(TABLES[record_type]), some)


def measured(store: Store, rows: int, images: int, calls: int) -> dict[str, dict[str, float]]:
    """Return milliseconds by what was done."""
    chance = np.random.default_rng(0)

    def drawn(below: int) -> int:
        return int(chance.integers(0, below))

    clinic = Caller("key", "clinic 3", frozenset())
    kept = store.settings.model_copy(update={"keep_images_days": 365, "keep_predictions_days": 365})
    year_old = Store(kept, store.home, store.taxonomy, store.ledger, store.blobs)
    metrics = Metrics(store)
    acts: dict[str, tuple[int, Callable[[], object]]] = {
        "trace of an image": (calls, lambda: trace(store, image(drawn(images)))),
        "trace of a prediction": (calls, lambda: trace(store, prediction(drawn(rows)))),
        "page of all predictions": (calls, lambda: read_page(store, LOCAL, None, None, 50)),
        "page of a clinic": (calls, lambda: read_page(store, clinic, None, prediction(drawn(rows)), 50)),
        "page of a decision": (calls, lambda: read_page(store, LOCAL, Decision.RETAKE, None, 50)),
        "metrics": (5, metrics.text),
        "monitor": (3, lambda: monitor(store, 0.01)),
        "retention, nothing due": (3, lambda: find_due(year_old)),
    }
    return {name: _timed(times, act) for name, (times, act) in acts.items()}


def _timed(times: int, act: Callable[[], object]) -> dict[str, float]:
    took_ms, cpu_ms = [], []
    for _ in range(times):
        began, cpu = time.perf_counter(), time.process_time()
        act()
        took_ms.append((time.perf_counter() - began) * 1e3)
        cpu_ms.append((time.process_time() - cpu) * 1e3)
    return {
        "p50_ms": round(float(np.median(took_ms)), 1),
        "p95_ms": round(float(np.percentile(took_ms, 95)), 1),
        "cpu_p50_ms": round(float(np.median(cpu_ms)), 1),
    }
