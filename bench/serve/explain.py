"""Rates of Grad-CAM: with the prediction, alone, and compared with pytorch-grad-cam (`python -m bench explain`).

Every round measures, one after the other: predictions, predictions with the maps of all classes, maps resized to the
image, the peer.
"""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from rich.progress import Progress

from bench.serve.peers import Peers
from images.overlay import resized_strength
from records.arrays import UInt8Array
from trainers.fitting.workers import compute_threads
from vision.inference.loaded import LoadedModel

Figures = dict[str, Any]


def explain_figures(
    model: LoadedModel,
    pixels: UInt8Array,
    peers: Peers,
    rounds: int,
    seconds: float,
    threads: int,
    bar: Progress,
) -> Figures:
    """Measure everything.

    Args:
        model: as it is served.
        pixels: [N, S, S, 3], a batch.
        peers: with pytorch-grad-cam.
        rounds: of all measurements.
        seconds: per measurement.
        threads: that compute.
        bar: progress is shown on it.
    Returns:
        Rates and ratios; what cannot be measured is None, with its reason under `reasons`.
    """
    load_before, side_px = os.getloadavg()[0], pixels.shape[1]
    target = np.zeros(len(pixels), dtype=np.int64)

    def maps() -> None:
        for values in model.gradcam(pixels, target):
            resized_strength(values, side_px, side_px)

    predictions, with_maps, alone, theirs = [], [], [], []
    task = bar.add_task("rounds", total=rounds)
    for _ in range(rounds):
        with compute_threads(threads):
            predictions.append(_rate(lambda: model.predict(pixels), len(pixels), seconds))
            with_maps.append(_rate(lambda: model.predict(pixels, gradcam=True), len(pixels), seconds))
            alone.append(_rate(maps, len(pixels), seconds))
        if (rate := peers.gradcam_rate(len(pixels), seconds)) is not None:
            theirs.append(rate)
        bar.advance(task)
    return {
        "gradcam_over_predict": _ratio(with_maps, predictions),
        "gradcam_over_pytorch_grad_cam": _ratio(alone, theirs),
        "predict_images_s": round(median(predictions), 1),
        "predict_with_maps_images_s": round(median(with_maps), 1),
        "maps_s": round(median(alone), 1),
        "pytorch_grad_cam_maps_s": round(median(theirs), 1) if theirs else None,
        "gradcam_is_exact": model.gradcam_is_exact,
        "load_average_before": round(load_before, 1),
        "load_average_after": round(os.getloadavg()[0], 1),
        "reasons": peers.reasons,
    }


def _rate(call: Callable[[], object], batch_size: int, seconds: float) -> float:
    call()
    began_s, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - began_s < seconds:
        call()
        calls += 1
    return calls * batch_size / (time.perf_counter() - began_s)


def _ratio(ours: list[float], theirs: list[float]) -> float | None:
    return round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3) if theirs else None
