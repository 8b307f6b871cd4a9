"""What the predictor of the service reaches on a device: decoding, batches, triage, ledger and blobs; no HTTP, no Ray.

In: a bundle. Out: images per second in batches of 64, that rate divided by the one of the bare forward pass on the same
device, and the latency of one image alone. With a fake device, whose forward pass takes a given time and no core, the
same shows on any machine how much of a device the rest of the predictor keeps busy.
"""

import asyncio
import os
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.serve.fake_device import fake_models
from bench.serve.load import Images
from images.synth import render
from records.arrays import UInt8Array
from records.bundles import Bundle
from records.ids import new_id
from records.models import register, serve_model, serving_id
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import ModelStatus
from serving.messages import PredictionRequest
from serving.predictor import Predictor
from serving.schemas import Context
from serving.settings import ServingSettings
from vision.inference.loaded import load_model
from vision.precision import autocast

BATCH = 64
WIDTH_PX = 600
FILES = 16
"""Images that are varied; each that is sent has other bytes."""


def served_figures(bundle: Bundle, device: str, folder: Path, seconds: float, fake_s: float | None) -> dict[str, Any]:
    """Measure the predictor.

    Args:
        bundle: the model.
        device: `cuda` or `cpu`.
        folder: for a home.
        seconds: of one measurement.
        fake_s: what a forward pass of a fake device takes; None uses the real one.
    Returns:
        `raw_images_s`, `images_s`, `share_of_raw`, `p50_ms` of one image alone.
    """
    settings = ServingSettings(
        device="cuda" if device == "cuda" and not fake_s else "cpu",
        max_batch_size=BATCH,
        max_in_flight=4 * BATCH,
        # A fake device computes one batch at a time, as a GPU does.
        predictor_cpus=1.0 if fake_s else float(len(os.sched_getaffinity(0))),
    )
    raw = BATCH / fake_s if fake_s else _raw_images_s(bundle, device, seconds)
    with ExitStack() as stack:
        # JSON is YAML.
        (folder / "taxonomy.yaml").write_text(bundle.document.taxonomy.model_dump_json(), encoding="utf-8")
        records = RecordsSettings(home=folder / "home", taxonomy=str(folder / "taxonomy.yaml"))
        store = stack.enter_context(closing(open_store(records)))
        with store.ledger.begin() as tx:
            register(tx, bundle)
            serve_model(tx, bundle.id, ModelStatus.PROVISIONAL, replaces=serving_id(tx))
        if fake_s:
            stack.enter_context(fake_models(fake_s))
        rate, alone_ms = asyncio.run(_measured(store, settings, seconds))
    return {
        "raw_images_s": round(raw, 1),
        "images_s": round(rate, 1),
        "share_of_raw": round(rate / raw, 3),
        "p50_ms": round(alone_ms, 2),
    }


async def _measured(store: Store, settings: ServingSettings, seconds: float) -> tuple[float, float]:
    """Return images per second of many callers, and the median latency of one alone, milliseconds."""
    predictor, images = Predictor(store, settings), Images(_files())
    await predictor.start()

    async def ask() -> float:
        began_s = time.perf_counter()
        await predictor.predict(PredictionRequest(next(images), new_id(), Context()))
        return time.perf_counter() - began_s

    async def rate_of(count: int) -> float:
        """Return images per second of callers that share `count` images, each asking without a pause."""
        left, ended_s = iter(range(count)), list[float]()

        async def caller() -> None:
            for _ in left:
                await ask()
                ended_s.append(time.perf_counter())

        await asyncio.gather(*(caller() for _ in range(3 * BATCH)))
        # From the end of the first batch, before which nothing computes while the first images are decoded.
        return (count - BATCH) / (ended_s[-1] - ended_s[BATCH - 1])

    try:
        # A device chooses kernels at the first batch of a size, so the first figure only says how many images to send.
        warm = await rate_of(4 * BATCH)
        rate = await rate_of(max(4 * BATCH, round(warm * seconds)))
        alone_s = [await ask() for _ in range(max(3, min(200, round(20 * seconds))))]
    finally:
        await predictor.stop()
    return rate, 1000 * float(np.median(alone_s))


def _raw_images_s(bundle: Bundle, device: str, seconds: float) -> float:
    """Return the rate of bare forward passes on pixels that lie on the device, as the service computes them."""
    model = load_model(bundle, device=device)
    side_px = model.geometry.side_px
    pixels: UInt8Array = np.random.default_rng(0).integers(0, 256, (BATCH, side_px, side_px, 3), dtype=np.uint8)
    inputs = model.inputs(pixels)
    rates: list[float] = []
    began_s = time.perf_counter()
    with torch.inference_mode():
        while len(rates) < 3 or time.perf_counter() - began_s < seconds / 2:
            before_s = time.perf_counter()
            with autocast(model.precision, device):
                # Reading a number waits for the device.
                float(model.network(inputs).float().sum())
            rates.append(BATCH / (time.perf_counter() - before_s))
    # The first pass chooses kernels.
    return float(np.median(rates[1:]))


def _files() -> list[bytes]:
    return [render("nv", seed=0, number=number, width_px=WIDTH_PX) for number in range(FILES)]
