"""What training and prediction reach on one machine, in one process as far as possible, and without Ray.

Every measurement is a method; one that cannot be made, or for which no time is left, is None with its reason under
`reasons`. Images are generated. The pipeline is the training loop with its feeder, on pixels in memory.
"""

import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam
from PIL import Image

from bench.gpu.processes import augmented_images, ddp_images_s
from bench.gpu.served import served_figures
from bench.train.raw import raw_rate
from images.decode import decode_frame
from records.arrays import UInt8Array
from records.bundles import Bundle, read_bundle
from records.errors import RelookError
from records.frames import Frame
from records.taxonomy import load_taxonomy
from trainers.classifier import RelookClassifier
from trainers.fitting.epoch_report import EpochReport
from trainers.fitting.loop import train
from trainers.fitting.training_data import TrainingData
from trainers.settings import TrainersSettings
from vision.explanations.closed_form import closed_form_of
from vision.inference.loaded import load_model
from vision.networks import MODELS, build_model

ROOT = Path(__file__).parents[2]
CLASSES = 7
ON_CPU = {"precision": "fp32", "workers.use_gpu": False, "workers.threads": 1}
"""How the model is trained whose predictions are measured; how long that takes is no figure."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A network at a side, with the batch that it is trained in."""

    network: str
    side_px: int
    batch: int

    @property
    def name(self) -> str:
        """How figures name it."""
        return f"{self.network}_{self.side_px}"


FULL = (Subject("resnet18", 64, 512), Subject("efficientnet_v2_s", 224, 128))
SHORT = (Subject("custom_cnn", 32, 4), Subject("custom_cnn", 64, 4))


@dataclass
class GpuBench:
    """One run of the measurements.

    Args:
        device: `cuda` or `cpu`.
        short: small networks and a moment for each.
        limit_s: no measurement begins later than this.
        folder: for a bundle and a home.
        only: names of the measurements to make; empty makes all.
        fake_s: what a forward pass of a fake device takes, for `served`; None uses the real one.
    """

    device: str
    short: bool
    limit_s: float
    folder: Path
    only: Sequence[str] = ()
    fake_s: float | None = None
    _reasons: dict[str, str] = field(default_factory=dict)

    def run(self) -> Figures:
        """Measure everything."""
        began = time.monotonic()
        if self.device == "cuda" and not torch.cuda.is_available():
            figures: Figures = dict.fromkeys(self._measures())
            self._reasons = dict.fromkeys(figures, "torch sees no GPU here; --device cpu measures the CPU")
            return self._facts() | figures | {"reasons": self._reasons}
        figures = {}
        for name, measure in self._measures().items():
            if time.monotonic() - began > self.limit_s:
                figures[name], self._reasons[name] = None, f"no time was left of {self.limit_s:.0f} s"
                continue
            try:
                figures[name] = measure()
            except (RelookError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                figures[name], self._reasons[name] = None, " ".join(str(error).split())[:200]
            except _NotHereError as error:
                figures[name], self._reasons[name] = None, str(error)
        took = round(time.monotonic() - began, 1)
        return self._facts() | figures | {"took_s": took, "reasons": self._reasons}

    def _measures(self) -> dict[str, Callable[[], Any]]:
        all_of_them: dict[str, Callable[[], Any]] = {
            "raw_images_s": self._raw,
            "pipeline_images_s": self._pipeline,
            "pipeline_over_raw": self._over_raw,
            "feeder_images_s": self._feeders,
            "decoded_images_s": self._decoded,
            "ddp_images_s": self._ddp,
            "predictor": self._predictor,
            "served": self._served,
            "maps_against_captum": self._maps,
            "closeness_to_cpu": self._closeness,
            "gpu_tests": self._tests,
            "dissertation_rows": self._rows,
        }
        return {name: measure for name, measure in all_of_them.items() if not self.only or name in self.only}

    def _facts(self) -> Figures:
        is_gpu = self.device == "cuda" and torch.cuda.is_available()
        return {
            "device": torch.cuda.get_device_name() if is_gpu else f"CPU, {platform.machine()}",
            "gpus": torch.cuda.device_count(),
            "cores": len(os.sched_getaffinity(0)),
            "torch": torch.__version__,
            "short": self.short,
        }

    @property
    def _subjects(self) -> tuple[Subject, ...]:
        return SHORT if self.short else FULL

    @property
    def _seconds(self) -> float:
        return 0.0 if self.short else 6.0

    def _settings(self, subject: Subject, precision: str, epochs: int = 1) -> TrainersSettings:
        values = {
            "model.name": subject.network, "model.side_px": subject.side_px, "batch_size": subject.batch,
            "precision": precision, "epochs": epochs, "workers.use_gpu": self.device == "cuda",
            # One thread, so that the short form takes as long beside other work.
            **({"workers.threads": 1} if self.short else {}),
        }  # fmt: skip
        return TrainersSettings().with_values(values)

    def _raw(self) -> Figures:
        return {
            f"{subject.name}_{precision}": round(
                raw_rate(self._settings(subject, precision), CLASSES, seconds=self._seconds), 1
            )
            for subject in self._subjects
            for precision in ("bf16", "fp32")
        }

    @cached_property
    def _pipeline_rates(self) -> dict[str, tuple[float, float]]:
        """Rates of the training loop and of bare steps around it, by subject."""
        found = {}
        for subject in self._subjects:
            settings = self._settings(subject, "bf16", epochs=3)
            raw = raw_rate(settings, CLASSES, seconds=self._seconds)
            steps = max(2, round(raw * self._seconds / subject.batch))
            rate = _loop_rate(settings, steps * subject.batch)
            found[subject.name] = rate, (raw + raw_rate(settings, CLASSES, seconds=self._seconds)) / 2
        return found

    def _pipeline(self) -> Figures:
        return {name: round(rate, 1) for name, (rate, _) in self._pipeline_rates.items()}

    def _over_raw(self) -> Figures:
        return {name: round(rate / raw, 3) for name, (rate, raw) in self._pipeline_rates.items()}

    def _feeders(self) -> Figures:
        cores = len(os.sched_getaffinity(0))
        counts = [1] if self.short else [count for count in (1, 2, 4, 8, 16) if count <= 2 * cores]
        side_px = self._subjects[0].side_px
        found = {}
        for count in counts:
            with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
                # The first call pays for imports.
                list(pool.map(augmented_images, [side_px] * count, [0.0] * count))
                found[str(count)] = round(sum(pool.map(augmented_images, [side_px] * count, [self._seconds] * count)))
        return found

    def _decoded(self) -> float:
        buffer = io.BytesIO()
        Image.fromarray(_pixels(1, 600)[0]).save(buffer, format="JPEG", quality=90)
        content, count = buffer.getvalue(), 5 if self.short else 400
        began = time.perf_counter()
        for _ in range(count):
            decode_frame(content, Frame(self._subjects[0].side_px))
        return round(count / (time.perf_counter() - began), 1)

    def _ddp(self) -> Figures:
        workers = torch.cuda.device_count() if self.device == "cuda" else 2
        if workers < 2:
            raise _NotHereError("this machine has one GPU")
        if self.short:
            raise _NotHereError("left out by --short")
        subject = self._subjects[0]
        found = {
            str(count): ddp_images_s(self.device, count, subject.network, subject.side_px, subject.batch)
            for count in (1, workers)
        }
        return {count: round(rate, 1) for count, rate in found.items()}

    @cached_property
    def _bundle(self) -> Bundle:
        subject = self._subjects[0]
        side_px, count = subject.side_px, 24
        model = RelookClassifier(subject.network, side_px, epochs=1, batch_size=8, settings=ON_CPU)
        model.fit(_pixels(count, side_px), np.arange(count) % 3)
        return read_bundle(model.save(self.folder))

    def _predictor(self) -> Figures:
        model = load_model(self._bundle, device=self.device)
        found: Figures = {}
        for size in (1, 8) if self.short else (1, 8, 32, 128):
            pixels = _pixels(size, self._subjects[0].side_px)
            for gradcam in (False, True):
                times: list[float] = []
                began = time.perf_counter()
                while len(times) < 3 or time.perf_counter() - began < self._seconds / 4:
                    start = time.perf_counter()
                    model.predict(pixels, gradcam=gradcam)
                    times.append(time.perf_counter() - start)
                # The first call chooses kernels.
                median = float(np.median(times[1:]))
                name = f"batch_{size}{'_with_maps' if gradcam else ''}"
                found[name] = {"images_s": round(size / median, 1), "latency_ms": round(1e3 * median, 3)}
        return found

    def _served(self) -> Figures:
        return served_figures(self._bundle, self.device, self.folder, self._seconds, self.fake_s)

    def _maps(self) -> Figures:
        found = {}
        for subject in self._subjects:
            network = build_model(subject.network, CLASSES).to(self.device).eval()
            inputs = torch.randn(4, 3, subject.side_px, subject.side_px, device=self.device)
            closed = closed_form_of(network.get_submodule("head"))
            if closed is None:
                raise _NotHereError(f"{subject.network} has no closed form")
            with torch.inference_mode():
                ours = closed.maps(network.get_submodule("features")(inputs))
            layer = network.get_submodule(MODELS[subject.network].target_layer)
            theirs = torch.cat([
                LayerGradCam(network, layer).attribute(inputs, target=target, relu_attributions=True).detach()
                for target in range(CLASSES)
            ], dim=1)  # fmt: skip
            found[subject.name] = float((ours - theirs).abs().max() / theirs.max().clamp(min=1e-12))
        return found

    def _closeness(self) -> Figures:
        pixels = _pixels(16, self._subjects[0].side_px)
        there = load_model(self._bundle, device=self.device, precision="fp32").predict(pixels, gradcam=True)
        here = load_model(self._bundle, device="cpu", precision="fp32").predict(pixels, gradcam=True)
        if there.maps is None or here.maps is None:
            raise _NotHereError("there are no maps")
        return {
            "probabilities": float(np.abs(there.probabilities - here.probabilities).max()),
            "maps": float(np.abs(there.maps - here.maps).max() / max(float(here.maps.max()), 1e-12)),
        }

    def _tests(self) -> str:
        if self.device != "cuda":
            raise _NotHereError("they need a GPU")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/vision"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        return (done.stdout.strip().splitlines() or ["nothing was printed"])[-1]

    def _rows(self) -> None:
        raise _NotHereError("they need HAM10000 and hours: relook tune --data FOLDER --preset dissertation")


class _NotHereError(Exception):
    """Why a measurement is not made."""


class _Rows:
    def __init__(self, pixels: UInt8Array) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, indices: Any) -> UInt8Array:
        """Return rows."""
        found: UInt8Array = self._pixels[indices]
        return found


def _pixels(count: int, side_px: int) -> UInt8Array:
    return np.random.default_rng(0).integers(0, 256, (count, side_px, side_px, 3), dtype=np.uint8)


def _loop_rate(settings: TrainersSettings, num_train: int) -> float:
    """Train for a few epochs; return training images per second of the epochs after the first."""
    num_val = settings.images_per_step
    pixels = _pixels(num_train + num_val, settings.model.side_px)
    labels = np.arange(len(pixels)) % CLASSES
    ids = [f"{number:064x}" for number in range(len(pixels))]
    data = TrainingData(_Rows(pixels), ids, labels, np.arange(num_train), np.arange(num_train, len(pixels)))
    told: list[tuple[float, EpochReport]] = []

    def note(report: EpochReport) -> bool:
        told.append((time.perf_counter(), report))
        return False

    train(settings, data, load_taxonomy("ham10000"), on_epoch=note)
    spans = [after - before - report.validation_seconds for (before, _), (after, report) in pairwise(told)]
    return num_train * len(spans) / sum(spans)
