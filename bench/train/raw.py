"""The rate of bare training steps: forward, backward and optimizer step. No Ray, no reports, no checkpoints."""

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

from records.arrays import UInt8Array
from records.bundles import Geometry
from records.memory import keep_freed_memory
from trainers.fitting.workers import choose_device, compute_threads, threads_of
from trainers.optimization.optimizers import build_optimizer
from trainers.settings import TrainersSettings
from vision.networks import build_model
from vision.precision import Precision, autocast, training_precision
from vision.preprocess import scale_pixels, to_tensor

RAW_S = 6.0
WARM_UP_STEPS = 3


def raw_rate(
    settings: TrainersSettings,
    num_classes: int,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = RAW_S,
    batches: Iterator[UInt8Array] | None = None,
) -> float:
    """Measure bare steps, on one batch in memory or on given ones.

    Args:
        settings: network, split, batch, optimizer, precision, threads.
        num_classes: C.
        clock: seconds; `time.process_time` gives images per second of CPU time, which a busy machine hardly changes.
        seconds: how long to go on, in which steps are counted; two steps at least.
        batches: [B, S, S, 3], one for each step and without end; default: one batch of noise for all steps.
    Returns:
        Images per second.
    """
    keep_freed_memory(of_any_size=True)  # as training does
    device = choose_device(settings.workers.use_gpu)
    random = np.random.default_rng(0)
    side_px, batch = settings.model.side_px, settings.images_per_step
    pixels = random.integers(0, 256, (batch, side_px, side_px, 3), dtype=np.uint8)
    labels = torch.from_numpy(random.integers(0, num_classes, batch)).to(device)
    geometry = Geometry(side_px=side_px, scaling=settings.model.pixel_scaling)
    with compute_threads(threads_of(settings.workers)), torch.random.fork_rng():
        network = build_model(settings.model.name, num_classes, **settings.model.options).to(device)
        network = network.to(memory_format=torch.channels_last).train()
        precision = training_precision(settings.precision, network, str(device))
        optimizer = build_optimizer(network, settings.optimizer)
        # Whichever loss the settings name, its share of a step is too small to measure.
        loss_of = nn.CrossEntropyLoss()
        inputs = scale_pixels(to_tensor(pixels).to(device), geometry)
        began, steps = clock(), -WARM_UP_STEPS
        while steps < 2 or clock() - began < seconds:
            if steps == 0:
                began = clock()
            if batches is not None:
                inputs = scale_pixels(to_tensor(next(batches)).to(device), geometry)
            with autocast(precision, str(device)):
                logits = network(inputs)
            loss = loss_of(logits.float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            float(loss.detach())
            steps += 1
        return steps * batch / (clock() - began)


def precision_of(settings: TrainersSettings) -> Precision:
    """Return the number format that settings train in."""
    network = build_model(settings.model.name, 2, **settings.model.options)
    return training_precision(settings.precision, network, str(choose_device(settings.workers.use_gpu)))
