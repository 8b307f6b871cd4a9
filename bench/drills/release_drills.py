"""Releases under live traffic on a real Ray Serve: a good candidate to promotion, broken ones to rollback.

.venv/bin/python -m bench.drills.release_drills [--predictors 3 --ingresses 2]

Prints one JSON object; the exit code is 1 if a condition fails: no request of the good release fails, each broken
candidate is rolled back within the stated number of images (and those in flight), every served prediction is finite.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.drills.live_service import (
    Callers,
    LiveService,
    add_replica_options,
    bundle_of,
    live_service,
    replica_sets,
    trained_champion,
)
from cluster.demo.faults import harmed_copy, twin
from records.bundles import Architecture, Bundle, write_bundle
from records.errors import RefusedError, UnknownIdError
from records.models import register
from records.store import Store
from records.types import Arm, ModelStatus, Prediction, ReasonCode, Rollout, RolloutStage
from serving.client import Client
from serving.rollout.guardrails import GUARDRAILS, log_evidence, threshold
from serving.schemas import RolloutRequest
from vision.inference.loaded import plain_network, reference_logits
from vision.networks import build_model

IN_FLIGHT = 8
"""Images in flight, two batches of all callers, when the guardrail trips."""


@dataclass(frozen=True)
class Broken:
    """A candidate that does harm.

    Args:
        name: for the report.
        harm: kind of harm that has to be found.
        bundle: the candidate.
    """

    name: str
    harm: str
    bundle: Bundle


def observations_needed(name: str, rate: float) -> int | None:
    """Return after how many observations a guardrail ends the rollout if exactly `rate` (0 to 1) of them are events.

    None beyond 100,000 observations.
    """
    low, high = 1, 100_000
    limit = GUARDRAILS[name].limit
    if log_evidence(high, math.floor(high * rate), limit) < threshold():
        return None
    while low < high:
        middle = (low + high) // 2
        if log_evidence(middle, math.floor(middle * rate), limit) >= threshold():
            high = middle
        else:
            low = middle + 1
    return low


def main() -> int:
    """Run all drills."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=60, help="responses to wait for at each step")
    add_replica_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="relook-release-") as folder:
        home, images = Path(folder) / "home", Path(folder) / "images"
        champion_id = trained_champion(home, images)
        files = [path.read_bytes() for path in sorted(images.rglob("ISIC_*.jpg"))]
        with live_service(home, *replica_sets(options)) as service:
            champion = bundle_of(service, champion_id)
            report: dict[str, Any] = {"broken": []}
            for broken in (
                Broken("sure, and never of the key class", "downgrade", overconfident(service.store, champion)),
                Broken("not finite", "non_finite", overflowing(service.store, champion)),
                Broken("slow", "slow", slow(service.store, champion)),
            ):
                report["broken"].append(drill(service, broken, files))
            report["wrong_weights"] = refused_at_once(service, wrong_weights(service.store, champion), files)
            report["good"] = good_release(service, twin(service.store, champion), files, options.responses)
    failed = [one["candidate"] for one in report["broken"] if not one["holds"]]
    failed += [name for name in ("wrong_weights", "good") if not report[name]["holds"]]
    print(json.dumps({**report, "failed": failed}, indent=2))
    return 1 if failed else 0


def drill(service: LiveService, broken: Broken, files: list[bytes]) -> dict[str, Any]:
    """Route half of the lesions to a broken candidate, and wait until it is rolled back."""
    _candidate(service.store, broken.bundle)
    with service.admin() as admin, Callers(service.url, files) as callers:
        callers.wait_for(10)
        admin.roll_out(RolloutRequest(model=broken.bundle.id, percent=50, champion=admin.model().id))
        ended = _wait_until_ended(service.store, broken.bundle.id)
        callers.wait_for(10)
    looked, harmed = ended.evidence.get(broken.harm, (0, 0))
    stated = observations_needed(broken.harm, harmed / looked) if looked and harmed else None
    with service.store.ledger.read() as tx:
        asked = tx.find(Prediction, where={"model_id": broken.bundle.id})
    served_not_finite = sum(p.served and ReasonCode.NON_FINITE in p.reasons for p in asked)
    figures = {
        "candidate": broken.name,
        "why": ended.why,
        "looks": looked,
        "looks_stated": stated,
        "images_it_saw": len(asked),
        "failed_requests": len(callers.failures),
        "served_not_finite": served_not_finite,
    }
    within = stated is not None and looked <= stated + IN_FLIGHT
    taken_back = ended.stage is RolloutStage.ROLLED_BACK
    return {**figures, "holds": taken_back and within and not callers.failures and not served_not_finite}


def refused_at_once(service: LiveService, bundle: Bundle, files: list[bytes]) -> dict[str, Any]:
    """A candidate whose golden logits are wrong is refused before it starts."""
    _candidate(service.store, bundle)
    said = ""
    with service.admin() as admin, Callers(service.url, files) as callers:
        try:
            admin.roll_out(RolloutRequest(model=bundle.id, percent=10))
        except RefusedError as error:
            said = str(error)
        callers.wait_for(10)
    with service.store.ledger.read() as tx:
        asked = tx.count(Prediction, where={"model_id": bundle.id})
    return {"said": said, "images_it_saw": asked, "holds": "golden" in said and asked == 0 and not callers.failures}


def good_release(service: LiveService, bundle: Bundle, files: list[bytes], responses: int) -> dict[str, Any]:
    """Shadow, 10 %, 50 %, everything; no request may fail."""
    _candidate(service.store, bundle)
    steps = []
    with service.admin() as admin, Callers(service.url, files) as callers:
        rollout = None
        for percent in (0, 10, 50):
            rollout = admin.roll_out(RolloutRequest(model=bundle.id, percent=percent, rollout=rollout)).id
            callers.wait_for(responses)
            steps.append({"percent": percent, "candidate_saw": _seen(service.store, bundle.id)})
        admin.roll_out(RolloutRequest(model=bundle.id, percent=100, rollout=rollout))
        _wait_until_model(admin, bundle.id)
        callers.wait_for(responses)
    with service.store.ledger.read() as tx:
        shadows = tx.count(Prediction, where={"model_id": bundle.id, "arm": Arm.SHADOW})
        stored = tx.find(Prediction, where={"id": [response.id for _, response in callers.responses]})
    ids = {response.id for _, response in callers.responses}
    whole = len(stored) == len(ids) == len(callers.responses)
    served_by_it = callers.responses[-1][1].model.id == bundle.id
    return {
        "steps": steps,
        "requests": len(callers.responses),
        "failed_requests": len(callers.failures),
        "mirrored": shadows,
        "holds": whole and served_by_it and shadows > 0 and not callers.failures,
    }


def overconfident(store: Store, bundle: Bundle) -> Bundle:
    """Copy a model so that it hardly ever predicts the key class, with high confidence."""
    harmed = harmed_copy(store, bundle)
    calibration = harmed.document.calibration
    sharper = calibration.model_copy(
        update={"temperature": calibration.temperature / 10, "bias": [10 * value for value in calibration.bias]}
    )
    document = harmed.document.model_copy(update={"calibration": sharper})
    return write_bundle(store, document, harmed.weights(), harmed.golden(), harmed.suitability())


def overflowing(store: Store, bundle: Bundle) -> Bundle:
    """Copy a model so that it is finite on its golden images, which are black, and on no other."""
    network = plain_network(bundle)
    name = next(name for name, value in network.named_parameters() if value.ndim == 4)
    with torch.no_grad():
        weight = network.get_parameter(name)
        weight.copy_(weight.abs() / weight.abs().max() * 3e38)
    inputs = np.zeros_like(bundle.golden()["inputs"])
    golden = {"inputs": inputs, "logits": reference_logits(network, inputs, bundle.document.geometry)}
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    return _copy(store, bundle, "not finite", weights=weights, golden=golden)


def slow(store: Store, bundle: Bundle) -> Bundle:
    """Write a far larger network that refers every image to an annotator: only its latency can trip a guardrail."""
    network = build_model("resnet34", len(bundle.document.taxonomy.codes)).eval()
    inputs = bundle.golden()["inputs"]
    golden = {"inputs": inputs, "logits": reference_logits(network, inputs, bundle.document.geometry)}
    key = bundle.document.taxonomy.key_class
    bias = [20.0 if key and code == key.code else 0.0 for code in bundle.document.taxonomy.codes]
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    calibration = bundle.document.calibration.model_copy(update={"bias": bias})
    changed = {"architecture": Architecture(name="resnet34"), "calibration": calibration, "suitability": None}
    document = bundle.document.model_copy(update={**changed, "metrics": {"fault": "slow"}})
    return write_bundle(store, document, weights, golden)


def wrong_weights(store: Store, bundle: Bundle) -> Bundle:
    """Copy a model with the weights of one layer shuffled, and its golden logits unchanged."""
    weights = {name: value.copy() for name, value in bundle.weights().items()}
    name = max(weights, key=lambda key: weights[key].size)
    weights[name] = np.random.default_rng(0).permutation(weights[name].ravel()).reshape(weights[name].shape)
    return _copy(store, bundle, "wrong weights", weights=weights, golden=bundle.golden())


def _copy(store: Store, bundle: Bundle, planted: str, *, weights: Any, golden: Any) -> Bundle:
    document = bundle.document.model_copy(update={"metrics": {"fault": planted}, "parent_model_id": bundle.id})
    return write_bundle(store, document, weights, golden, bundle.suitability())


def _candidate(store: Store, bundle: Bundle) -> None:
    with store.ledger.begin() as tx:
        register(tx, bundle, status=ModelStatus.CANDIDATE)


def _seen(store: Store, model_id: str) -> int:
    with store.ledger.read() as tx:
        return tx.count(Prediction, where={"model_id": model_id})


def _wait_until_ended(store: Store, model_id: str, timeout_s: float = 180.0) -> Rollout:
    deadline = time.monotonic() + timeout_s
    while True:
        with store.ledger.read() as tx:
            (found,) = tx.find(Rollout, where={"candidate_id": model_id})
        if found.ended_at is not None or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _wait_until_model(admin: Client, model_id: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while admin.model().id != model_id:
        if time.monotonic() > deadline:
            raise UnknownIdError(f"model {model_id[:12]} does not serve after {timeout_s:g} s")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
