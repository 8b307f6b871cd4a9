"""CPU time that a request takes in each part of the service, beside a device that takes 2 ms for a batch of 64.

    python -m bench.scale.requests [--seconds 20] [--callers 96]

Starts the whole service several times: in one process; with one ingress and one predictor, with everything kept and
with nothing; with two of each. The forward pass is `fake_device`, so what is left is HTTP, decoding, triage, ledger and
blobs. On a machine with few cores the callers take a part of them, so the rate that is observed says little. The CPU
time of a request in a part says how many requests a second one core of that part carries, whatever else runs.
Prints one JSON object; the exit code is 1 if a request failed.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from rich.progress import Progress

from bench.serve.fake_device import fake_device
from bench.serve.load import Images, Target, ask, closed_loop
from bench.serve.peers import free_port
from records.settings import RecordsSettings
from serving.remote import APPLICATION
from serving.settings import ServingSettings

DEVICE_S = 0.002
BATCH = 64
PARTS = ("ingress", "predictor", "counts")
SHAPES: dict[str, dict[str, Any]] = {
    "one_process": {},
    "1_ingress_1_predictor": {"one_process": False},
    "1_ingress_1_predictor_nothing_kept": {"one_process": False, "keep": False},
    "2_ingresses_2_predictors": {
        "ingress_min_replicas": 2, "ingress_max_replicas": 2,
        "predictor_min_replicas": 2, "predictor_max_replicas": 2,
    },
}  # fmt: skip
Figures = dict[str, Any]


def _of_parts() -> dict[str, dict[psutil.Process, float]]:
    """Return the CPU time of every replica so far, by part."""
    found: dict[str, dict[psutil.Process, float]] = {part: {} for part in PARTS}
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title, times = " ".join(process.info["cmdline"] or ()), process.info["cpu_times"]
        for part in PARTS:
            if times is not None and f"ServeReplica:{APPLICATION}:{part}" in title:
                found[part][process] = times.user + times.system
    return found


def _since(before: dict[str, dict[psutil.Process, float]]) -> dict[str, float]:
    """Return the CPU time since then, seconds, by part; only of parts that have a process of their own."""
    return {
        part: sum(taken - before[part].get(process, 0.0) for process, taken in found.items())
        for part, found in _of_parts().items()
        if found
    }


def measure(
    records: RecordsSettings, images: Images, shape: dict[str, Any], *, seconds: float, callers: int
) -> Figures:
    """Measure the service in one shape; Ray has to be initialised.

    Args:
        records: a home with a champion.
        images: to send.
        shape: settings of replicas and processes.
        seconds: over which it is measured.
        callers: that ask without a pause.
    Returns:
        Requests a second, latency, CPU milliseconds of a request by part, and what one core of a part would carry.
    """
    from serving.launch import run_service

    settings = ServingSettings(
        port=free_port(), page=False, max_batch_size=BATCH, max_in_flight=4 * BATCH, rate_limit_per_minute=0,
        predictor_cpus=0.5, explainer_cpus=0.1, ingress_cpus=0.1, start_timeout_s=600.0, **shape,
    )  # fmt: skip
    with run_service(settings, records, predictor_class=fake_device(DEVICE_S)):
        target = Target(settings.port, "/v1/predictions")
        # The output for each size of batch is computed once, by the network, before it is measured.
        ask(target, images, 4 * BATCH, callers)
        before = _of_parts()
        load = closed_loop(target, images, callers, seconds)
        taken_s = _since(before)
    answered = max(1, len(load.answered))
    cpu_ms = {part: 1000 * part_s / answered for part, part_s in taken_s.items()}
    return {
        "requests_s": round(load.per_second, 1),
        "failed": len(load.replies) - len(load.answered),
        "p50_ms": load.percentile_ms(50),
        "cpu_ms": {part: round(value, 3) for part, value in cpu_ms.items()},
        "requests_s_per_core": {part: round(1000 / value) for part, value in cpu_ms.items() if value >= 0.01},
    }


def main() -> int:
    """Train a small model, then measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="over which each shape is measured")
    parser.add_argument("--callers", type=int, default=96, help="that ask without a pause")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="which to measure")
    options = parser.parse_args()
    from bench.serve.subject import images_of, prepare
    from cluster.session import start_ray
    from cluster.sources import load_settings

    figures: Figures = {"device_ms": 1000 * DEVICE_S, "batch": BATCH, "callers": options.callers}
    with TemporaryDirectory(prefix="relook-scale-") as name, Progress(disable=True) as bar:
        folder = Path(name)
        records = RecordsSettings(home=folder / "home")
        settings = load_settings(sets=["cluster.logical_cpus=8", f"records.home={records.home}"])
        prepare(records, None, settings.trainers, folder, bar)
        images = Images(images_of(None, folder, bar))
        with start_ray(settings):
            for shape in options.shapes:
                figures[shape] = measure(
                    records, images, SHAPES[shape], seconds=options.seconds, callers=options.callers
                )  # fmt: skip
    figures["load"] = os.getloadavg()
    print(json.dumps(figures, indent=2))
    return 1 if any(figures[shape]["failed"] for shape in options.shapes) else 0


if __name__ == "__main__":
    sys.exit(main())
