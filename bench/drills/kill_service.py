"""SIGKILL of each part of the service under load: nothing answered is lost, nothing is doubled, and it comes back.

.venv/bin/python -m bench.drills.kill_service --kills 3

Callers repeat what got no answer with the same Idempotency-Key and flag every fifth answer. One JSON object; the
exit code is 1 if an answer or an accepted flag is missing from the ledger, one stands there twice, a client gave up,
or no request succeeded within 30 s of a kill.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench.drills.live_service import Callers, LiveService, live_service, trained_champion
from records.types import Flag, Prediction

DEPLOYMENTS = ("predictor", "ingress", "explainer")
RECOVERS_WITHIN_S = 30.0
RETRY_S = 120.0


def main() -> int:
    """Kill every part several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each part")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-kills-") as folder:
        home, images = Path(folder) / "home", Path(folder) / "images"
        trained_champion(home, images)
        files = [path.read_bytes() for path in sorted(images.rglob("ISIC_*.jpg"))]
        with live_service(home) as service:
            with Callers(service.url, files, retry_s=RETRY_S, flag_every=5) as callers:
                kills = [kill(service, callers, name) for _ in range(options.kills) for name in DEPLOYMENTS]
                callers.wait_for(20)
            report = {"kills": kills, **compare(service, callers)}
    slow = [one for one in kills if one["next_answer_s"] > RECOVERS_WITHIN_S]
    holds = not (slow or report["lost"] or report["doubled"] or report["gave_up"])
    print(json.dumps({**report, "holds": holds}, indent=2))
    return 0 if holds else 1


def kill(service: LiveService, callers: Callers, deployment: str) -> dict[str, Any]:
    """Kill the replica of one deployment and wait until a request that was sent later is answered."""
    deadline = time.monotonic() + RETRY_S
    while not (replicas := service.replicas(deployment)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no replica of {deployment} within {RETRY_S:g} s")
        time.sleep(0.2)
    callers.wait_for(20)
    victim = replicas[0]
    victim.kill()
    psutil.wait_procs([victim], timeout=10)
    killed_s, before = time.monotonic(), len(callers.answers)
    # As many answers as there are callers may have been under way when it was killed.
    callers.wait_for(callers.threads + 1, timeout_s=RETRY_S)
    after_s = callers.answers[before + callers.threads][0] - killed_s
    return {"killed": deployment, "next_answer_s": round(after_s, 2)}


def compare(service: LiveService, callers: Callers) -> dict[str, Any]:
    """Compare what callers were told with the ledger."""
    told = [answer.id for _, answer in callers.answers]
    with service.store.ledger.read() as tx:
        stored = [row.id for row in tx.find(Prediction) if row.served]
        flags = [row.id for row in tx.find(Flag)]
    lost = len(set(told) - set(stored)) + len(set(callers.flags) - set(flags))
    # One key, one prediction: more rows than answers would be requests that were predicted twice.
    doubled = sum(n - 1 for n in Counter([*told, *callers.flags]).values()) + max(0, len(stored) - len(told))
    doubled += max(0, len(flags) - len(callers.flags))
    figures = {"answers": len(told), "flags": len(callers.flags), "lost": lost, "doubled": doubled}
    return {**figures, "gave_up": len(callers.failures), "failures": callers.failures[:5]}


if __name__ == "__main__":
    sys.exit(main())
