"""SIGKILL of each deployment of the service under load: no response is lost or doubled, and it recovers.

.venv/bin/python -m bench.drills.kill_service --kills 3

Callers repeat requests without a response under the same Idempotency-Key and flag every fifth prediction. Prints one
JSON object; the exit code is 1 if a returned prediction or an accepted flag is missing from the ledger or is there
twice, a client gave up, or no request succeeded within 30 s of a kill.
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
    """Kill every deployment several times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3, help="of each deployment")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-kills-") as folder:
        home, images = Path(folder) / "home", Path(folder) / "images"
        trained_champion(home, images)
        files = [path.read_bytes() for path in sorted(images.rglob("ISIC_*.jpg"))]
        # A predictor of its own, which can be killed alone.
        with live_service(home, "serving.one_process=false") as service:
            with Callers(service.url, files, retry_s=RETRY_S, flag_every=5) as callers:
                kills = [kill(service, callers, name) for _ in range(options.kills) for name in DEPLOYMENTS]
                callers.wait_for(20)
            report = {"kills": kills, **compare(service, callers)}
    slow = [one for one in kills if one["next_response_s"] > RECOVERS_WITHIN_S]
    holds = not (slow or report["lost"] or report["doubled"] or report["gave_up"])
    print(json.dumps({**report, "holds": holds}, indent=2))
    return 0 if holds else 1


def kill(service: LiveService, callers: Callers, deployment: str) -> dict[str, Any]:
    """Kill the replica of one deployment and wait for the response to a request that was sent later."""
    deadline = time.monotonic() + RETRY_S
    while not (replicas := service.replicas(deployment)):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no replica of {deployment} within {RETRY_S:g} s")
        time.sleep(0.2)
    callers.wait_for(20)
    victim = replicas[0]
    victim.kill()
    psutil.wait_procs([victim], timeout=10)
    killed_s, before = time.monotonic(), len(callers.responses)
    # As many responses as there are callers may have been in flight when it was killed.
    callers.wait_for(callers.threads + 1, timeout_s=RETRY_S)
    after_s = callers.responses[before + callers.threads][0] - killed_s
    return {"killed": deployment, "next_response_s": round(after_s, 2)}


def compare(service: LiveService, callers: Callers) -> dict[str, Any]:
    """Compare the responses of callers with the ledger."""
    returned = [response.id for _, response in callers.responses]
    with service.store.ledger.read() as tx:
        stored = [row.id for row in tx.find(Prediction) if row.served]
        flags = [row.id for row in tx.find(Flag)]
    lost = len(set(returned) - set(stored)) + len(set(callers.flags) - set(flags))
    # One key, one prediction: more rows than responses would be requests that were predicted twice.
    doubled = sum(n - 1 for n in Counter([*returned, *callers.flags]).values()) + max(0, len(stored) - len(returned))
    doubled += max(0, len(flags) - len(callers.flags))
    figures = {"responses": len(returned), "flags": len(callers.flags), "lost": lost, "doubled": doubled}
    return {**figures, "gave_up": len(callers.failures), "failures": callers.failures[:5]}


if __name__ == "__main__":
    sys.exit(main())
