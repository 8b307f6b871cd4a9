"""1,000 interleaved predict, explain and flag calls to a real service: same responses as one at a time, stored once.

.venv/bin/python -m bench.drills.interleaved --calls 1000 --threads 16 [--max-batch-size 1]
    [--predictors 3 --ingresses 2]

Starts `relook serve` with a small trained model in a temporary folder, makes the calls one at a time, then the same
calls concurrently. In fp32 a network rounds differently in a batch than alone, so numbers are compared within 1e-6;
with batches of one, to the last bit. Prints one JSON object; the exit code is 1 if a response differs or the ledger
disagrees.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.drills import live_service
from bench.serve.interleaved import ask_all, differing, draw_calls, stored_once
from serving.client import Client


def main() -> int:
    """Make the calls twice and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000, help="of each run")
    parser.add_argument("--threads", type=int, default=16, help="calls under way at once in the second run")
    parser.add_argument("--seed", type=int, default=2026, help="of the draw")
    parser.add_argument("--max-batch-size", type=int, default=16, help="images of one forward pass; 1: no batches")
    parser.add_argument("--start-timeout", type=float, default=live_service.START_TIMEOUT_S, help="seconds")
    live_service.add_replica_options(parser)
    options = parser.parse_args()
    live_service.START_TIMEOUT_S = options.start_timeout
    sets = (
        "serving.page=false",
        f"serving.max_batch_size={options.max_batch_size}",
        f"serving.start_timeout_s={options.start_timeout}",
        *live_service.replica_sets(options),
    )
    with tempfile.TemporaryDirectory(prefix="relook-interleaved-") as folder:
        home, images = Path(folder) / "home", Path(folder) / "images"
        live_service.trained_champion(home, images)
        files = [path.read_bytes() for path in sorted(images.rglob("*.jpg"))[:40]]
        with live_service.live_service(home, *sets) as service:
            with Client(service.url) as client:
                predictions = [client.predict(data).id for data in files]
                precision = client.model().precision
            calls = draw_calls(options.seed, options.calls, len(files), service.store.taxonomy.codes)
            runs, took_s = {}, {}
            for tag, threads in (("alone", 1), ("together", options.threads)):
                began_s = time.monotonic()
                runs[tag] = ask_all(service.url, calls, files.__getitem__, predictions, threads, tag)
                took_s[tag] = round(time.monotonic() - began_s, 1)
            exactly = precision == "bf16" or options.max_batch_size == 1
            others = differing(runs["alone"], runs["together"], exactly=exactly)
            with service.store.ledger.read() as tx:
                stored = {tag: stored_once(tx, calls, said, tag) for tag, said in runs.items()}
    report = {
        "calls": len(calls),
        "kinds": {kind: sum(call.kind == kind for call in calls) for kind in ("predict", "explain", "flag")},
        "threads": options.threads,
        "precision": precision,
        "max_batch_size": options.max_batch_size,
        "replicas": {"predictor": options.predictors, "ingress": options.ingresses},
        "compared": "to the last bit" if exactly else "within 1e-6",
        "differing": len(others),
        "stored": stored,
        "seconds": took_s,
    }
    print(json.dumps(report, indent=2))
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
