"""Start-up time of Ray, of fits on one worker in a running Ray and of the service, and memory of its processes.

    .venv/bin/python -m bench.train.start --repeats 2

Uses generated images and the smallest network, so that start-up dominates. Prints one JSON line per repeat: seconds,
and MiB of memory that a replica does not share. Copied into a checkout of another commit it measures that commit; two
of them run alternately on an idle machine are comparable.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.drills.live_service import LiveService
from bench.serve.peers import free_port
from cluster.session import start_ray
from cluster.settings import Settings
from images.importer import open_dataset
from images.synth import synthesize
from records.models import register, serve_model
from records.settings import RecordsSettings
from records.store import open_store
from records.types import ModelStatus
from serving.settings import ServingSettings
from trainers.fitting.fit import fit
from trainers.settings import TrainersSettings

DEPLOYMENTS = ("ingress", "page", "predictor", "explainer")
LESIONS = 140
TRAINERS = {
    "model": {"name": "custom_cnn", "side_px": 32},
    "epochs": 2,
    "precision": "fp32",
    "workers": {"count": 1, "threads": 1},
}


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Record the seconds of a block."""
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)


def replicas_mib(service: LiveService) -> dict[str, float]:
    """Return the memory of each replica of the service that no other process shares."""
    return {
        name: round(process.memory_full_info().uss / 2**20)
        for name in DEPLOYMENTS
        for process in service.replicas(name)
    }


def measure(folder: Path) -> dict[str, Any]:
    """Start everything once."""
    seconds: dict[str, float] = {}
    settings = Settings(records=RecordsSettings(home=folder / "home"), serving=ServingSettings(port=free_port()))
    trainers = TrainersSettings.model_validate(TRAINERS)
    synthesize(folder / "images", lesions=LESIONS, seed=3, width_px=96)
    with closing(open_store(settings.records)) as store:
        dataset = open_dataset(store, str(folder / "images"))
        with timed(seconds, "fit_without_ray"):
            fit(store, trainers, dataset, run_dir=folder / "plain", use_ray=False)
        began = time.perf_counter()
        with start_ray(settings):
            seconds["ray"] = round(time.perf_counter() - began, 1)
            from serving.launch import start_service

            for name in ("first_fit_in_ray", "next_fit_in_ray"):
                with timed(seconds, name):
                    bundle = fit(store, trainers, dataset, run_dir=folder / name, use_ray=True)
            with store.ledger.begin() as tx:
                register(tx, bundle)
                serve_model(tx, bundle.id, ModelStatus.CHAMPION, replaces=None)
            with timed(seconds, "service"):
                service = start_service(settings.serving, settings.records)
            memory_mib = replicas_mib(LiveService(service.url, store, psutil.Process()))
            with timed(seconds, "service_stop"):
                service.stop()
    return {"seconds": seconds, "replica_mib": memory_mib}


def main() -> None:
    """Print one line per repeat."""
    # Ray's workers import the same commit as this process, wherever a package of this name is installed.
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    for _ in range(parser.parse_args().repeats):
        with tempfile.TemporaryDirectory(prefix="relook-start-") as folder:
            print(json.dumps(measure(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
