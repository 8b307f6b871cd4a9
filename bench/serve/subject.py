"""The measured network: its bare rate on these cores, and the file that peers load it from.

In: a bundle. Out: images per second of its bare forward pass, and a file that needs torch alone. The network in it is
the served one, with batch norm folded, so that servers are compared and not networks.
"""

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.progress import Progress
from torch import fx, nn

from images.importer import open_dataset
from images.synth import synthesize
from records.arrays import UInt8Array
from records.bundles import Bundle
from records.errors import DataError
from records.models import find_bundle, register, serve_model, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ModelStatus
from trainers.fitting.fit import fit
from trainers.fitting.workers import compute_threads
from trainers.settings import TrainersSettings
from vision.inference.loaded import LoadedModel
from vision.precision import autocast

LESIONS, EPOCHS = 200, 4
WIDTH_PX = 600


def prepare(
    records: RecordsSettings, model: Bundle | None, trainers: TrainersSettings, folder: Path, bar: Progress
) -> Bundle:
    """Serve a model from a home of its own.

    Args:
        records: of that home.
        model: to serve; None trains one on generated images.
        trainers: how it is trained.
        folder: for generated images.
        bar: progress is shown on it.
    Returns:
        The model.
    """
    with closing(open_store(records)) as store:
        bundle = model or _trained(store, trainers, folder, bar)
        with store.ledger.begin() as tx:
            register(tx, bundle)
            serve_model(tx, bundle.id, ModelStatus.PROVISIONAL, replaces=serving_id(tx))
        return bundle


def images_of(data: Path | None, folder: Path, bar: Progress) -> list[bytes]:
    """Return JPEG files to send.

    Args:
        data: folder to take them from; None generates some of HAM10000's size.
        folder: for generated images.
        bar: progress is shown on it.
    Returns:
        At most 500 files.
    Raises:
        DataError: there is none.
    """
    if data is None:
        data = folder / "images"
        synthesize(data, lesions=LESIONS, seed=0, width_px=WIDTH_PX, progress=bar)
    found = sorted(data.rglob("*.jpg"))[:500]
    if not found:
        raise DataError(f"{str(data)!r} has no JPEG files to send; name a folder that has some, or leave --data out")
    return [path.read_bytes() for path in found]


class Bare:
    """The bare forward pass of a model: nothing decoded, decided, explained or stored.

    Args:
        model: fp32 or bf16, as it is served.
        batch_size: of a forward pass.
        threads: that compute.
    """

    def __init__(self, model: LoadedModel, batch_size: int, threads: int) -> None:
        self._model = model
        side_px = model.geometry.side_px
        random = np.random.default_rng(0)
        self.pixels: UInt8Array = random.integers(0, 256, (batch_size, side_px, side_px, 3), dtype=np.uint8)
        self._inputs = model.inputs(self.pixels)
        self._network = model.network
        self._threads = threads

    def rate(self, seconds: float) -> tuple[float, float]:
        """Return images per second in full batches, and the CPU time of an image, milliseconds."""
        before_s = time.process_time()
        times_s = self._times_s(self._inputs, seconds)
        # The first pass warms up: it costs CPU time and does not count.
        cpu_s = (time.process_time() - before_s) * len(times_s) / (len(times_s) + 1)
        images = len(self._inputs) * len(times_s)
        return images / sum(times_s), 1000 * cpu_s / images

    def single_ms(self, seconds: float) -> float:
        """Return the median time of one image alone, milliseconds."""
        return 1000 * median(self._times_s(self._inputs[:1], seconds))

    def _times_s(self, inputs: torch.Tensor, seconds: float) -> Sequence[float]:
        times_s: list[float] = []
        with compute_threads(self._threads), torch.inference_mode():
            for step in range(1_000_000):
                began_s = time.perf_counter()
                with autocast(self._model.precision):
                    self._network(inputs).float().numpy()
                if step:
                    times_s.append(time.perf_counter() - began_s)
                if sum(times_s) > seconds and len(times_s) > 2:
                    break
        return times_s


def write_for_peers(model: LoadedModel, path: Path) -> None:
    """Write a model so that a program with torch and without Relook can load it.

    Args:
        model: as it is served.
        path: the file; only this machine's own programs may load it, since it is pickled.
    Raises:
        DataError: its images are scaled in a way that the peers do not know.
    """
    if model.geometry.scaling != "mean_std":
        raise DataError(f"the peers scale by mean and deviation, and this model by {model.geometry.scaling}")
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, part in zip(("features", "head"), model.network.children(), strict=True):
        parts[name] = fx.symbolic_trace(part)
    torch.save(
        {
            "network": nn.Sequential(parts).eval(),
            "side_px": model.geometry.side_px,
            "mean": list(model.geometry.mean),
            "std": list(model.geometry.std),
            "codes": list(model.taxonomy.codes),
            "precision": model.precision,
        },
        path,
    )


def named_bundle(records: RecordsSettings, name: str | None) -> Bundle | None:
    """Return the bundle of the user's home that has a name; None for no name."""
    if name is None:
        return None
    with closing(open_store(records)) as store:
        return find_bundle(store, name)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def _trained(store: Store, trainers: TrainersSettings, folder: Path, bar: Progress) -> Bundle:
    synthesize(folder / "images", lesions=LESIONS, seed=0, width_px=WIDTH_PX, progress=bar)
    dataset = open_dataset(store, str(folder / "images"), progress=bar)
    shared = {"epochs": EPOCHS, "early_stop_patience_epochs": None, "workers.threads": cores()}
    settings = trainers.with_values(shared)
    return fit(store, settings, dataset, run_dir=folder / "run", use_ray=False, progress=bar)
