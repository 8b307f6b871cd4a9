"""Predictions per second that several writers commit to a ledger on a real PostgreSQL.

Each writer is a process that calls `serving.outbox.write_predictions`, as the predictor's recorder does for every
micro-batch: images, predictions and the review items of some of them, in one transaction. At the end the rows are
counted: every prediction that a writer saw committed must be there once.

    python -m bench.scale.ledger [--writers 8] [--seconds 20] [--batches 1 4 16]
"""

import argparse
import json
import multiprocessing as mp
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from bench.drills.demo_on_postgres import postgres
from records.ids import new_id, sha256_hex, utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.types import Consent, Decision, Image, Prediction, ReasonCode, ReviewItem
from serving.outbox import PredictionRows, write_predictions

AIM_PER_S = 1000.0
START_TIMEOUT_S = 300.0
REVIEW_SHARE = 0.4
CODES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
CONTEXT: dict[str, str | float | None] = {
    "lesion_id": "HAM_0000118",
    "age": 61.0,
    "sex": "female",
    "localization": "lower extremity",
}


def prediction_rows(doubtful: bool) -> PredictionRows:
    """Make the rows of one prediction about an image that the ledger does not hold yet."""
    now, content = utc_now(), sha256_hex(new_id().encode())
    prediction = Prediction(
        id=new_id(),
        request_id=new_id(),
        created_at=now,
        caller="0123456789abcdef",
        organisation="clinic",
        idempotency_key=new_id(),
        image_id=content,
        consent=Consent.TRAINING,
        context=CONTEXT,
        model_id="m" * 64,
        model_status="champion",
        engine="torch",
        precision="fp32",
        num_threads=1,
        settings_hash="s" * 64,
        label="nv",
        confidence=0.7071,
        probabilities=dict.fromkeys(CODES, 1 / 7),
        prediction_set=["nv", "mel"],
        out_of_distribution_score=0.1234,
        quality_score=0.5678,
        decision=Decision.REVIEW if doubtful else Decision.ANSWERED,
        reasons=[ReasonCode.REFER] if doubtful else [],
        latency_ms=12.5,
    )
    image = Image(
        id=content,
        uri=f"file:///blobs/{content[:2]}/{content}",
        format="jpeg",
        width_px=600,
        height_px=450,
        lesion_id="HAM_0000118",
        provenance="served",
        consent=Consent.TRAINING,
        created_at=now,
    )
    review = ReviewItem(
        id=new_id(),
        created_at=now,
        prediction_id=prediction.id,
        image_id=content,
        reasons=[ReasonCode.REFER],
        priority=10.0,
        overlay_blob="o" * 64,
    )
    return PredictionRows(prediction, image, review if doubtful else None)


_START: Barrier | None = None


def keep(start: Barrier) -> None:
    """Give a new process the barrier that all writers begin at."""
    global _START
    _START = start


def write(database: str, home: Path, batch: int, seconds: float) -> list[float]:
    """Write batches until the time is over; returns the seconds that each transaction took."""
    chance = np.random.default_rng(os.getpid())
    with closing(open_store(RecordsSettings(home=home, database=database))) as store:
        if _START is not None:
            _START.wait()
        end = time.monotonic() + seconds
        took_s: list[float] = []
        while time.monotonic() < end:
            predictions = [prediction_rows(chance.random() < REVIEW_SHARE) for _ in range(batch)]
            began = time.perf_counter()
            write_predictions(store, predictions)
            took_s.append(time.perf_counter() - began)
    return took_s


def counts(database: str, home: Path) -> tuple[int, int]:
    """Return the numbers of predictions and review items."""
    with closing(open_store(RecordsSettings(home=home, database=database))) as store, store.ledger.read() as tx:
        return tx.count(Prediction), tx.count(ReviewItem)


def cpu_s(process: psutil.Process) -> float:
    """Return the CPU time of a process with all the children that it has and had, seconds."""
    with process.oneshot():
        times = process.cpu_times()
    own = times.user + times.system + times.children_user + times.children_system
    return float(own + sum(child.cpu_times().user + child.cpu_times().system for child in process.children()))


def measure(
    database: str, home: Path, server: psutil.Process, writers: int, batch: int, seconds: float
) -> dict[str, Any]:
    """Let writers write beside one another; returns their rate and whether all of it is in the database."""
    before = counts(database, home)
    # Forked, so that no writer spends the measured cores on imports; no connection is open here.
    context = mp.get_context("fork")
    start = context.Barrier(writers + 1, timeout=START_TIMEOUT_S)
    with ProcessPoolExecutor(writers, mp_context=context, initializer=keep, initargs=(start,)) as pool:
        running = [pool.submit(write, database, home, batch, seconds) for _ in range(writers)]
        start.wait()
        began, server_cpu = time.monotonic(), cpu_s(server)
        writers_cpu = sum(cpu_s(psutil.Process(pid)) for pid in pool._processes)
        took_s = np.concatenate([one.result() for one in running])
        lasted_s = time.monotonic() - began
        server_cpu = cpu_s(server) - server_cpu
        writers_cpu = sum(cpu_s(psutil.Process(pid)) for pid in pool._processes) - writers_cpu
    after = counts(database, home)
    committed = len(took_s) * batch
    return {
        "batch": batch,
        "predictions": committed,
        "review_items": after[1] - before[1],
        "missing": committed - (after[0] - before[0]),
        "per_s": round(committed / lasted_s, 1),
        "transactions_per_s": round(len(took_s) / lasted_s, 1),
        "server_cpu_ms_per_prediction": round(server_cpu / committed * 1e3, 3),
        "writers_cpu_ms_per_prediction": round(writers_cpu / committed * 1e3, 3),
        "transaction_p50_ms": round(float(np.percentile(took_s, 50)) * 1e3, 2),
        "transaction_p99_ms": round(float(np.percentile(took_s, 99)) * 1e3, 2),
    }


def main() -> int:
    """Print one JSON object; 1 if a committed prediction is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each batch size")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="predictions of one transaction")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-scale-") as scratch:
        os.chmod(scratch, 0o755)
        with postgres(Path(scratch) / "postgres") as database:
            pid = int((Path(scratch) / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
            server = psutil.Process(pid)
            runs = [
                measure(database, Path(scratch) / "home", server, options.writers, batch, options.seconds)
                for batch in options.batches
            ]
    best = max(run["per_s"] for run in runs)
    print(
        json.dumps(
            {
                "writers": options.writers,
                "review_share": REVIEW_SHARE,
                "aim_per_s": AIM_PER_S,
                "per_s": best,
                "held": best >= AIM_PER_S,
                "runs": runs,
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )
    return 1 if any(run["missing"] for run in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
