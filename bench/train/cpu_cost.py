"""CPU seconds per image of bare steps and of the training loop with its feeder, for a busy machine.

Where all cores are busy, rates are inversely proportional to these costs; unlike rates, costs hardly depend on other
load. One thread, no Ray, no validation. `python -m bench train` measures rates.

    .venv/bin/python -m bench.train.cpu_cost IMAGES --model custom_cnn
"""

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch
from rich.progress import Progress

from bench.train.raw import raw_rate
from bench.train.training import prepare
from records.bundles import Geometry
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import Taxonomy
from trainers.augmentation import Augmenter, load_policy
from trainers.augmentation.operations import Canvas
from trainers.fitting.feeding import Feeder
from trainers.fitting.steps import Stepper
from trainers.fitting.training_data import TrainingData
from trainers.optimization.losses import build_loss
from trainers.optimization.optimizers import build_optimizer
from trainers.settings import ModelSettings, TrainersSettings, WorkersSettings
from vision.networks import build_model
from vision.precision import training_precision


def loop_cost(settings: TrainersSettings, data: TrainingData, taxonomy: Taxonomy, steps: int) -> float:
    """Return CPU seconds per image of training steps on batches that the feeder prepares."""
    augmenter = Augmenter(load_policy(settings.augmentation), Canvas(settings.model.side_px, (180.0, 140.0, 140.0)))
    feeder = Feeder(data.pixels, data.labels, data.image_ids, data.train_index, augmenter, settings)
    network = build_model(settings.model.name, len(taxonomy.codes), **settings.model.options)
    network = network.to(memory_format=torch.channels_last)
    stepper = Stepper(
        network,
        build_optimizer(network, settings.optimizer),
        None,
        build_loss(settings.loss, data.labels[data.train_index], taxonomy, sampler=settings.sampler),
        Geometry(side_px=settings.model.side_px, scaling=settings.model.pixel_scaling),
        training_precision(settings.precision, network),
        torch.device("cpu"),
        settings.optimizer,
    )
    # The first two steps warm up and are not counted.
    done, epoch, began = -2, 0, 0.0
    while done < steps:
        for batch in feeder.epoch(epoch):
            if done == 0:
                began = time.process_time()
            stepper.train_step(batch)
            done += 1
            if done == steps:
                break
        epoch += 1
    return (time.process_time() - began) / (steps * settings.images_per_step)


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--model", default="custom_cnn")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = TrainersSettings(
        model=ModelSettings(name=options.model, side_px=options.side),
        workers=WorkersSettings(threads=1, use_gpu=False),
        batch_size=64,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(open_store(RecordsSettings(home=Path(folder) / "home"))) as store,
    ):
        plan = prepare(store, options.images, options.side, Path(folder), Progress(disable=True))
        classes = len(store.taxonomy.codes)
        raw = 1.0 / raw_rate(settings, classes, time.process_time)
        loop = loop_cost(settings, plan.open(store, options.side), store.taxonomy, options.steps)
        raw = (raw + 1.0 / raw_rate(settings, classes, time.process_time)) / 2
    print(
        json.dumps(
            {"model": options.model, "raw_cpu_ms": raw * 1e3, "loop_cpu_ms": loop * 1e3, "loop_over_raw": raw / loop}
        )
    )


if __name__ == "__main__":
    main()
